package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/cgroups"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var attacks = []attack{
	{
		name: "release agent of a new hierarchy",
		args: func(a *attacker) []string { return a.agentArgs("agent-of-new-hierarchy", a.hierarchy+"-new") },
		bites: func(t *testing.T, a *attacker) {
			requireLoot(t, a)
			a.endHierarchy(t, a.hierarchy+"-new")
		},
		fails:   "EPERM mount",
		control: inCgroupNamespace("EPERM mount"),
	},
	{
		name:   "release agent of the host's hierarchy",
		before: func(t *testing.T, a *attacker) { a.giveHierarchy(t, 0) },
		args:   func(a *attacker) []string { return a.agentArgs("agent-of-host-hierarchy", a.hierarchy) },
		bites:  requireLoot,
		fails:  "EACCES open",
	},
	// CVE-2022-0492 left only the user namespace as a barrier: every file is the attacker's own.
	{
		name:   "release agent of the host's hierarchy, given to the pod",
		before: func(t *testing.T, a *attacker) { a.giveHierarchy(t, int(idOf(t, a.pid))) },
		args:   func(a *attacker) []string { return a.agentArgs("agent-of-host-hierarchy", a.hierarchy) },
		bites:  requireLoot,
		fails:  "EPERM write",
	},

	{
		name:   "another pod's file, in a volume",
		before: giveToOwner,
		args:   func(*attacker) []string { return []string{"open-file", "/stuff/secret"} },
		fails:  "EACCES open",
	},
	{
		name:   "another pod's file, without its permission",
		before: giveToOwner,
		args:   func(*attacker) []string { return []string{"chown-file", "/stuff/secret"} },
		fails:  "EPERM chown",
	},
	{
		name:      "another pod's file, past its mounts",
		before:    giveToOwner,
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"open-file", a.stuff("secret")} },
		fails:     "EACCES open",
		sharesIDs: done,
	},
	{
		name:      "another pod's root directory",
		brokenOut: true,
		args: func(a *attacker) []string {
			return []string{"open-file", fmt.Sprintf("/proc/%d/root/etc/passwd", a.neighbour)}
		},
		fails: "EACCES open",
	},
	{
		name:      "the host's file",
		brokenOut: true,
		before: func(t *testing.T, a *attacker) {
			require.NoError(t, os.WriteFile(a.stuff("secret"), []byte("secret"), 0o600))
			require.NoError(t, os.Chown(a.stuff("secret"), 0, 0))
		},
		args:  func(a *attacker) []string { return []string{"open-file", a.stuff("secret")} },
		fails: "EACCES open",
	},
	{
		name:  "the host's file, by its handle",
		args:  func(*attacker) []string { return []string{"open-by-handle", "/stuff"} },
		fails: "EPERM open_by_handle_at",
	},
	{
		name:      "the host's settings",
		brokenOut: true,
		args:      func(*attacker) []string { return []string{"open-file", "/proc/sys/kernel/core_pattern"} },
		fails:     "EACCES open",
	},

	{
		name:      "signal to another pod",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"stop-process", fmt.Sprint(a.neighbour)} },
		bites:     func(t *testing.T, a *attacker) { requireStopped(t, a.neighbour) },
		fails:     "EPERM kill",
		sharesIDs: done,
	},
	{
		name:      "signal to the host",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"stop-process", fmt.Sprint(a.process.Process.Pid)} },
		bites:     func(t *testing.T, a *attacker) { requireStopped(t, a.process.Process.Pid) },
		fails:     "EPERM kill",
	},
	{
		name:      "ptrace of another pod",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"trace-process", fmt.Sprint(a.neighbour)} },
		fails:     "EPERM ptrace",
	},
	{
		name:      "ptrace of the host",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"trace-process", fmt.Sprint(a.process.Process.Pid)} },
		fails:     "EPERM ptrace",
	},
	{
		name:      "memory of another pod",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"read-memory", fmt.Sprint(a.neighbour)} },
		fails:     "EPERM process_vm_readv",
	},
	{
		name:      "memory of the host",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"read-memory", fmt.Sprint(a.process.Process.Pid)} },
		fails:     "EPERM process_vm_readv",
	},

	{
		name:    "module",
		args:    func(*attacker) []string { return []string{"load-module"} },
		fails:   onModularKernel("EPERM init_module"),
		control: onModularKernel("ENOEXEC init_module"), // it is allowed to, but what it brings is no module
	},
	{
		name:  "BPF program",
		args:  func(*attacker) []string { return []string{"load-program"} },
		fails: "EPERM bpf",
	},

	{
		name:  "mount of the host's device",
		args:  func(a *attacker) []string { return []string{"mount-device", a.device, "lost+found"} },
		fails: "EPERM mount",
	},
	{
		name: "node for the host's device",
		args: func(a *attacker) []string {
			var stat unix.Stat_t
			if err := unix.Stat(a.device, &stat); err != nil {
				panic(err)
			}
			return []string{"make-device", fmt.Sprint(unix.Major(stat.Rdev)), fmt.Sprint(unix.Minor(stat.Rdev))}
		},
		fails: "EPERM mknod",
	},
	{
		name: "change of the host's mount",
		args: func(*attacker) []string { return []string{"resize-tmpfs", "/tmpfs"} },
		bites: func(t *testing.T, a *attacker) {
			var stat unix.Statfs_t
			require.NoError(t, unix.Statfs(a.tmpfs(), &stat))
			require.EqualValues(t, 2<<20, int64(stat.Blocks)*stat.Bsize)
			require.NoError(t, unix.Mount("", a.tmpfs(), "", unix.MS_REMOUNT, "size=1M"))
		},
		fails: "EPERM mount",
	},
	{
		name:      "mount among the host's",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"mount-on", a.tmpfs()} },
		bites: func(t *testing.T, a *attacker) {
			require.NoError(t, unix.Unmount(a.tmpfs(), 0))
			require.DirExists(t, filepath.Join(a.tmpfs(), "mine"), "the mount below it")
		},
		fails: "EPERM mount",
	},

	{
		name:      "entering the node's network",
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"enter-netns", filepath.Join(a.Dir(), "netns")} },
		fails:     "EPERM setns",
	},
	{
		name:      "CAP_NET_ADMIN on the node's network",
		brokenOut: true,
		args:      func(*attacker) []string { return []string{"rule-network", "12345"} },
		bites: func(t *testing.T, a *attacker) {
			lo, err := a.Command(t.Context(), "ip", "link", "show", "lo")
			require.NoError(t, err)
			require.Contains(t, lo, "mtu 12345")
			_, err = a.Command(t.Context(), "ip", "link", "set", "lo", "mtu", "65536")
			require.NoError(t, err)
		},
		fails: "EPERM ioctl",
	},
	{
		name:   "CAP_LINUX_IMMUTABLE",
		before: func(t *testing.T, a *attacker) { require.NoError(t, os.WriteFile(a.stuff("mine"), nil, 0o600)) },
		args:   func(*attacker) []string { return []string{"make-immutable", "/stuff/mine"} },
		bites: func(t *testing.T, a *attacker) {
			require.ErrorIs(t, os.Remove(a.stuff("mine")), unix.EPERM)
			f, err := os.Open(a.stuff("mine"))
			require.NoError(t, err)
			defer f.Close()
			require.NoError(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0x80000)) // FS_EXTENT_FL
			require.NoError(t, os.Remove(a.stuff("mine")))
		},
		fails: "EPERM ioctl",
	},
	{
		name:  "CAP_SYS_TIME",
		args:  func(*attacker) []string { return []string{"set-clock"} },
		fails: "EPERM adjtimex",
	},
	{
		name:  "CAP_SYS_NICE",
		args:  func(*attacker) []string { return []string{"raise-priority"} },
		fails: "EACCES setpriority",
	},
	{
		name:  "CAP_PERFMON",
		args:  func(*attacker) []string { return []string{"watch-processor"} },
		fails: "EACCES perf_event_open",
	},
}

