package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/introspection/v1"
	containerdversion "github.com/containerd/containerd/api/services/version/v1"
	containerd "github.com/containerd/containerd/v2/client"
	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/userns"
)

// kubeletConfig is the kubelet's configuration on a node of kubeadm.
const kubeletConfig = "/var/lib/kubelet/config.yaml"

// otherRuntimes are the sockets of other runtimes that attach pods to CNI networks.
var otherRuntimes = []string{"/run/crio/crio.sock", "/run/cri-dockerd.sock"}

// preflight examines the node before its containerd is replaced. It reads the files that
// containerd-podfsm will read, asks the running containerd, and changes nothing.
func preflight(ctx context.Context, cmd *cli.Command) (*podfsmv1.DoctorResponse, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("only root can examine the node: run podfsm doctor --preflight as root")
	}
	p, err := gather(ctx, cmd)
	if err != nil {
		return nil, err
	}
	if p.running != nil {
		defer p.running.close()
	}
	d := doctor.New(p.node())
	defer d.Close()
	return show.Examination(d.Examine(ctx)), nil
}

// podKinds are pods by what they need of a node. A finding names the kinds that it refuses.
var podKinds = []struct {
	name  string
	needs []doctor.Pods
}{
	{"on the node's users and network", []doctor.Pods{doctor.AllPods}},
	{"on the node's users", []doctor.Pods{doctor.AllPods, doctor.NetworkPods}},
	{"with a user namespace", []doctor.Pods{doctor.AllPods, doctor.NetworkPods, doctor.UserNSPods}},
	{"with a user namespace and a volume on tmpfs, such as a service account token", []doctor.Pods{doctor.AllPods, doctor.NetworkPods, doctor.UserNSPods, doctor.TmpfsPods}},
}

// writeKinds writes, for each kind of pods, whether podfsm will run it, and which findings prevent
// that. A failed check that names no pods prevents all.
func writeKinds(w io.Writer, findings []*podfsmv1.Finding) error {
	fmt.Fprintln(w, "\nAfter the switch, podfsm's pods would:")
	for _, kind := range podKinds {
		var blocking []string
		for _, f := range findings {
			stops := doctor.Pods(f.GetRefusedPods())
			if slices.Contains(kind.needs, stops) || stops == doctor.NoPods && f.GetStatus() == string(doctor.Fail) {
				blocking = append(blocking, printable(strings.TrimSpace(f.GetCheck()+" "+f.GetSubject())))
			}
		}
		text := "run"
		if len(blocking) > 0 {
			text = "not run until this is fixed: " + strings.Join(blocking, ", ")
		}
		if _, err := fmt.Fprintf(w, "  %s: %s\n", kind.name, text); err != nil {
			return err
		}
	}
	return nil
}

// preparation is what is known of a node before podfsm is installed.
type preparation struct {
	program     string
	file        doctor.ConfigFile
	root, state string
	sections    *sections // nil if the configuration can't be read
	running     *running  // nil while containerd is down
}

