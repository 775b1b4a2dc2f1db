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

// Stock describes a node before podfsm is installed: its containerd, which runs or is down, and the
// configuration that containerd-podfsm will read.
type Stock struct {
	// Version is the version of the running containerd, such as "v2.4.2", and Args is its command
	// line without the program. Both are empty while it is down. Wanted is the version with which
	// podfsm is built.
	Version, Wanted string
	Args            []string
	// Unread is the reason why Args or containerd's PATH are unknown although containerd runs.
	Unread error
	// Program is the path of containerd-podfsm; "" if it isn't found.
	Program string
	// File is containerd's configuration file.
	File ConfigFile
	// Like is the node's own runtime handler, the model for podfsm's; the zero value for none.
	Like Handler
	// Running is the configuration of the running containerd; nil while it is down.
	Running *Running
	// Kubelet is the path of the kubelet's configuration.
	Kubelet string
	// Sockets are the paths of other container runtimes' sockets.
	Sockets []string
	// Attached reads libcni's cache of attachments. Known returns the ids of all containers of this
	// containerd; nil while it is down.
	Attached func() (map[string][]cni.Attached, error)
	Known    func(context.Context) (map[string]bool, error)
}

// ConfigFile is containerd's configuration file.
type ConfigFile struct {
	Path    string
	Version int
	Imports []string // patterns of files
	Missing bool
	DropIn  string // the file for podfsm's handler
	NoCRI   bool   // containerd's CRI service is disabled
	Err     error  // of containerd-podfsm, if it can't read the file
}

// Running is a part of a running containerd's configuration.
type Running struct {
	Root          string
	SystemdCgroup map[string]bool // by runtime handler
}

// stockChecks are made only before podfsm is installed.
var stockChecks = []check{
	{"containerd", stockVersion},
	{"configuration", configuration},
	{"service", service},
	{"cgroup driver", cgroupDriver},
	{"security modules", securityModules},
	{"shared networks", sharedNetworks},
}

// notYet returns the finding for podfsm itself.
func (n Node) notYet() []Finding {
	if since, draining := n.Draining(); draining {
		return []Finding{warn(fmt.Sprintf("an earlier podfsm was drained at %s, and the drain continues: podfsm will refuse new pods", since.Format(time.RFC3339)),
			"podfsm drain --cancel, after the switch")}
	}
	return []Finding{ok("not installed yet; no drain of an earlier podfsm is in effect")}
}

