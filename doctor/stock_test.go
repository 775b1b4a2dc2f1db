package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/internal/roottest"
)

// stockNode is a node with a containerd that podfsm could replace at once.
func stockNode(t *testing.T) Node {
	t.Helper()
	n := wellNode(t)
	n.Sys = filepath.Join(n.Root, "sys")
	dir := filepath.Join(n.Etc, "containerd")
	like := n.Config.Handlers[0]
	like.Name = "runc"
	n.Stock = &Stock{
		Version: "v2.4.2", Wanted: "v2.4.5", Program: "/usr/bin/containerd-podfsm",
		File:     ConfigFile{Path: filepath.Join(dir, "config.toml"), Version: 3, Imports: []string{"conf.d/*.toml"}, DropIn: filepath.Join(dir, "conf.d/podfsm.toml")},
		Like:     like,
		Running:  &Running{Root: n.Root, SystemdCgroup: map[string]bool{"runc": false}},
		Kubelet:  filepath.Join(n.Root, "kubelet.yaml"),
		Attached: func() (map[string][]cni.Attached, error) { return nil, nil },
		Known:    func(context.Context) (map[string]bool, error) { return map[string]bool{"c1": true}, nil },
	}
	require.NoError(t, os.Mkdir(n.SystemdDir, 0o755))
	return n
}

// has changes what is known of the containerd.
func has(change func(s *Stock)) func(*testing.T, *Node) {
	return func(_ *testing.T, n *Node) { change(n.Stock) }
}

// isDown is a containerd that doesn't run.
func isDown(_ *testing.T, n *Node) {
	n.Daemon, n.Stock.Version, n.Stock.Running, n.Stock.Known = 0, "", nil, nil
}

// planned is a node whose configuration has no handler of podfsm.
func planned(_ *testing.T, n *Node) { n.Config.Handlers[0].Planned = true }

