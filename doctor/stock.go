package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/host"
)

// Stock is what a node has before podfsm is in place: a containerd without it, which runs or is down, and the configuration that
// containerd-podfsm is going to read.
type Stock struct {
	// Version is that of the containerd that runs, such as "v2.4.2", and Args are its command line without the program. Both are empty
	// while it is down. Wanted is the version that podfsm is built with.
	Version, Wanted string
	Args            []string
	// Unread says why Args or containerd's PATH aren't known, although containerd runs.
	Unread error
	// Program is the path of containerd-podfsm; "" where it isn't found.
	Program string
	// File is what containerd's configuration file says of itself.
	File ConfigFile
	// Like is the node's own runtime handler, which podfsm's go by; the zero value where there is none.
	Like Handler
	// Running is what the containerd that runs has of its configuration; nil while it is down.
	Running *Running
	// Kubelet is the path of the kubelet's configuration.
	Kubelet string
	// Sockets are those of other container runtimes, where they have them.
	Sockets []string
	// Attached reads libcni's record of attachments, and Known tells the ids of all that this containerd has; nil while it is down.
	Attached func() (map[string][]cni.Attached, error)
	Known    func(context.Context) (map[string]bool, error)
}

// ConfigFile is containerd's configuration file.
type ConfigFile struct {
	Path    string
	Version int
	Imports []string // patterns of files
	Missing bool
	DropIn  string // the file that has podfsm's handler, if it is imported
	NoCRI   bool   // containerd's CRI service is disabled
	Err     error  // why containerd-podfsm can't read it
}

// Running is what a containerd has of its configuration.
type Running struct {
	Root          string
	SystemdCgroup map[string]bool // by runtime handler
}

// stockChecks are made only before podfsm is in place.
var stockChecks = []check{
	{"containerd", stockVersion},
	{"configuration", configuration},
	{"service", service},
	{"cgroup driver", cgroupDriver},
	{"security modules", securityModules},
	{"shared networks", sharedNetworks},
}

// notYet is what there is to say of podfsm itself.
func (n Node) notYet() []Finding {
	if since, draining := n.Draining(); draining {
		return []Finding{warn(fmt.Sprintf("an earlier podfsm was drained at %s, and podfsm goes on with that: it will take no pods", since.Format(time.RFC3339)),
			"podfsm drain --cancel, after the switch")}
	}
	return []Finding{ok("it isn't in place yet; nothing of an earlier one keeps it from running pods")}
}

// stockVersion compares the containerd that runs with the one that podfsm is built with.
func stockVersion(_ context.Context, n Node) []Finding {
	s := n.Stock
	if s.Version == "" {
		return []Finding{unknown("containerd is down, so its version isn't known", "compare containerd --version with "+s.Wanted)}
	}
	var has, wanted [2]int
	if _, err := fmt.Sscanf(strings.TrimPrefix(s.Version, "v"), "%d.%d", &has[0], &has[1]); err != nil {
		return []Finding{unknown(fmt.Sprintf("containerd says that its version is %q", s.Version), "compare it with "+s.Wanted)}
	}
	_, _ = fmt.Sscanf(strings.TrimPrefix(s.Wanted, "v"), "%d.%d", &wanted[0], &wanted[1]) // a version of ours
	evidence := fmt.Sprintf("containerd %s runs, containerd-podfsm is %s", s.Version, s.Wanted)
	switch slices.Compare(has[:], wanted[:]) {
	case -1:
		return []Finding{warn(evidence+": the switch is an upgrade of containerd, and its metadata can't be trusted to an older one afterwards",
			fmt.Sprintf("upgrade the node's own containerd to %d.%d first, so that the way back to it stays open", wanted[0], wanted[1]))}
	case 1:
		return []Finding{warn(evidence+": the switch is a downgrade of containerd", "use a podfsm that is built with this containerd or a later one")}
	default:
		return []Finding{ok(evidence)}
	}
}

