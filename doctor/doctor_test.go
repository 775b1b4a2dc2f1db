package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/internal/roottest"
	"github.com/podfsm/podfsm/userns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// strategies returns the strategies of a node on which only the named ones work.
func strategies(names ...string) func(context.Context, string) ([]Strategy, error) {
	return func(context.Context, string) (all []Strategy, _ error) {
		for _, name := range []string{StrategyIDMap, "metacopy"} {
			s := Strategy{Name: name, Evidence: "no luck", Remedy: "try ext4"}
			if slices.Contains(names, name) {
				s = Strategy{Name: name, Works: true, Evidence: "luck"}
			}
			all = append(all, s)
		}
		return all, nil
	}
}

// wellNode is a node in temporary directories that lacks nothing.
func wellNode(t *testing.T) Node {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o711))
	n := Node{
		Proc: filepath.Join(dir, "proc"), Sys: "/sys", Etc: filepath.Join(dir, "etc"), SystemdDir: filepath.Join(dir, "systemd"),
		Daemon: 7, Root: dir, State: dir, Strategies: strategies(StrategyIDMap, "metacopy"),
		Tmpfs:    func() error { return nil },
		Refusal:  func() error { return nil },
		Draining: func() (time.Time, bool) { return time.Time{}, false },
		Ledger:   func() (Ledger, error) { return Ledger{Dirs: []string{dir}}, nil },
	}
	write(t, n.proc("sys/kernel/osrelease"), "6.18.44-generic\n")
	write(t, n.proc("sys/user/max_user_namespaces"), "15000\n")
	write(t, n.proc("sys/kernel/keys/maxkeys"), "200\n")
	write(t, n.proc("sys/kernel/keys/root_maxkeys"), "1000000\n")
	write(t, n.proc("key-users"), "    0:     9 8/8 3/1000000 40/25000000\n 1000:   100 99/99 99/200 9000/20000\n")
	write(t, n.proc("sys/fs/inotify/max_user_instances"), "8192\n")
	write(t, n.proc("7/status"), "Name:\tcontainerd\nGroups:\t0 \nCapEff:\t000001ffffffffff\n")
	write(t, n.proc("7/oom_score_adj"), "0\n")
	write(t, filepath.Join(n.Etc, "subuid"), "pods:1000000000:655360\n")
	write(t, filepath.Join(n.Etc, "subgid"), "pods:1000000000:655360\n")
	write(t, filepath.Join(dir, "podfsm-init"), "#!/bin/sh\necho podfsm-init of a test protocol 1\n")
	n.Config = &Config{
		InitPath: filepath.Join(dir, "podfsm-init"),
		NetNSDir: filepath.Join(dir, "netns"),
		Handlers: []Handler{{
			Name: "podfsm", Shim: "/bin/true", Binary: "/bin/true", Mode: userns.ModeKubelet,
			Snapshotter: Snapshotter{Name: "overlayfs", Loaded: true, Root: dir, RemapIDs: true},
			Network:     cni.Config{ConfDir: filepath.Join(dir, "net.d"), BinDirs: []string{dir}},
		}},
	}
	return n
}

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

// kubelet makes the cgroups of a kubelet, beside a handler with a driver.
func kubelet(systemd bool, dirs ...string) func(*testing.T, *Node) {
	return func(t *testing.T, n *Node) {
		t.Helper()
		n.Sys = filepath.Join(n.Root, "sys")
		for _, dir := range dirs {
			require.NoError(t, os.MkdirAll(filepath.Join(n.Sys, "fs/cgroup", dir), 0o755))
		}
		require.NoError(t, os.Mkdir(n.SystemdDir, 0o755))
		n.Config.Handlers[0].SystemdCgroup = systemd
	}
}