// stockVersion compares the running containerd with the one with which podfsm is built.
func stockVersion(_ context.Context, n Node) []Finding {
	s := n.Stock
	if s.Version == "" {
		return []Finding{unknown("containerd is down, so its version isn't known", "compare containerd --version with "+s.Wanted)}
	}
	var has, wanted [2]int
	if _, err := fmt.Sscanf(strings.TrimPrefix(s.Version, "v"), "%d.%d", &has[0], &has[1]); err != nil {
		return []Finding{unknown(fmt.Sprintf("containerd says that its version is %q", s.Version), "compare it with "+s.Wanted)}
	}
	_, _ = fmt.Sscanf(strings.TrimPrefix(s.Wanted, "v"), "%d.%d", &wanted[0], &wanted[1]) // never fails
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

// configuration checks that containerd-podfsm can read the files, and that they have a handler of
// podfsm.
func configuration(_ context.Context, n Node) []Finding {
	s, file := n.Stock, n.Stock.File
	switch {
	case s.Program == "":
		return []Finding{fail(NoPods, "there is no containerd-podfsm beside podfsm or in PATH, so "+file.Path+" can't be checked",
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
		if file.imported() && !exists(file.DropIn) {
			return []Finding{warn(evidence+", and podfsm's handler isn't there yet",
				"install the package: the package brings it as "+file.DropIn+". Without the package: "+file.rewrite())}
		}
		return []Finding{fail(NoPods, evidence+", and no runtime handler there has sandboxer = \"podfsm\"", s.handlerRemedy())}
	}
	if s.Running != nil && s.Running.Root != n.Root {
		return []Finding{warn(fmt.Sprintf("%s and says root = %q, but the containerd that runs has %q", evidence, n.Root, s.Running.Root),
			"give --config the file that containerd has, or "+settle)}
	}
	return []Finding{ok(evidence)}
}

// settle is the remedy if the running containerd has another configuration than the files.
const settle = "restart the node's own containerd before podfsm's package is installed; " +
	"once the package is installed, every restart is the switch: change the file back first"

// orNothing returns the import patterns, or "nothing".
func orNothing(imports []string) string {
	if len(imports) == 0 {
		return "nothing"
	}
	return strings.Join(imports, ", ")
}

// handlerRemedy returns the remedy for a missing handler: import its file, or else write it.
func (s *Stock) handlerRemedy() string {
	file := s.File
	if !file.imported() {
		imports := append(slices.Clone(file.Imports), filepath.Join(filepath.Dir(file.DropIn), "*.toml"))
		return fmt.Sprintf(`let %s have, at its top: imports = ["%s"]`, file.Path, strings.Join(imports, `", "`))
	}
	return file.rewrite()
}

// rewrite returns the command that writes podfsm's handler into its file.
func (f ConfigFile) rewrite() string { return "podfsm handler --write " + f.DropIn }

// imported says whether the file imports the drop-in. A relative pattern is below the file's
// directory.
func (f ConfigFile) imported() bool {
	return slices.ContainsFunc(f.Imports, func(pattern string) bool {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(f.Path), pattern)
		}
		matches, err := filepath.Match(filepath.Clean(pattern), f.DropIn)
		return err == nil && matches
	})
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// service checks how containerd is started. The package's drop-in starts containerd-podfsm without
// flags, and lifts the unit's limits.
func service(_ context.Context, n Node) []Finding {
	var found []Finding
	systemd := exists(n.SystemdDir)
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
		found = append(found, warn(fmt.Sprintf("containerd's cgroup has pids.max = %d, for which pods' shims count", limit), "raise it: a shim has about 10 threads"))
	} else if limited {
		found = append(found, ok(fmt.Sprintf("containerd's unit has TasksMax=%d, which the package's drop-in lifts", limit)))
	}
	if len(found) == 0 {
		found = []Finding{ok("systemd starts containerd, without flags and without a limit of its tasks")}
	}
	return found
}

// tasksMax returns pids.max of containerd's cgroup, which systemd sets from TasksMax.
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

// cgroupPaths returns containerd's cgroups by hierarchy; none if they are unknown.
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

// cgroupDriver compares podfsm's handlers with the node's own and with the kubelet. With another
// driver than the kubelet's, pods don't start, or run outside of the kubelet's cgroups.
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

// compare compares a handler of podfsm with the node's own.
func (s *Stock) compare(h Handler) Finding {
	rewrite := s.File.rewrite()
	switch {
	case h.SystemdCgroup != s.Like.SystemdCgroup:
		return fail(NoPods, fmt.Sprintf("SystemdCgroup = %t, but %t for the node's handler %q", h.SystemdCgroup, s.Like.SystemdCgroup, s.Like.Name),
			fmt.Sprintf("%s, or set SystemdCgroup = %t in the handler's options", rewrite, s.Like.SystemdCgroup))
	case h.Shim != s.Like.Shim || h.Binary != s.Like.Binary:
		return warn(fmt.Sprintf("runtime %s, but %s for the node's handler %q", h.runtime(), s.Like.runtime(), s.Like.Name), rewrite+", unless it is meant to differ")
	default:
		return ok(fmt.Sprintf("SystemdCgroup = %t and runtime %s, as for the node's handler %q", h.SystemdCgroup, h.runtime(), s.Like.Name))
	}
}

func (h Handler) runtime() string { return strings.TrimSpace(h.Shim + " " + h.Binary) }

// runs returns SystemdCgroup of the node's handler in the running containerd.
func (s *Stock) runs() (systemd, known bool) {
	if s.Running == nil {
		return false, false
	}
	systemd, known = s.Running.SystemdCgroup[s.Like.Name]
	return systemd, known
}

// configuredDriver returns cgroupDriver of a KubeletConfiguration; "" if it is not set.
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

// securityModules finds the active security module.
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

// sharedNetworks finds another runtime on the node's networks. CNI GC would delete that runtime's
// attachments, so podfsm doesn't run it.
func sharedNetworks(ctx context.Context, n Node) []Finding {
	const remedy = "remove the other runtime, or give it networks of its own; on a network that both use, set cni_gc = \"off\""
	for _, socket := range n.Stock.Sockets {
		if exists(socket) {
			return []Finding{warn("another container runtime has "+socket, remedy)}
		}
	}
	if n.Stock.Known == nil {
		return down()
	}
	attached, err := n.Stock.Attached()
	if err != nil {
		return []Finding{unknown(err.Error(), "check "+cni.CacheDir())}
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

// uses says whether pods of podfsm's handlers will be on a network; true if that is unknown.
func (n Node) uses(network string) bool {
	if n.Config == nil {
		return true
	}
	return slices.ContainsFunc(n.Config.Handlers, func(h Handler) bool {
		loaded, _ := cni.Load(h.Network) // the check networks reports errors
		return slices.ContainsFunc(loaded, func(one cni.Network) bool { return one.Name == network })
	})
}