// gather reads the files and asks the running containerd. If that runs with another configuration
// file, its file is read, unless --config is set.
func gather(ctx context.Context, cmd *cli.Command) (*preparation, error) {
	p := &preparation{}
	p.program, _ = findProgram() // a missing program is a finding
	address := p.read(ctx, cmd, cmd.String("config"))
	if !cmd.IsSet("address") && address != "" {
		if err := cmd.Set("address", address); err != nil {
			return nil, err
		}
	}
	var err error
	p.running, err = ask(ctx, cmd)
	if errors.As(err, new(downError)) {
		w := cmd.Root().ErrWriter
		complain(w, "%v", err)
		complain(w, "containerd is down; what only it knows is unknown")
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	if named := flagValue(p.running.args, "config", "c"); named != "" && named != p.file.Path && !cmd.IsSet("config") {
		p.read(ctx, cmd, named)
	}
	return p, nil
}

// read reads the configuration at a path, and returns the address of its socket.
func (p *preparation) read(ctx context.Context, cmd *cli.Command, path string) (address string) {
	p.sections, p.root, p.state = nil, cmp.Or(cmd.String("root-dir"), defaults.DefaultRootDir), cmp.Or(cmd.String("state-dir"), defaults.DefaultStateDir)
	p.file = doctor.ConfigFile{Path: path, DropIn: dropIn(path)}
	main, missing, err := readMainFile(path)
	p.file.Version, p.file.Imports, p.file.Missing, p.file.Err = main.Version, main.Imports, missing, err
	if p.program == "" || err != nil {
		return ""
	}
	config, err := dumpConfig(ctx, cmd.Duration("timeout"), p.program, path)
	if err == nil {
		p.sections, err = readSections(config)
	}
	if err != nil {
		p.file.Err = err
		return ""
	}
	p.file.NoCRI = slices.Contains(config.DisabledPlugins, criDir)
	if !cmd.IsSet("root-dir") {
		p.root = config.Root
	}
	if !cmd.IsSet("state-dir") {
		p.state = config.State
	}
	return socketOf(config)
}

// socketOf returns the address of containerd's gRPC server, "" if it is not set.
func socketOf(config *server.Config) string {
	settings, _ := config.Plugins[string(plugins.ServerPlugin)+".grpc"].(map[string]any)
	address, _ := settings["address"].(string)
	return address
}

// node returns the node for the doctor.
func (p *preparation) node() doctor.Node {
	rootDir := filepath.Join(p.root, ledgerDir)
	stock := &doctor.Stock{
		Wanted:   containerdIn(buildInfo()),
		Program:  p.program,
		File:     p.file,
		Kubelet:  kubeletConfig,
		Sockets:  otherRuntimes,
		Attached: cni.Cached,
	}
	n := thisNode(place{root: p.root, state: p.state})
	n.Stock = stock
	n.Draining = func() (time.Time, bool) {
		since, err := records.DrainingSince(rootDir)
		return since, err == nil && !since.IsZero()
	}
	if p.sections != nil {
		n.Config = p.sections.examined(p.root, p.state)
		stock.Like = p.sections.stockHandler(p.root)
		if len(n.Config.Handlers) == 0 && stock.Like.Name != "" {
			planned := stock.Like
			planned.Name, planned.Default, planned.Mode, planned.Planned = own, false, userns.ModeKubelet, true
			n.Config.Handlers = []doctor.Handler{planned}
		}
	}
	if p.running != nil {
		p.running.tell(&n)
	}
	return n
}

// stockHandler returns the handler whose settings podfsm's handler copies: the default one of the
// node, or "runc" if the default one is podfsm's or has another runtime type.
func (s *sections) stockHandler(root string) doctor.Handler {
	for _, name := range []string{s.runtime.Containerd.Default, "runc"} {
		if h := s.runtime.Containerd.Runtimes[name]; h.Type == plugins.RuntimeRuncV2 && h.Sandboxer != own {
			return s.handler(name, h, root)
		}
	}
	return doctor.Handler{}
}

// running is a running containerd without podfsm.
type running struct {
	close    func()
	version  string
	pid      int
	args     []string
	path     string // its PATH
	unread   error  // why args or path are unknown
	plugins  []*introspection.Plugin
	config   *doctor.Running // nil if its CRI service is disabled
	networks func(context.Context) (map[string]bool, error)
}

// ask connects to the containerd that cmd's flags name. It is an error if that has podfsm already.
func ask(ctx context.Context, cmd *cli.Command) (_ *running, err error) {
	d, err := connect(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.conn.Close()
		}
	}()
	limited, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	version, err := containerdversion.NewVersionClient(d.conn).Version(limited, &emptypb.Empty{})
	if err != nil {
		return nil, d.explain(err)
	}
	client := introspection.NewIntrospectionClient(d.conn)
	loaded, err := client.Plugins(limited, &introspection.PluginsRequest{})
	if err != nil {
		return nil, d.explain(err)
	}
	if slices.ContainsFunc(loaded.GetPlugins(), isController) {
		return nil, fmt.Errorf("the containerd at %s has podfsm already: run podfsm doctor without --preflight", d.address)
	}
	process, err := client.Server(limited, &emptypb.Empty{})
	if err != nil {
		return nil, d.explain(err)
	}
	told, err := runtime.NewRuntimeServiceClient(d.conn).Status(limited, &runtime.StatusRequest{Verbose: true})
	if err != nil && status.Code(err) != codes.Unimplemented { // if CRI is disabled
		return nil, d.explain(err)
	}
	api, err := containerd.NewWithConn(d.conn)
	if err != nil {
		return nil, err
	}
	r := &running{
		close:    func() { d.conn.Close() },
		version:  version.GetVersion(),
		pid:      int(process.GetPid()),
		plugins:  loaded.GetPlugins(),
		networks: func(ctx context.Context) (map[string]bool, error) { return leaks.Containers(ctx, api) },
	}
	if told != nil {
		if r.config, err = readRunning(told); err != nil {
			return nil, err
		}
	}
	r.args, r.path, r.unread = readProcess(ctx, r.pid)
	return r, nil
}