// Each row is a change of a file or a setting, and the finding of a check.
func TestChecks(t *testing.T) {
	roottest.Require(t)
	without := func(n *Node) { n.Config = nil }
	for _, test := range []struct {
		name     string
		look     func(context.Context, Node) []Finding
		change   func(t *testing.T, n *Node)
		status   Status
		evidence string
		remedy   string
		stops    Pods
	}{
		{name: "kernel", look: kernel, status: OK, evidence: "6.18.44-generic"},
		{name: "kernel too old for idmapped overlays", look: kernel, change: file("sys/kernel/osrelease", "5.15.0-91"), status: Warn, evidence: "5.15.0-91 is older than 5.19", remedy: "upgrade"},
		{name: "kernel of an old major version", look: kernel, change: file("sys/kernel/osrelease", "4.20.1"), status: Warn, evidence: "4.20.1", remedy: "upgrade"},
		{name: "kernel without proc", look: kernel, change: func(_ *testing.T, n *Node) { n.Proc = "/nowhere" }, status: Unknown, evidence: "no such file", remedy: "mount"},
		{name: "user namespaces", look: userNamespaces, status: OK, evidence: "15000, and one could be made"},
		{name: "no user namespaces", look: userNamespaces, change: file("sys/user/max_user_namespaces", "0"), status: Fail, evidence: "max_user_namespaces = 0", remedy: "sysctl -w", stops: UserNSPods},
		{name: "few user namespaces", look: userNamespaces, change: file("sys/user/max_user_namespaces", "100"), status: Warn, evidence: "= 100", remedy: "sysctl -w"},
		{name: "kernel without user namespaces", look: userNamespaces, change: gone("sys/user/max_user_namespaces"), status: Fail, evidence: "no such file", remedy: "CONFIG_USER_NS", stops: UserNSPods},
		{name: "keys", look: keys, status: OK, evidence: "kernel.keys.maxkeys = 200 for each user, root_maxkeys = 1000000"},
		{name: "keys that a node's pods share", look: keys, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Mode = userns.ModeNode }, status: Warn, evidence: "the pods of podfsm share their users", remedy: "sysctl -w kernel.keys.maxkeys="},
		{name: "many keys that a node's pods share", look: keys, change: func(t *testing.T, n *Node) {
			file("sys/kernel/keys/maxkeys", "20000")(t, n)
			n.Config.Handlers[0].Mode = userns.ModeNode
		}, status: OK, evidence: "= 20000"},
		{name: "keys that are nearly used up", look: keys, change: file("key-users", "    0:     9 8/8 3/1000000 40/25000000\n131072:   161 160/160 160/200 9000/20000\n"), status: Warn, evidence: "user 131072 has 160 keys of 9000 bytes", remedy: "kernel.keys.maxkeys="},
		{name: "keys whose bytes are", look: keys, change: file("key-users", " 1000:   100 99/99 99/200 16000/20000\n"), status: Warn, evidence: "user 1000 has 99 keys of 16000 bytes", remedy: "kernel.keys.maxbytes="},
		{name: "keys of root that are", look: keys, change: file("key-users", "    0:     9 8/8 199/200 40/25000000\n"), status: Warn, evidence: "user 0 has 199 keys", remedy: "kernel.keys.root_maxkeys="},
		{name: "few keys of root", look: keys, change: file("sys/kernel/keys/root_maxkeys", "200"), status: Warn, evidence: "root_maxkeys = 200, of which", remedy: "kernel.keys.root_maxkeys="},
		{name: "kernel without keys", look: keys, change: gone("sys/kernel/keys/maxkeys"), status: OK, evidence: "no keys"},
		{name: "keys that can't be read", look: keys, change: file("sys/kernel/keys/maxkeys", "many"), status: Unknown, evidence: "many", remedy: "sysctl"},
		{name: "inotify", look: inotify, status: OK, evidence: "fs.inotify.max_user_instances = 8192"},
		{name: "few inotify instances", look: inotify, change: file("sys/fs/inotify/max_user_instances", "128"), status: Warn, evidence: "= 128, which the node's root and all pods", remedy: "sysctl -w fs.inotify.max_user_instances="},
		{name: "kernel without inotify", look: inotify, change: gone("sys/fs/inotify/max_user_instances"), status: OK, evidence: "no inotify"},
		{name: "pidfd", look: pidfd, status: OK, evidence: "PIDFD_GET_NET_NAMESPACE works"},
		{name: "oom score with the capability", look: oomScore, status: OK, evidence: "CAP_SYS_RESOURCE"},
		{name: "oom score without", look: oomScore, change: file("7/status", "CapEff:\t000001fffeffffff\n"), status: Fail, evidence: "oom_score_adj of 0", remedy: "restrict_oom_score_adj = true"},
		{name: "oom score restricted", look: oomScore, change: func(t *testing.T, n *Node) {
			file("7/status", "CapEff:\t000001fffeffffff\n")(t, n)
			n.Config.RestrictOOMScoreAdj = true
		}, status: OK, evidence: "restrict_oom_score_adj"},
		{name: "oom score of a daemon that is low itself", look: oomScore, change: func(t *testing.T, n *Node) {
			file("7/status", "CapEff:\t000001fffeffffff\n")(t, n)
			file("7/oom_score_adj", "-999\n")(t, n)
		}, status: OK, evidence: "is -999"},
		{name: "supplementary groups for crun", look: supplementaryGroups, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Binary = "crun" }, status: OK, evidence: "groups of process 7: 0"},
		{name: "no supplementary groups for crun", look: supplementaryGroups, change: func(t *testing.T, n *Node) {
			file("7/status", "Groups:\t\n")(t, n)
			n.Config.Handlers[0].Binary = "/usr/bin/crun"
		}, status: Warn, evidence: "/usr/bin/crun", remedy: "SupplementaryGroups=0"},
		{name: "no supplementary groups for runc", look: supplementaryGroups, change: func(t *testing.T, n *Node) {
			file("7/status", "Groups:\t\n")(t, n)
			n.Config.Handlers[0].Binary = "/opt/runc"
		}, status: OK, evidence: "process 7 has no"},
		{name: "cgroups", look: cgroups, change: kubelet(false, "cpu"), status: OK, evidence: "driver cgroupfs"},
		{name: "systemd driver", look: cgroups, change: kubelet(true, "cpu"), status: OK, evidence: "driver systemd"},
		{name: "systemd driver without systemd", look: cgroups, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].SystemdCgroup = true }, status: Fail, evidence: "systemd doesn't run here", remedy: "SystemdCgroup = false"},
		{name: "cgroupfs driver of both", look: cgroups, change: kubelet(false, "cpu/kubepods"), status: OK, evidence: "driver cgroupfs"},
		{name: "systemd driver of both", look: cgroups, change: kubelet(true, "cpu/kubepods.slice"), status: OK, evidence: "driver systemd"},
		{name: "systemd driver of the kubelet alone", look: cgroups, change: kubelet(false, "cpu/kubepods.slice"), status: Warn, evidence: "fs/cgroup/cpu/kubepods.slice", remedy: "SystemdCgroup = true"},
		{name: "systemd driver of a kubelet in a cgroup", look: cgroups, change: kubelet(false, "cpu/kubelet.slice/kubelet-kubepods.slice"), status: Warn, evidence: "kubelet-kubepods.slice", remedy: "SystemdCgroup = true"},
		{name: "systemd driver of the handler alone", look: cgroups, change: kubelet(true, "cpu/kubelet/kubepods"), status: Fail, evidence: "fs/cgroup/cpu/kubelet/kubepods; the handler refuses its pods", remedy: "SystemdCgroup = false"},
		{name: "driver of another node's kubelet", look: cgroups, change: kubelet(true, "cpu/docker/kubepods", "cpu/a/kubelet/kubepods"), status: OK, evidence: "driver systemd"},
		{name: "driver of the kubelet that was changed", look: cgroups, change: kubelet(true, "cpu/kubepods", "cpu/kubepods.slice"), status: OK, evidence: "driver systemd"},
		{name: "systemd driver of the default handler alone", look: cgroups, change: func(t *testing.T, n *Node) {
			kubelet(false, "cpu")(t, n)
			n.Config.CgroupDriver = "systemd"
		}, status: Warn, evidence: "containerd reports", remedy: "SystemdCgroup = true"},
		{name: "cgroupfs driver of the default handler", look: cgroups, change: func(t *testing.T, n *Node) {
			kubelet(true, "cpu")(t, n)
			n.Config.CgroupDriver = "cgroupfs"
		}, status: Fail, evidence: "containerd reports the driver of its default handler; the handler refuses its pods", remedy: "SystemdCgroup = false"},
		{name: "driver of the default handler that the kubelet doesn't take", look: cgroups, change: func(t *testing.T, n *Node) {
			kubelet(false, "cpu/kubepods")(t, n)
			n.Config.CgroupDriver = "systemd"
		}, status: OK, evidence: "driver cgroupfs"},
		{name: "no cgroups", look: cgroups, change: func(_ *testing.T, n *Node) { n.Sys = n.Proc }, status: Fail, evidence: "fs/cgroup", remedy: "mount"},
		{name: "handlers", look: handlers, status: OK, evidence: "podfsm (users by kubelet)"},
		{name: "no handlers", look: handlers, change: func(_ *testing.T, n *Node) { n.Config.Handlers = nil }, status: Warn, evidence: "no runtime handler", remedy: `sandboxer = "podfsm"`},
		{name: "snapshotter", look: snapshotters, status: OK, evidence: "overlayfs"},
		{name: "snapshotter without remap-ids", look: snapshotters, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Snapshotter.RemapIDs = false }, status: Fail, evidence: "remap-ids", remedy: "overlayfs", stops: UserNSPods},
		{name: "snapshotter that isn't loaded", look: snapshotters, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Snapshotter.Loaded = false }, status: Fail, evidence: "isn't loaded", remedy: "ctr plugins ls", stops: AllPods},
		{name: "overlay", look: overlays, status: OK, evidence: "luck in "},
		{name: "overlay without idmap", look: overlays, change: func(_ *testing.T, n *Node) { n.Strategies = strategies("metacopy") }, status: Fail, evidence: "no luck", remedy: "ext4", stops: UserNSPods},
		{name: "overlay without idmap, where it isn't needed", look: overlays, change: func(_ *testing.T, n *Node) {
			n.Strategies = strategies("metacopy")
			n.Config.Handlers[0].Snapshotter.Name = ownSnapshotter
		}, status: Warn, evidence: "no luck", remedy: "ext4"},
		{name: "overlay without any strategy, where one is needed", look: overlays, change: func(_ *testing.T, n *Node) {
			n.Strategies = strategies()
			n.Config.Handlers[0].Snapshotter.Name = ownSnapshotter
		}, status: Fail, evidence: "no luck", remedy: "ext4", stops: UserNSPods},
		{name: "overlay of a directory that can't be written", look: overlays, change: func(_ *testing.T, n *Node) {
			n.Strategies = func(context.Context, string) ([]Strategy, error) { return nil, errors.New("no luck") }
		}, status: Unknown, evidence: "no luck", remedy: "can be written"},
		{name: "tmpfs", look: tmpfs, status: OK, evidence: "mapped ids"},
		{name: "tmpfs before Linux 6.3", look: tmpfs, change: oldTmpfs(userns.ModeKubelet), status: Warn, evidence: "tmpfs: invalid argument", remedy: "6.3 or later; until then set automountServiceAccountToken: false", stops: TmpfsPods},
		{name: "tmpfs before Linux 6.3, mode auto", look: tmpfs, change: oldTmpfs(userns.ModeAuto), status: Fail, evidence: "service account token", remedy: "6.3 or later, or set mode = \"kubelet\"", stops: TmpfsPods},
		{name: "tmpfs before Linux 6.3, mode node", look: tmpfs, change: oldTmpfs(userns.ModeNode), status: Fail, evidence: "service account token", remedy: "6.3 or later, or set mode = \"kubelet\"", stops: TmpfsPods},
		{name: "tmpfs before Linux 6.3, configuration that isn't known", look: tmpfs, change: func(t *testing.T, n *Node) {
			oldTmpfs(userns.ModeKubelet)(t, n)
			without(n)
		}, status: Warn, evidence: "tmpfs: invalid argument", remedy: "6.3", stops: TmpfsPods},
		{name: "tmpfs that can't be mounted", look: tmpfs, change: func(_ *testing.T, n *Node) { n.Tmpfs = func() error { return unix.EPERM } }, status: Unknown, evidence: "not permitted", remedy: "keeps root"},
		{name: "runtime that prints nothing", look: runtimes, status: Fail, evidence: "can't be read", remedy: "install runc", stops: UserNSPods},
		{name: "runtime that is missing", look: runtimes, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Binary = "/nowhere/runc" }, status: Fail, evidence: "/nowhere/runc", remedy: "BinaryName", stops: AllPods},
		{name: "shim that is missing", look: runtimes, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Shim = "io.containerd.nowhere.v9" }, status: Fail, evidence: "containerd-shim-nowhere-v9", remedy: "install the shim", stops: AllPods},
		{name: "shim of another runtime", look: runtimes, change: func(_ *testing.T, n *Node) { n.Config.Handlers[0].Binary = "" }, status: Unknown, evidence: "/bin/true", remedy: "documentation"},
		{name: "directories", look: directories, status: OK, evidence: "all users can traverse"},
		{name: "closed directories", look: directories, change: func(t *testing.T, n *Node) {
			n.State = filepath.Join(n.State, "state")
			require.NoError(t, os.Mkdir(n.State, 0o700))
			require.NoError(t, os.Chmod(n.Root, 0o750))
		}, status: Fail, evidence: "has mode 0750, ", remedy: "chmod o+x ", stops: UserNSPods},
		{name: "no pool", look: idPool, status: OK, evidence: "no pool"},
		{name: "pool of a user", look: idPool, change: pool("pods"), status: OK, evidence: "655360 uids and 655360 gids"},
		{name: "pool of nobody", look: idPool, change: pool("nobody-here"), status: Fail, evidence: `"nobody-here"`, remedy: "at least 65536 ids"},
		{name: "ledger that isn't there yet", look: ledger, status: OK, evidence: "no ledger yet"},
		{name: "ledger on a disk", look: ledger, change: func(t *testing.T, n *Node) {
			file := filepath.Join(n.Root, "ledger.log")
			write(t, file, "content")
			n.State = "/proc"
			n.Ledger = func() (Ledger, error) { return Ledger{Files: []string{file}}, nil }
		}, status: OK, evidence: "ledger.log has 7B; the state directory is not on a tmpfs"},
		{name: "ledger on a tmpfs", look: ledger, change: func(_ *testing.T, n *Node) {
			n.State = "/dev/shm"
			n.Ledger = func() (Ledger, error) { return Ledger{Files: []string{"/dev/null"}}, nil }
		}, status: OK, evidence: "the state directory is on a tmpfs"},
		{name: "ledger that can't be opened", look: ledger, change: ledgerWith(Ledger{}, errors.New("no luck")), status: Fail, evidence: "no luck", remedy: "damaged"},
		{name: "ledger that is damaged", look: ledger, change: ledgerWith(Ledger{Damaged: []Damaged{{"/x/ledger.log", "bad sum"}}}, nil), status: Warn, evidence: "/x/ledger.log: bad sum", remedy: "start containerd"},
		{name: "ledger that was damaged", look: ledger, change: ledgerWith(Ledger{Damaged: []Damaged{{"/x/ledger.log.damaged-3", ""}}}, nil), status: Warn, evidence: "damaged: /x/ledger.log.damaged-3", remedy: "rm /x/ledger.log.damaged-3"},
		{name: "pending cleanups", look: pendingCleanups, change: ledgerWith(Ledger{Pending: 3}, nil), status: Warn, evidence: "pending cleanup: 3", remedy: "podfsm cleanups"},
		{name: "podfsm that is degraded", look: controller, change: func(_ *testing.T, n *Node) { n.Refusal = func() error { return errors.New("bad option") } }, status: Fail, evidence: "bad option", remedy: "restart containerd"},
		{name: "podfsm that is being drained", look: controller, change: func(_ *testing.T, n *Node) {
			n.Draining = func() (time.Time, bool) { return time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), true }
		}, status: Fail, evidence: "draining since 2026-03-01T12:00:00Z", remedy: "podfsm drain --cancel"},
		{name: "podfsm that is down", look: controller, change: func(_ *testing.T, n *Node) { n.Refusal = nil }, status: Unknown, evidence: "down", remedy: "start containerd"},
		{name: "configuration that isn't known", look: runtimes, change: func(_ *testing.T, n *Node) { without(n) }, status: Unknown, evidence: "configuration", remedy: "start containerd"},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := wellNode(t)
			if test.change != nil {
				test.change(t, &n)
			}
			found := test.look(t.Context(), n)
			require.NotEmpty(t, found)
			require.Equal(t, test.status, found[0].Status, "%v", found)
			require.Contains(t, found[0].Evidence, test.evidence)
			require.Contains(t, found[0].Remedy, test.remedy)
			require.Equal(t, test.remedy == "", found[0].Remedy == "")
			require.Equal(t, test.stops, found[0].Stops)
		})
	}
}