// configuration looks whether containerd-podfsm can read the files, and finds a handler of podfsm's there.
func configuration(_ context.Context, n Node) []Finding {
	s, file := n.Stock, n.Stock.File
	switch {
	case s.Program == "":
		return []Finding{fail(NoPods, "there is no containerd-podfsm beside podfsm nor in PATH, so nothing can tell what it makes of "+file.Path,
			"install the package, or run podfsm where the package was unpacked")}
	case file.Err != nil:
		return []Finding{fail(NoPods, fmt.Sprintf("%s can't read %s: %v", s.Program, file.Path, file.Err), "correct it: containerd-podfsm doesn't start with it")}
	case file.Missing:
		return []Finding{fail(NoPods, fmt.Sprintf("there is no %s, so containerd reads no drop-ins", file.Path), fmt.Sprintf("%s config default >%s", s.Program, file.Path))}
	}
	if file.NoCRI {
		return []Finding{fail(NoPods, file.Path+" disables containerd's CRI service, so containerd runs no pods for a kubelet", "remove cri from disabled_plugins")}
	}
	evidence := fmt.Sprintf("%s (version %d) imports %s", file.Path, file.Version, orNothing(file.Imports))
	if !slices.ContainsFunc(n.Config.Handlers, func(h Handler) bool { return !h.Planned }) {
		return []Finding{fail(NoPods, evidence+", and no runtime handler there has sandboxer = \"podfsm\"", s.handlerRemedy())}
	}
	if s.Running != nil && s.Running.Root != n.Root {
		return []Finding{warn(fmt.Sprintf("%s and says root = %q, but the containerd that runs has %q", evidence, n.Root, s.Running.Root),
			"give --config the file that containerd has, or "+settle)}
	}
	return []Finding{ok(evidence)}
}

// settle is the remedy where the containerd that runs hasn't read what the files say.
const settle = "restart the node's own containerd before podfsm's package is installed; " +
	"once the package is installed, every restart is the switch: change the file back first"

// orNothing are the patterns of an import.
func orNothing(imports []string) string {
	if len(imports) == 0 {
		return "nothing"
	}
	return strings.Join(imports, ", ")
}

// handlerRemedy says how podfsm gets a handler: by its file, which has to be there and be imported.
func (s *Stock) handlerRemedy() string {
	file := s.File
	if !file.imported() {
		imports := append(slices.Clone(file.Imports), filepath.Join(filepath.Dir(file.DropIn), "*.toml"))
		return fmt.Sprintf(`let %s have, at its top: imports = ["%s"]`, file.Path, strings.Join(imports, `", "`))
	}
	return file.rewrite()
}

// rewrite is the command that writes podfsm's handler into its file.
func (f ConfigFile) rewrite() string { return "podfsm handler --write " + f.DropIn }

// imported says whether containerd reads the drop-in. A relative pattern is below the file's directory.
func (f ConfigFile) imported() bool {
	return slices.ContainsFunc(f.Imports, func(pattern string) bool {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(f.Path), pattern)
		}
		matches, err := filepath.Match(filepath.Clean(pattern), f.DropIn)
		return err == nil && matches
	})
}