// Each row is a node before podfsm is installed, and the last finding of a check.
func TestStockChecks(t *testing.T) {
	for _, test := range []struct {
		name     string
		look     func(context.Context, Node) []Finding
		change   func(t *testing.T, n *Node)
		status   Status
		evidence string
		remedy   string
	}{
		{name: "same containerd", look: stockVersion, status: OK, evidence: "containerd v2.4.2 runs, containerd-podfsm is v2.4.5"},
		{name: "containerd without a v", look: stockVersion, change: has(func(s *Stock) { s.Version = "2.4.0~ds1" }), status: OK, evidence: "2.4.0~ds1 runs"},
		{name: "older containerd", look: stockVersion, change: has(func(s *Stock) { s.Version = "1.7.24" }), status: Warn, evidence: "the switch is an upgrade", remedy: "upgrade the node's own containerd to 2.4 first"},
		{name: "containerd of a minor before", look: stockVersion, change: has(func(s *Stock) { s.Version = "v2.3.9" }), status: Warn, evidence: "the switch is an upgrade", remedy: "to 2.4 first"},
		{name: "newer containerd", look: stockVersion, change: has(func(s *Stock) { s.Version = "v2.10.0" }), status: Warn, evidence: "downgrade", remedy: "a later one"},
		{name: "containerd of no version", look: stockVersion, change: has(func(s *Stock) { s.Version = "devel" }), status: Unknown, evidence: `"devel"`, remedy: "compare"},
		{name: "containerd that is down", look: stockVersion, change: isDown, status: Unknown, evidence: "down", remedy: "compare"},

		{name: "configuration", look: configuration, status: OK, evidence: "(version 3) imports conf.d/*.toml"},
		{name: "configuration without containerd-podfsm", look: configuration, change: has(func(s *Stock) { s.Program = "" }), status: Fail, evidence: "no containerd-podfsm", remedy: "install the package"},
		{name: "configuration that can't be read", look: configuration, change: has(func(s *Stock) { s.File.Err = errors.New("bad line 7") }), status: Fail, evidence: "bad line 7", remedy: "doesn't start"},
		{name: "no configuration", look: configuration, change: has(func(s *Stock) { s.File.Missing = true }), status: Fail, evidence: "reads no drop-ins", remedy: "/usr/bin/containerd-podfsm config default >"},
		{name: "configuration before the package", look: configuration, change: planned, status: Warn, evidence: "podfsm's handler isn't there yet", remedy: "the package brings it as "},
		{name: "configuration without a handler", look: configuration, change: func(t *testing.T, n *Node) {
			planned(t, n)
			write(t, n.Stock.File.DropIn, "")
		}, status: Fail, evidence: "no runtime handler there", remedy: "podfsm handler --write "},
		{name: "configuration that imports nothing", look: configuration, change: func(t *testing.T, n *Node) {
			planned(t, n)
			n.Stock.File.Imports = nil
		}, status: Fail, evidence: "imports nothing", remedy: `imports = ["`},
		{name: "configuration that imports other files", look: configuration, change: func(t *testing.T, n *Node) {
			planned(t, n)
			n.Stock.File.Imports = []string{"/etc/containerd/other/*.toml", "conf.d/*.conf"}
		}, status: Fail, evidence: "imports /etc/containerd/other/*.toml, conf.d/*.conf", remedy: `imports = ["/etc/containerd/other/*.toml", "conf.d/*.conf", "/`},
		{name: "configuration without CRI", look: configuration, change: has(func(s *Stock) { s.File.NoCRI = true }), status: Fail, evidence: "disables containerd's CRI service", remedy: "disabled_plugins"},
		{name: "configuration of another containerd", look: configuration, change: has(func(s *Stock) { s.Running.Root = "/data" }), status: Warn, evidence: `has "/data"`, remedy: "or restart the node's own containerd before podfsm's package is installed"},
		{name: "configuration of a containerd that is down", look: configuration, change: isDown, status: OK, evidence: "imports"},

		{name: "service", look: service, status: OK, evidence: "without flags"},
		{name: "service with flags", look: service, change: has(func(s *Stock) { s.Args = []string{"--config", "/x.toml"} }), status: Warn, evidence: "flags that the package's drop-in doesn't have: --config /x.toml", remedy: "ExecStart=/usr/bin/containerd-podfsm --config /x.toml"},
		{name: "service with a limit", look: service, change: pidsMax("4915"), status: OK, evidence: "TasksMax=4915, which the package's drop-in lifts"},
		{name: "service with a limit, in a container", look: service, change: func(t *testing.T, n *Node) {
			pidsMax("4915")(t, n)
			cgroupMounts(t, n, "/docker/1")
			write(t, n.proc("7/cgroup"), "4:pids:/docker/1/system.slice/containerd.service\n")
		}, status: OK, evidence: "TasksMax=4915"},
		{name: "service with a limit on cgroup v2", look: service, change: func(t *testing.T, n *Node) {
			cgroupMounts(t, n, "/")
			write(t, n.proc("7/cgroup"), "0::/system.slice/containerd.service\n")
			write(t, filepath.Join(n.Sys, "fs/cgroup/system.slice/containerd.service/pids.max"), "4915\n")
		}, status: OK, evidence: "TasksMax=4915"},
		{name: "service without a limit", look: service, change: pidsMax("max"), status: OK, evidence: "without a limit"},
		{name: "service whose process can't be read", look: service, change: has(func(s *Stock) { s.Unread = errors.New("no answer") }), status: Unknown, evidence: "no answer", remedy: "systemctl cat containerd"},
		{name: "no systemd", look: service, change: func(t *testing.T, n *Node) { require.NoError(t, os.Remove(n.SystemdDir)) }, status: Warn, evidence: "systemd doesn't run here", remedy: "the same flags"},
		{name: "no systemd, and a limit", look: service, change: func(t *testing.T, n *Node) {
			require.NoError(t, os.Remove(n.SystemdDir))
			pidsMax("4915")(t, n)
		}, status: Warn, evidence: "pids.max = 4915", remedy: "raise it"},
		{name: "service that is down", look: service, change: isDown, status: Unknown, evidence: "down", remedy: "start"},

		{name: "cgroup driver", look: cgroupDriver, status: OK, evidence: `SystemdCgroup = false and runtime /bin/true /bin/true, as for the node's handler "runc"`},
		{name: "cgroup driver that differs", look: cgroupDriver, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].SystemdCgroup = true }, status: Fail, evidence: `SystemdCgroup = true, but false for the node's handler "runc"`, remedy: "set SystemdCgroup = false"},
		{name: "runtime that differs", look: cgroupDriver, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Binary = "crun" }, status: Warn, evidence: "/bin/true crun", remedy: "unless it is meant to differ"},
		{name: "no handler of the node's", look: cgroupDriver, change: has(func(s *Stock) { s.Like = Handler{} }), status: Unknown, evidence: "no runtime handler of its own", remedy: "cgroupDriver"},
		{name: "configuration that isn't read yet", look: cgroupDriver, change: has(func(s *Stock) { s.Running.SystemdCgroup["runc"] = true }), status: Warn, evidence: "runs has SystemdCgroup = true", remedy: "before podfsm's package is installed; once the package is installed, every restart is the switch"},
		{name: "kubelet that agrees", look: cgroupDriver, change: kubeletConfig("cgroupDriver: cgroupfs\n"), status: OK, evidence: "as for the node's handler"},
		{name: "kubelet that says nothing", look: cgroupDriver, change: kubeletConfig("kind: KubeletConfiguration\n"), status: OK, evidence: "as for the node's handler"},
		{name: "kubelet that differs", look: cgroupDriver, change: kubeletConfig("cgroupDriver: systemd\n"), status: Warn, evidence: "says cgroupDriver: systemd", remedy: "make them agree"},
		{name: "kubelet that can't be read", look: cgroupDriver, change: kubeletConfig("}"), status: Unknown, evidence: "kubelet.yaml", remedy: "cgroupDriver"},
		{name: "cgroup driver, configuration that isn't known", look: cgroupDriver, change: func(_ *testing.T, n *Node) { n.Config = nil }, status: Unknown, evidence: "isn't known", remedy: "the check configuration"},

		{name: "no security module", look: securityModules, status: OK, evidence: "neither"},
		{name: "AppArmor", look: securityModules, change: inSys("module/apparmor/parameters/enabled", "Y\n"), status: OK, evidence: "AppArmor is on"},
		{name: "AppArmor that is off", look: securityModules, change: inSys("module/apparmor/parameters/enabled", "N\n"), status: OK, evidence: "neither"},
		{name: "SELinux", look: securityModules, change: inSys("fs/selinux/enforce", "1"), status: Warn, evidence: "SELinux is enforcing", remedy: "ausearch"},
		{name: "SELinux that only tells", look: securityModules, change: inSys("fs/selinux/enforce", "0"), status: Warn, evidence: "SELinux is permissive", remedy: "ausearch"},

		{name: "networks of its own", look: sharedNetworks, status: OK, evidence: "no other"},
		{name: "attachments of its own", look: sharedNetworks, change: attached("pods", "c1"), status: OK, evidence: "no other"},
		{name: "attachments of another runtime", look: sharedNetworks, change: attached("pods", "c2"), status: Warn, evidence: `attachment of "c2" to network "pods"`, remedy: "cni_gc"},
		{name: "attachments of another runtime, to another network", look: sharedNetworks, change: attached("others", "c2"), status: OK, evidence: "no other"},
		{name: "another runtime's socket", look: sharedNetworks, change: has(func(s *Stock) { s.Sockets = []string{"/nowhere", "/dev/null"} }), status: Warn, evidence: "/dev/null", remedy: "networks of its own"},
		{name: "shared networks, containerd down", look: sharedNetworks, change: isDown, status: Unknown, evidence: "down", remedy: "start"},
		{name: "attachments that can't be read", look: sharedNetworks, change: has(func(s *Stock) {
			s.Attached = func() (map[string][]cni.Attached, error) { return nil, errors.New("no luck") }
		}), status: Unknown, evidence: "no luck", remedy: "check /"},
		{name: "containers that can't be listed", look: sharedNetworks, change: has(func(s *Stock) {
			s.Known = func(context.Context) (map[string]bool, error) { return nil, errors.New("no luck") }
		}), status: Unknown, evidence: "no luck", remedy: "try again"},

		{name: "podfsm that isn't installed", look: controller, status: OK, evidence: "not installed yet"},
		{name: "podfsm that was drained", look: controller, change: func(_ *testing.T, n *Node) {
			n.Draining = func() (time.Time, bool) { return time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), true }
		}, status: Warn, evidence: "was drained at 2026-03-01T12:00:00Z", remedy: "podfsm drain --cancel"},
		{name: "handler that isn't configured", look: handlers, change: planned, status: OK, evidence: "podfsm (not configured yet, users by kubelet)"},
		{name: "shim in containerd's PATH", look: runtimes, change: func(t *testing.T, n *Node) {
			n.Path = "/nowhere:" + n.Root
			write(t, filepath.Join(n.Root, "containerd-shim-here-v2"), "#!/bin/sh\n")
			require.NoError(t, os.Chmod(filepath.Join(n.Root, "containerd-shim-here-v2"), 0o755))
			n.Config.Handlers[0].Shim, n.Config.Handlers[0].Binary = "io.containerd.here.v2", ""
		}, status: Unknown, evidence: "io.containerd.here.v2 are unknown", remedy: "documentation"},
		{name: "shim that isn't in containerd's PATH", look: runtimes, change: func(_ *testing.T, n *Node) {
			n.Path = "/nowhere"
			n.Config.Handlers[0].Shim = "io.containerd.here.v2"
		}, status: Fail, evidence: `"containerd-shim-here-v2": executable file not found`, remedy: "install the shim"},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := stockNode(t)
			write(t, filepath.Join(n.Root, "net.d/1.conflist"), `{"name":"pods","cniVersion":"1.1.0","plugins":[{"type":"x"}]}`)
			if test.change != nil {
				test.change(t, &n)
			}
			found := test.look(t.Context(), n)
			require.NotEmpty(t, found)
			last := found[len(found)-1]
			require.Equal(t, test.status, last.Status, "%v", found)
			require.Contains(t, last.Evidence, test.evidence)
			require.Contains(t, last.Remedy, test.remedy)
			require.Equal(t, test.remedy == "", last.Remedy == "")
		})
	}
}