// file has another content in a file below /proc.
func file(path, content string) func(*testing.T, *Node) {
	return func(t *testing.T, n *Node) { write(t, n.proc(path), content) }
}

// gone is no file below /proc.
func gone(path string) func(*testing.T, *Node) {
	return func(t *testing.T, n *Node) { require.NoError(t, os.Remove(n.proc(path))) }
}

// oldTmpfs is a kernel that doesn't map tmpfs, with a handler of a mode.
func oldTmpfs(mode userns.Mode) func(*testing.T, *Node) {
	return func(_ *testing.T, n *Node) {
		n.Tmpfs = func() error { return &userns.UnmappableError{Filesystem: userns.Tmpfs, Err: unix.EINVAL} }
		n.Config.Handlers[0].Mode = mode
	}
}

func pool(user string) func(*testing.T, *Node) {
	return func(_ *testing.T, n *Node) { n.Config.Pool, n.Config.PoolUser = true, user }
}

func ledgerWith(l Ledger, err error) func(*testing.T, *Node) {
	return func(_ *testing.T, n *Node) { n.Ledger = func() (Ledger, error) { return l, err } }
}

// All strategies work on this machine, as the tests of pods need. On a filesystem without them,
// they are reported.
func TestStrategies(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	tried, err := TryStrategies(t.Context(), dir)
	require.NoError(t, err)
	require.Len(t, tried, 3)
	for _, s := range tried {
		require.True(t, s.Works, "%v", s)
	}
	_, err = TryStrategies(t.Context(), "/proc")
	require.ErrorContains(t, err, "failed to make a directory in /proc")
	_, err = TryStrategies(t.Context(), "/nowhere")
	require.ErrorContains(t, err, "/nowhere")

	killed := filepath.Join(dir, tryDir+"2000000000-1") // no pid is as high
	running := filepath.Join(dir, tryDir+"1-1")
	for _, d := range []string{killed, running} {
		require.NoError(t, os.MkdirAll(filepath.Join(d, "lower"), 0o755))
	}
	_, err = TryStrategies(t.Context(), dir)
	require.NoError(t, err)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, filepath.Base(running), left[0].Name())
}