// service looks how containerd is started: the package's drop-in starts containerd-podfsm without flags, and lifts the unit's limits.
func service(_ context.Context, n Node) []Finding {
	var found []Finding
	_, err := os.Stat(n.SystemdDir)
	systemd := err == nil
	if !systemd {
		found = append(found, warn("systemd doesn't run here, so the package's drop-in for containerd.service has no effect",
			"start containerd-podfsm where containerd is started, with the same flags"))
	}
	if n.Daemon == 0 {
		return append(found, down()...)
	}
	if n.Stock.Unread != nil {
		found = append(found, unknown(n.Stock.Unread.Error(), "compare systemctl cat containerd with the package's drop-in, which has no flags; "+
			"name another file than /etc/containerd/config.toml by --config"))
	}
	if args := n.Stock.Args; len(args) > 0 && systemd {
		flags := strings.Join(args, " ")
		found = append(found, warn("containerd runs with flags that the package's drop-in doesn't have: "+flags,
			"after the installation, systemctl edit containerd: ExecStart= and then ExecStart=/usr/bin/containerd-podfsm "+flags))
	}
	if limit, limited := n.tasksMax(); limited && !systemd {
		found = append(found, warn(fmt.Sprintf("containerd's cgroup has pids.max = %d, which pods' shims count in", limit), "raise it: a shim has about 10 threads"))
	} else if limited {
		found = append(found, ok(fmt.Sprintf("containerd's unit has TasksMax=%d, which the package's drop-in lifts", limit)))
	}
	if len(found) == 0 {
		found = []Finding{ok("systemd starts containerd, without flags and without a limit of its tasks")}
	}
	return found
}

// tasksMax is the limit of containerd's cgroup (pids.max, which systemd makes of TasksMax).
func (n Node) tasksMax() (limit int, limited bool) {
	paths := n.cgroupPaths()
	for _, hierarchy := range []string{"pids", ""} {
		path, known := paths[hierarchy]
		if !known {
			continue
		}
		value, err := os.ReadFile(filepath.Join(n.Sys, "fs/cgroup", hierarchy, path, "pids.max"))
		if err != nil {
			continue // the other hierarchy, or no limit
		}
		if limit, err := strconv.Atoi(strings.TrimSpace(string(value))); err == nil {
			return limit, true
		}
	}
	return 0, false
}

// cgroupPaths are containerd's cgroups by hierarchy, none where that isn't known.
func (n Node) cgroupPaths() map[string]string {
	mounts, err := os.Open(n.proc("self/mountinfo"))
	if err != nil {
		return nil
	}
	defer mounts.Close()
	text, _ := n.read(filepath.Join(strconv.Itoa(n.Daemon), "cgroup"))
	paths, _ := host.CgroupPathsBelow(mounts, []byte(text))
	return paths
}

// cgroupDriver compares podfsm's handlers with the node's own and with the kubelet: pods of another driver than the kubelet's don't start,
// or run outside of the kubelet's cgroups.
func cgroupDriver(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	s := n.Stock
	if s.Like.Name == "" {
		return []Finding{unknown("the node has no runtime handler of its own to compare podfsm's with", "let SystemdCgroup be as the kubelet's cgroupDriver")}
	}
	var found []Finding
	for _, h := range n.Config.Handlers {
		f := s.compare(h)
		f.Subject = h.Name
		found = append(found, f)
	}
	if running, known := s.runs(); known && running != s.Like.SystemdCgroup {
		found = append(found, warn(fmt.Sprintf("the containerd that runs has SystemdCgroup = %t for handler %q, %s has %t", running, s.Like.Name, s.File.Path, s.Like.SystemdCgroup),
			settle))
	}
	driver, err := configuredDriver(s.Kubelet)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && driver == "":
	case err != nil:
		found = append(found, unknown(err.Error(), "let SystemdCgroup be as the kubelet's cgroupDriver"))
	case (driver == "systemd") != s.Like.SystemdCgroup:
		found = append(found, warn(fmt.Sprintf("%s says cgroupDriver: %s, handler %q has SystemdCgroup = %t", s.Kubelet, driver, s.Like.Name, s.Like.SystemdCgroup),
			"make them agree, unless the kubelet asks containerd for the driver (Kubernetes 1.28 and later)"))
	}
	return found
}