// A check of a directory makes neither the directory nor its parents.
func TestDirectoriesAreNotMade(t *testing.T) {
	roottest.Require(t)
	n := stockNode(t)
	n.Config.NetNSDir = filepath.Join(n.Root, "not/there")
	n.Ledger = func() (Ledger, error) { return Ledger{Dirs: []string{filepath.Join(n.Root, "nor/here")}}, nil }
	n.Config.Handlers[0].Snapshotter.Root = filepath.Join(n.Root, "nor/there")
	found := netNSDirectory(t.Context(), n)
	require.Contains(t, []Status{OK, Warn}, found[0].Status, "this machine's mounts may be private: %v", found)
	require.Contains(t, found[0].Evidence+found[0].Remedy, n.Root)
	for _, f := range append(diskSpace(t.Context(), n), overlays(t.Context(), n)...) {
		require.Equal(t, OK, f.Status, "%v", f)
		require.Contains(t, f.Evidence, n.Root)
	}
	for _, dir := range []string{"not", "nor"} {
		require.NoDirExists(t, filepath.Join(n.Root, dir))
	}
}

// pidsMax limits the processes of containerd's cgroup.
func pidsMax(limit string) func(*testing.T, *Node) {
	return func(t *testing.T, n *Node) {
		cgroupMounts(t, n, "/")
		write(t, n.proc("7/cgroup"), "4:pids:/system.slice/containerd.service\n1:name=systemd:/x\n0::/system.slice/containerd.service\n")
		write(t, filepath.Join(n.Sys, "fs/cgroup/pids/system.slice/containerd.service/pids.max"), limit+"\n")
	}
}