// A pod is refused only for what it needs, and runs once the node is repaired.
func TestAdmit(t *testing.T) {
	roottest.Require(t)
	n := wellNode(t)
	n.Config.Handlers = append(n.Config.Handlers, Handler{Name: "other", Shim: "/bin/true", Binary: "/nowhere", Snapshotter: n.Config.Handlers[0].Snapshotter})
	n.Strategies = strategies("metacopy")
	features := filepath.Join(n.Root, "runc")
	write(t, features, `#!/bin/sh
echo '{"linux": {"namespaces": ["user", "network"], "mountExtensions": {"idmap": {"enabled": true}}}}'`)
	require.NoError(t, os.Chmod(features, 0o755))
	n.Config.Handlers[0].Binary = features
	d := New(n)
	defer d.Close()
	d.Examine(t.Context())

	require.True(t, d.Failed()["runtime"])
	require.True(t, d.Failed()["overlay"])
	require.False(t, d.Failed()["ledger"])
	require.Len(t, d.Failed(), len(checks))

	hostUsers := Need{Handler: "podfsm"}
	mapped := Need{Handler: "podfsm", UserNS: true}
	require.NoError(t, d.Admit(t.Context(), hostUsers))
	err := d.Admit(t.Context(), mapped)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "overlay idmap: no luck in "+n.Root+"; try ext4")
	err = d.Admit(t.Context(), Need{Handler: "other"})
	require.ErrorContains(t, err, "runtime other", "another handler's runtime stops no pods of this one")

	d.node.Strategies = strategies(StrategyIDMap)
	require.NoError(t, d.Admit(t.Context(), mapped))
	require.False(t, d.Failed()["overlay"], "it was made again")

	oldTmpfs(userns.ModeAuto)(t, &d.node)
	d.Examine(t.Context())
	require.NoError(t, d.Admit(t.Context(), mapped), "it may have no volume on tmpfs; its containers are looked at")
}