// compare is the finding for a handler of podfsm's beside the node's own.
func (s *Stock) compare(h Handler) Finding {
	rewrite := s.File.rewrite()
	switch {
	case h.SystemdCgroup != s.Like.SystemdCgroup:
		return fail(NoPods, fmt.Sprintf("SystemdCgroup = %t, but %t for the node's handler %q", h.SystemdCgroup, s.Like.SystemdCgroup, s.Like.Name),
			fmt.Sprintf("%s, or set SystemdCgroup = %t in the handler's options", rewrite, s.Like.SystemdCgroup))
	case h.Shim != s.Like.Shim || h.Binary != s.Like.Binary:
		return warn(fmt.Sprintf("its runtime is %s, but that of the node's handler %q is %s", h.runtime(), s.Like.Name, s.Like.runtime()), rewrite+", unless it is meant to differ")
	default:
		return ok(fmt.Sprintf("SystemdCgroup = %t and runtime %s, as for the node's handler %q", h.SystemdCgroup, h.runtime(), s.Like.Name))
	}
}

func (h Handler) runtime() string { return strings.TrimSpace(h.Shim + " " + h.Binary) }

// runs is SystemdCgroup of the node's handler as the containerd that runs has it.
func (s *Stock) runs() (systemd, known bool) {
	if s.Running == nil {
		return false, false
	}
	systemd, known = s.Running.SystemdCgroup[s.Like.Name]
	return systemd, known
}

// configuredDriver is cgroupDriver in a KubeletConfiguration; "" where it says nothing.
func configuredDriver(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var config struct {
		CgroupDriver string `json:"cgroupDriver"`
	}
	if err := yaml.Unmarshal(text, &config); err != nil {
		return "", fmt.Errorf("failed to read %s: %w", file, err)
	}
	return config.CgroupDriver, nil
}

// securityModules says which one labels or confines processes.
func securityModules(_ context.Context, n Node) []Finding {
	if enforce, err := os.ReadFile(filepath.Join(n.Sys, "fs/selinux/enforce")); err == nil {
		mode := "permissive"
		if strings.TrimSpace(string(enforce)) == "1" {
			mode = "enforcing"
		}
		return []Finding{warn("SELinux is "+mode+", which podfsm hasn't been tested with", "try a pod of each kind on one node, and look for denials: ausearch -m avc")}
	}
	enabled, _ := os.ReadFile(filepath.Join(n.Sys, "module/apparmor/parameters/enabled")) // not there without AppArmor
	if strings.TrimSpace(string(enabled)) == "Y" {
		return []Finding{ok("AppArmor is on")}
	}
	return []Finding{ok("neither SELinux nor AppArmor is on")}
}

// sharedNetworks looks for another runtime on the node's networks: what it has there would not be safe from CNI's GC, which podfsm therefore
// leaves undone.
func sharedNetworks(ctx context.Context, n Node) []Finding {
	const remedy = "remove the other runtime, or give it networks of its own; on a network that both use, set cni_gc = \"off\""
	for _, socket := range n.Stock.Sockets {
		if _, err := os.Stat(socket); err == nil {
			return []Finding{warn("another container runtime has "+socket, remedy)}
		}
	}
	if n.Stock.Known == nil {
		return down()
	}
	attached, err := n.Stock.Attached()
	if err != nil {
		return []Finding{unknown(err.Error(), "look into "+cni.CacheDir())}
	}
	known, err := n.Stock.Known(ctx)
	if err != nil {
		return []Finding{unknown(err.Error(), "try again")}
	}
	for _, network := range slices.Sorted(maps.Keys(attached)) {
		if id, found := cni.Foreign(attached[network], known); found && n.uses(network) {
			return []Finding{warn(fmt.Sprintf("%s has an attachment of %q to network %q, which this containerd doesn't know", cni.CacheDir(), id, network),
				remedy+"; if nothing has it any more, remove its file")}
		}
	}
	return []Finding{ok("no other container runtime was found on the networks")}
}

// uses says whether pods of podfsm's handlers will be on a network; true where that isn't known.
func (n Node) uses(network string) bool {
	if n.Config == nil {
		return true
	}
	return slices.ContainsFunc(n.Config.Handlers, func(h Handler) bool {
		loaded, _ := cni.Load(h.Network) // the check networks tells of errors
		return slices.ContainsFunc(loaded, func(one cni.Network) bool { return one.Name == network })
	})
}