// cgroupMounts has the hierarchies mounted with a root.
func cgroupMounts(t *testing.T, n *Node, root string) {
	t.Helper()
	write(t, n.proc("self/mountinfo"), fmt.Sprintf("30 25 0:26 %s /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n"+
		"31 25 0:27 %s /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n", root, root))
}

func kubeletConfig(config string) func(*testing.T, *Node) {
	return func(t *testing.T, n *Node) { write(t, n.Stock.Kubelet, config) }
}

func inSys(path, content string) func(*testing.T, *Node) {
	return func(t *testing.T, n *Node) { write(t, filepath.Join(n.Sys, path), content) }
}

// attached has a container in libcni's record of a network.
func attached(network, id string) func(*testing.T, *Node) {
	return has(func(s *Stock) {
		s.Attached = func() (map[string][]cni.Attached, error) {
			return map[string][]cni.Attached{network: {{ContainerID: id, IfName: "eth0"}}}, nil
		}
	})
}

// The stock checks are made only before podfsm is installed.
func TestStockChecksAreMadeBefore(t *testing.T) {
	for stock, want := range map[bool]int{false: 0, true: 1} {
		t.Run(fmt.Sprint(stock), func(t *testing.T) {
			n := stockNode(t)
			if !stock {
				n.Stock = nil
			}
			d := New(n)
			defer d.Close()
			count := map[string]int{}
			for _, f := range d.Examine(t.Context()) {
				count[f.Check]++
			}
			require.Equal(t, want, count["containerd"])
			require.Equal(t, 1, count["kernel"])
		})
	}
}