// A check that hangs doesn't block an examination, and never runs twice at a time.
func TestHangingCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release, looks := make(chan struct{}), atomic.Int32{}
		d := New(Node{})
		c := check{"hanging", func(context.Context, Node) []Finding {
			looks.Add(1)
			<-release
			return []Finding{ok("at last")}
		}}
		for range 3 {
			begun := time.Now()
			found := d.run(t.Context(), c)
			require.Equal(t, checkTimeout, time.Since(begun))
			require.Equal(t, Unknown, found[0].Status)
			require.Equal(t, "hanging", found[0].Check)
		}
		require.EqualValues(t, 1, looks.Load())

		begun := time.Now()
		time.AfterFunc(time.Second, d.Close)
		require.Equal(t, Unknown, d.run(t.Context(), c)[0].Status)
		require.Equal(t, time.Second, time.Since(begun), "the end of containerd isn't kept waiting")
		close(release)
		synctest.Wait()
		require.Equal(t, "at last", d.known[c.name][0].Evidence)
	})
}

// A check that panics is Unknown.
func TestPanickingCheck(t *testing.T) {
	d := New(Node{})
	defer d.Close()
	found := d.run(t.Context(), check{"bad", func(context.Context, Node) []Finding { panic("oh") }})
	require.Equal(t, Unknown, found[0].Status)
	require.Contains(t, found[0].Evidence, "oh")
}