// onModularKernel returns want on a kernel with modules. A kernel without modules checks no
// permission, and the BPF program stands for all code in the kernel.
func onModularKernel(want string) string {
	if _, err := os.Stat("/proc/modules"); err != nil {
		return "ENOSYS init_module"
	}
	return want
}

// inCgroupNamespace returns want if containers have a cgroup namespace, as on pure cgroup v2. No
// hierarchy can be made within one (cgroup_namespaces(7)).
func inCgroupNamespace(want string) string {
	if !cgroups.IsCgroup2UnifiedMode() {
		return ""
	}
	return want
}

// requireLoot requires that the payload ran as the host's root in the host's namespaces.
func requireLoot(t *testing.T, a *attacker) {
	t.Helper()
	loot, err := os.ReadFile(a.stuff("loot"))
	require.NoError(t, err)
	require.NoError(t, os.Remove(a.stuff("loot")))
	var want strings.Builder
	want.WriteString("0\n")
	for _, kind := range []string{"user", "mnt", "pid"} {
		name, err := os.Readlink(nsPath(os.Getpid(), kind))
		require.NoError(t, err)
		want.WriteString(name + "\n")
	}
	require.Equal(t, want.String(), string(loot))
}

// requireStopped requires that a process was stopped, and continues it.
func requireStopped(t *testing.T, pid int) {
	t.Helper()
	require.Eventually(t, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && strings.Contains(string(stat), ") T ")
	}, waitFor, tick)
	require.NoError(t, unix.Kill(pid, unix.SIGCONT))
}

// giveToOwner changes the owner of a file in the attacker's volume to the root of its neighbour.
func giveToOwner(t *testing.T, a *attacker) {
	require.NoError(t, os.WriteFile(a.stuff("secret"), []byte("secret"), 0o600))
	require.NoError(t, os.Chown(a.stuff("secret"), int(a.owner), int(a.owner)))
}