func isController(p *introspection.Plugin) bool {
	return p.GetType() == string(plugins.PodSandboxPlugin) && p.GetID() == own
}

// readRunning reads the configuration of the CRI service from its status.
func readRunning(status *runtime.StatusResponse) (*doctor.Running, error) {
	var config struct {
		Containerd struct {
			Runtimes map[string]struct {
				Options struct{ SystemdCgroup bool } `json:"options"`
			} `json:"runtimes"`
		} `json:"containerd"`
		RootDir string `json:"rootDir"`
	}
	if err := json.Unmarshal([]byte(status.GetInfo()["config"]), &config); err != nil {
		return nil, fmt.Errorf("failed to read the configuration in the status of containerd's CRI service: %w", err)
	}
	running := &doctor.Running{Root: filepath.Dir(config.RootDir), SystemdCgroup: map[string]bool{}}
	for name, h := range config.Containerd.Runtimes {
		running.SystemdCgroup[name] = h.Options.SystemdCgroup
	}
	return running, nil
}

// readProcess reads a process's arguments and its PATH. After an error it returns the part that it
// could read.
func readProcess(ctx context.Context, pid int) (args []string, path string, err error) {
	if args, err = host.Args(ctx, pid); err != nil {
		return nil, "", fmt.Errorf("failed to read containerd's command line: %w", err)
	}
	args = args[1:]
	environment, err := host.Read(ctx, pid, "environ")
	if err != nil {
		return args, "", fmt.Errorf("failed to read containerd's environment: %w", err)
	}
	for variable := range strings.SplitSeq(string(environment), "\x00") {
		if value, ok := strings.CutPrefix(variable, "PATH="); ok {
			path = value
		}
	}
	return args, path, nil
}

// tell adds what the running containerd knows to a node.
func (r *running) tell(n *doctor.Node) {
	n.Daemon, n.Path = r.pid, r.path
	n.Stock.Version, n.Stock.Args, n.Stock.Unread, n.Stock.Running, n.Stock.Known = r.version, r.args, r.unread, r.config, r.networks
	if n.Config == nil {
		return
	}
	for i := range n.Config.Handlers {
		s := &n.Config.Handlers[i].Snapshotter
		*s = r.snapshotter(s.Name, n.Root)
	}
}

// snapshotter describes a snapshotter that containerd has loaded. podfsm's own comes with podfsm.
func (r *running) snapshotter(name, root string) doctor.Snapshotter {
	if name == own {
		return doctor.Snapshotter{Name: name, Loaded: true, Root: root, RemapIDs: true}
	}
	for _, p := range r.plugins {
		if p.GetType() == string(plugins.SnapshotPlugin) && p.GetID() == name && p.GetInitErr() == nil {
			return doctor.Snapshotter{
				Name: name, Loaded: true, RemapIDs: slices.Contains(p.GetCapabilities(), "remap-ids"),
				Root: cmp.Or(p.GetExports()[plugins.SnapshotterRootDir], filepath.Join(root, string(plugins.SnapshotPlugin)+"."+name)),
			}
		}
	}
	return doctor.Snapshotter{Name: name}
}