// The first pods after a start wait for the first examination, for at most firstWait.
func TestFirstPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(Node{})
		defer d.Close()
		begun := time.Now()
		require.NoError(t, d.Admit(t.Context(), Need{}))
		require.Equal(t, firstWait, time.Since(begun))
		require.NoError(t, d.Admit(t.Context(), Need{}))
		require.Equal(t, firstWait, time.Since(begun))
	})
}

// An operator finds every check on one page.
func TestChecksAreInTheDocs(t *testing.T) {
	docs, err := os.ReadFile("../docs/reference/doctor.md")
	require.NoError(t, err)
	for _, c := range slices.Concat(stockChecks, checks) {
		require.Contains(t, string(docs), "\n| `"+c.name+"` | ")
	}
}

// v2 has no hierarchies between the mount and the kubelet's cgroups.
func TestKubeletDriver(t *testing.T) {
	for dir, want := range map[string]string{
		"kubepods.slice": "systemd", "kubepods": "cgroupfs", "kubelet/kubepods": "cgroupfs", "kubelet.slice/kubelet-kubepods.slice": "systemd",
		"docker/kubepods": "", "system.slice": "",
	} {
		n := wellNode(t)
		kubelet(false, dir)(t, &n)
		driver, _ := n.kubeletDriver(v2)
		require.Equal(t, want, driver, dir)
	}
}

// A mount over pins of pods is reported with a remedy that affects no other mounts. Other
// namespaces may be covered on purpose.
func TestCoveredPins(t *testing.T) {
	roottest.Require(t)
	mount := func(t *testing.T, source, target, kind string, flags uintptr) {
		require.NoError(t, unix.Mount(source, target, kind, flags, ""))
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	}
	for name, tc := range map[string]struct {
		pin, evidence, remedy string
	}{
		"of a pod":            {"podfsm-s1", "covers pins of pods (1), such as podfsm-s1", "umount "},
		"of a stock pod":      {pin: "cni-1b0f3c52-7a39-4cf5-8d9e-0a4f2a4b7f11"},
		"of \"ip netns add\"": {pin: "blue"},
	} {
		t.Run(name, func(t *testing.T) {
			n := wellNode(t)
			require.NoError(t, os.Mkdir(n.Config.NetNSDir, 0o755))
			mount(t, "pins", n.Config.NetNSDir, "tmpfs", 0)
			require.NoError(t, unix.Mount("", n.Config.NetNSDir, "", unix.MS_PRIVATE, ""))
			pin := filepath.Join(n.Config.NetNSDir, tc.pin)
			write(t, pin, "")
			mount(t, "/proc/self/ns/net", pin, "", unix.MS_BIND)
			mount(t, "cover", n.Config.NetNSDir, "tmpfs", 0)
			found := netNSDirectory(t.Context(), n)
			require.Len(t, found, 1)
			if tc.evidence == "" {
				require.NotContains(t, found[0].Evidence, "covers")
				return
			}
			require.Equal(t, Warn, found[0].Status)
			require.Contains(t, found[0].Evidence, tc.evidence)
			require.Equal(t, tc.remedy+n.Config.NetNSDir, found[0].Remedy)
		})
	}
}
