package integration

import (
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/cgroups"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// allowed are the capabilities and system calls of a container that has everything the kernel can give it.
func allowed(c *runtime.ContainerConfig) {
	c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"ALL"}}
	c.Linux.SecurityContext.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
	c.Linux.SecurityContext.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
}

// done is what package attack prints of an attack that succeeds.
const done = "done"

// battlefield is a node with all that is attacked on it.
type battlefield struct {
	*harness.Node
	process   *osexec.Cmd // of the host's root
	hierarchy string      // of cgroup v1, mounted at its name in the node's directory
	device    string      // a block device with an ext4 filesystem on which there is a directory lost+found
}

// attacker is a pod with a container that attacks, and its neighbour.
type attacker struct {
	*battlefield
	mode      userMode
	container *harness.Container
	pid       int
	neighbour int    // the first process of a container of another pod
	owner     uint32 // the host's id of that process
}

// attack is something that only a pod on the host's users can do, though both kinds have all capabilities.
type attack struct {
	// args are those of the command attack.
	args func(*attacker) []string
	// brokenOut attacks are made by a process that has left all of its container's namespaces but the user's, for those of the node.
	brokenOut bool
	// before gets the attack ready.
	before func(*testing.T, *attacker)
	// bites looks at what the attack has done to the host, and undoes it.
	bites func(*testing.T, *attacker)
	// fails is how the attack fails from a user namespace.
	fails string
	// sharesIDs is how it ends from a pod that shares its ids with its neighbour; as fails when it is empty.
	sharesIDs string
	// control is how it ends from a pod on the host's users; done when it is empty.
	control string
}

// giveHierarchy gives the host's hierarchy to a user.
func (a *attacker) giveHierarchy(t *testing.T, id int) {
	for _, file := range []string{"", "release_agent", "cgroup.procs"} {
		require.NoError(t, os.Chown(filepath.Join(a.Dir(), a.hierarchy, file), id, id))
	}
}

func (a *attacker) stuff(name string) string { return filepath.Join(a.Dir(), "stuff", name) }

// endHierarchy makes the kernel forget a hierarchy that is mounted nowhere. It does so a little after the last mount has gone, unless a
// cgroup in there was removed only just before that.
func (f *battlefield) endHierarchy(t *testing.T, name string) {
	t.Helper()
	at := filepath.Join(f.Dir(), f.hierarchy)
	require.Eventually(t, func() bool {
		of, err := os.ReadFile("/proc/self/cgroup")
		if err != nil || !strings.Contains(string(of), "name="+name+":") {
			return err == nil
		}
		assert.NoError(t, errors.Join(unix.Mount("cgroup", at, "cgroup", 0, "none,name="+name), unix.Unmount(at, 0)))
		return false
	}, waitFor, 10*tick)
}

// agentArgs are the arguments for an attack by a hierarchy's release agent.
func (a *attacker) agentArgs(name, hierarchy string) []string {
	return []string{name, hierarchy, a.stuff("payload"), "/stuff/loot"}
}

// requireLoot sees that the payload ran as the host's root in the host's namespaces.
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

// requireStopped sees that a process has been stopped, and lets it go on.
func requireStopped(t *testing.T, pid int) {
	t.Helper()
	require.Eventually(t, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && strings.Contains(string(stat), ") T ")
	}, waitFor, tick)
	require.NoError(t, unix.Kill(pid, unix.SIGCONT))
}

// giveToOwner makes a file of the attacker's volume one of its neighbour's root.
func giveToOwner(t *testing.T, a *attacker) {
	require.NoError(t, os.WriteFile(a.stuff("secret"), []byte("secret"), 0o600))
	require.NoError(t, os.Chown(a.stuff("secret"), int(a.owner), int(a.owner)))
}

var attacks = map[string]attack{
	"release agent of a new hierarchy": {
		args: func(a *attacker) []string { return a.agentArgs("agent-of-new-hierarchy", a.hierarchy+"-new") },
		bites: func(t *testing.T, a *attacker) {
			requireLoot(t, a)
			a.endHierarchy(t, a.hierarchy+"-new")
		},
		fails:   "EPERM mount",
		control: inCgroupNamespace("EPERM mount"),
	},
	"release agent of the host's hierarchy": {
		before: func(t *testing.T, a *attacker) { a.giveHierarchy(t, 0) },
		args:   func(a *attacker) []string { return a.agentArgs("agent-of-host-hierarchy", a.hierarchy) },
		bites:  requireLoot,
		fails:  "EACCES open",
	},
	// What CVE-2022-0492 left to the user namespace alone: every file is the attacker's own.
	"release agent of the host's hierarchy, given to the pod": {
		before: func(t *testing.T, a *attacker) { a.giveHierarchy(t, int(idOf(t, a.pid))) },
		args:   func(a *attacker) []string { return a.agentArgs("agent-of-host-hierarchy", a.hierarchy) },
		bites:  requireLoot,
		fails:  "EPERM write",
	},

	"another pod's file, in a volume": {
		before: giveToOwner,
		args:   func(*attacker) []string { return []string{"open-file", "/stuff/secret"} },
		fails:  "EACCES open",
	},
	"another pod's file, without its permission": {
		before: giveToOwner,
		args:   func(*attacker) []string { return []string{"chown-file", "/stuff/secret"} },
		fails:  "EPERM chown",
	},
	"another pod's file, past its mounts": {
		before:    giveToOwner,
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"open-file", a.stuff("secret")} },
		fails:     "EACCES open",
		sharesIDs: done,
	},
	"another pod's root directory": {
		brokenOut: true,
		args: func(a *attacker) []string {
			return []string{"open-file", fmt.Sprintf("/proc/%d/root/etc/passwd", a.neighbour)}
		},
		fails: "EACCES open",
	},
	"the host's file": {
		brokenOut: true,
		before: func(t *testing.T, a *attacker) {
			require.NoError(t, os.WriteFile(a.stuff("secret"), []byte("secret"), 0o600))
			require.NoError(t, os.Chown(a.stuff("secret"), 0, 0))
		},
		args:  func(a *attacker) []string { return []string{"open-file", a.stuff("secret")} },
		fails: "EACCES open",
	},
	"the host's file, by its handle": {
		args:  func(*attacker) []string { return []string{"open-by-handle", "/stuff"} },
		fails: "EPERM open_by_handle_at",
	},
	"the host's settings": {
		brokenOut: true,
		args:      func(*attacker) []string { return []string{"open-file", "/proc/sys/kernel/core_pattern"} },
		fails:     "EACCES open",
	},

	"signal to another pod": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"stop-process", fmt.Sprint(a.neighbour)} },
		bites:     func(t *testing.T, a *attacker) { requireStopped(t, a.neighbour) },
		fails:     "EPERM kill",
		sharesIDs: done,
	},
	"signal to the host": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"stop-process", fmt.Sprint(a.process.Process.Pid)} },
		bites:     func(t *testing.T, a *attacker) { requireStopped(t, a.process.Process.Pid) },
		fails:     "EPERM kill",
	},
	"ptrace of another pod": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"trace-process", fmt.Sprint(a.neighbour)} },
		fails:     "EPERM ptrace",
	},
	"ptrace of the host": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"trace-process", fmt.Sprint(a.process.Process.Pid)} },
		fails:     "EPERM ptrace",
	},
	"memory of another pod": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"read-memory", fmt.Sprint(a.neighbour)} },
		fails:     "EPERM process_vm_readv",
	},
	"memory of the host": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"read-memory", fmt.Sprint(a.process.Process.Pid)} },
		fails:     "EPERM process_vm_readv",
	},

	"module": {
		args:    func(*attacker) []string { return []string{"load-module"} },
		fails:   onModularKernel("EPERM init_module"),
		control: onModularKernel("ENOEXEC init_module"), // it is allowed to, but what it brings is no module
	},
	"BPF program": {
		args:  func(*attacker) []string { return []string{"load-program"} },
		fails: "EPERM bpf",
	},

	"mount of the host's device": {
		args:  func(a *attacker) []string { return []string{"mount-device", a.device, "lost+found"} },
		fails: "EPERM mount",
	},
	"node for the host's device": {
		args: func(a *attacker) []string {
			var stat unix.Stat_t
			if err := unix.Stat(a.device, &stat); err != nil {
				panic(err)
			}
			return []string{"make-device", fmt.Sprint(unix.Major(stat.Rdev)), fmt.Sprint(unix.Minor(stat.Rdev))}
		},
		fails: "EPERM mknod",
	},
	"change of the host's mount": {
		args: func(*attacker) []string { return []string{"resize-tmpfs", "/tmpfs"} },
		bites: func(t *testing.T, a *attacker) {
			var stat unix.Statfs_t
			require.NoError(t, unix.Statfs(a.tmpfs(), &stat))
			require.EqualValues(t, 2<<20, int64(stat.Blocks)*stat.Bsize)
			require.NoError(t, unix.Mount("", a.tmpfs(), "", unix.MS_REMOUNT, "size=1M"))
		},
		fails: "EPERM mount",
	},
	"mount among the host's": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"mount-on", a.tmpfs()} },
		bites: func(t *testing.T, a *attacker) {
			require.NoError(t, unix.Unmount(a.tmpfs(), 0))
			require.DirExists(t, filepath.Join(a.tmpfs(), "mine"), "the mount below it")
		},
		fails: "EPERM mount",
	},

	"entering the node's network": {
		brokenOut: true,
		args:      func(a *attacker) []string { return []string{"enter-netns", filepath.Join(a.Dir(), "netns")} },
		fails:     "EPERM setns",
	},
	"CAP_NET_ADMIN on the node's network": {
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
	"CAP_LINUX_IMMUTABLE": {
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
	"CAP_SYS_TIME": {
		args:  func(*attacker) []string { return []string{"set-clock"} },
		fails: "EPERM adjtimex",
	},
	"CAP_SYS_NICE": {
		args:  func(*attacker) []string { return []string{"raise-priority"} },
		fails: "EACCES setpriority",
	},
	"CAP_PERFMON": {
		args:  func(*attacker) []string { return []string{"watch-processor"} },
		fails: "EACCES perf_event_open",
	},
}

// onModularKernel is want where the kernel has modules. Where it is built without, nobody is asked for a permission, and the BPF
// program stands for all code that gets into the kernel.
func onModularKernel(want string) string {
	if _, err := os.Stat("/proc/modules"); err != nil {
		return "ENOSYS init_module"
	}
	return want
}

// inCgroupNamespace is want where containers have a cgroup namespace of their own, as on cgroup v2 alone. Nobody makes a hierarchy from
// within one (cgroup_namespaces(7)).
func inCgroupNamespace(want string) string {
	if !cgroups.IsCgroup2UnifiedMode() {
		return ""
	}
	return want
}

// What a user namespace keeps from a pod, each thing with the proof that it is the user namespace that keeps it: the same attack
// succeeds from a pod on the host's users with the same capabilities.
func TestIsolation(t *testing.T) {
	n, _ := startNodeWithModes(t)
	field := prepareBattlefield(t, n)
	before, err := n.Census(t.Context())
	require.NoError(t, err)

	t.Run("attacks", func(t *testing.T) {
		control := field.attacker(t, hostUsers)
		var attackers []*attacker
		for _, mode := range userModes {
			attackers = append(attackers, field.attacker(t, mode))
		}
		for name, attack := range attacks {
			t.Run(name, func(t *testing.T) {
				t.Run(control.mode.name, func(t *testing.T) {
					want := done
					if attack.control != "" {
						want = attack.control
					}
					control.try(t, attack, want)
				})
				for _, a := range attackers {
					t.Run(a.mode.name, func(t *testing.T) {
						want := attack.fails
						if attack.sharesIDs != "" && a.mode.shared {
							want = attack.sharesIDs
						}
						a.try(t, attack, want)
					})
				}
			})
		}
	})
	n.RequireClean(t, before)
}

// try makes an attack and wants it to end in a way.
func (a *attacker) try(t *testing.T, attack attack, want string) {
	t.Helper()
	if attack.before != nil {
		attack.before(t, a)
	}
	var got string
	if attack.brokenOut {
		got = a.brokenOut(t, attack.args(a)...)
	} else {
		got = exec(t, a.container, append([]string{"/attack"}, attack.args(a)...)...)
	}
	got = strings.TrimSpace(got)
	if got == done && attack.bites != nil {
		attack.bites(t, a)
	}
	require.Equal(t, want, got)
	require.NoFileExists(t, a.stuff("loot"))
}

// brokenOut runs the command attack in the attacker's user namespace and otherwise the node's namespaces.
func (a *attacker) brokenOut(t *testing.T, args ...string) string {
	t.Helper()
	command := append([]string{a.Attack()}, args...)
	if a.mode.name != hostUsers.name {
		enter := []string{"nsenter", "--target", fmt.Sprint(a.pid), "--user", "--setuid", "0", "--setgid", "0", "--"}
		command = append(enter, command...)
	}
	got, err := a.Command(t.Context(), command[0], command[1:]...)
	require.NoError(t, err)
	return got
}

// idOf is the host's user id of a process.
func idOf(t *testing.T, pid int) uint32 {
	t.Helper()
	var stat unix.Stat_t
	require.NoError(t, unix.Stat(fmt.Sprintf("/proc/%d", pid), &stat))
	return stat.Uid
}

func prepareBattlefield(t *testing.T, n *harness.Node) *battlefield {
	t.Helper()
	f := &battlefield{Node: n, hierarchy: filepath.Base(n.Dir())}
	stuff := filepath.Join(n.Dir(), "stuff")
	require.NoError(t, os.Mkdir(stuff, 0o755))
	require.NoError(t, os.Mkdir(f.tmpfs(), 0o755))
	require.NoError(t, unix.Mount("tmpfs", f.tmpfs(), "tmpfs", 0, "size=1M"))
	require.NoError(t, os.Mkdir(filepath.Join(f.tmpfs(), "mine"), 0o755))
	// It looks at where it runs, from the first moment in one piece.
	payload := fmt.Sprintf(`#!/bin/sh
cd %q && { id -u; for kind in user mnt pid; do readlink /proc/self/ns/$kind; done; } > next && mv next loot
`, stuff)
	require.NoError(t, os.WriteFile(filepath.Join(stuff, "payload"), []byte(payload), 0o755))

	require.NoError(t, os.Mkdir(filepath.Join(n.Dir(), f.hierarchy), 0o755))
	require.NoError(t, unix.Mount("cgroup", filepath.Join(n.Dir(), f.hierarchy), "cgroup", 0, "none,name="+f.hierarchy))
	t.Cleanup(func() {
		require.NoError(t, unix.Unmount(filepath.Join(n.Dir(), f.hierarchy), 0))
		f.endHierarchy(t, f.hierarchy)
	})

	disk := filepath.Join(n.Dir(), "disk")
	_, err := n.Command(t.Context(), "mkfs.ext4", "-q", disk, "1M")
	require.NoError(t, err)
	f.device = attachLoop(t, disk)

	f.process = osexec.Command("sleep", "600") // it also ends after a test that was killed
	require.NoError(t, f.process.Start())
	t.Cleanup(func() {
		_ = f.process.Process.Kill()
		_ = f.process.Wait() // it was killed
	})
	return f
}

// attachLoop makes a block device of a file, for as long as this process has it open, until the test ends.
func attachLoop(t *testing.T, path string) (device string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer file.Close()
	control, err := os.Open("/dev/loop-control")
	require.NoError(t, err)
	defer control.Close()
	require.Eventually(t, func() bool { // others may take the free device first
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return false
		}
		device = fmt.Sprintf("/dev/loop%d", number)
		loop, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			return false
		}
		config := &unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		if err := unix.IoctlLoopConfigure(int(loop.Fd()), config); err != nil {
			loop.Close()
			return false
		}
		t.Cleanup(func() { loop.Close() })
		info, err := loop.Stat()
		require.NoError(t, err)
		// A device that few may use isn't given to a pod that podfsm has mapped.
		require.NoError(t, os.Chmod(device, 0o666))
		t.Cleanup(func() { require.NoError(t, os.Chmod(device, info.Mode().Perm())) })
		return true
	}, waitFor, tick)
	return device
}

// tmpfs is a tmpfs of the host, apart from the stuff: a mount below a volume can't be mapped with it.
func (f *battlefield) tmpfs() string { return filepath.Join(f.Dir(), "tmpfs-of-host") }

// attacker runs two pods of a mode, of which one attacks.
func (f *battlefield) attacker(t *testing.T, mode userMode) *attacker {
	t.Helper()
	name := strings.ReplaceAll(mode.name, " ", "-")
	victim := startContainer(t, startPod(t, f.Node, mode.handler, f.PodConfig(name+"-victim", mode.option)), "main")
	a := &attacker{battlefield: f, mode: mode}
	a.container = startContainer(t, startPod(t, f.Node, mode.handler, f.PodConfig(name+"-attacker", mode.option)), "main", allowed,
		harness.Volume(f.Attack(), "/attack"),
		harness.Volume(filepath.Join(f.Dir(), "stuff"), "/stuff"),
		harness.Volume(f.tmpfs(), "/tmpfs"),
		func(c *runtime.ContainerConfig) {
			// In a user namespace runc binds the host's device of the same path.
			c.Devices = append(c.Devices, &runtime.Device{HostPath: f.device, ContainerPath: f.device, Permissions: "rwm"})
		})
	var err error
	a.pid, err = a.container.Pid(t.Context())
	require.NoError(t, err)
	a.neighbour, err = victim.Pid(t.Context())
	require.NoError(t, err)
	a.owner = idOf(t, a.neighbour)
	require.Equal(t, mode.shared || mode.name == hostUsers.name, idOf(t, a.pid) == a.owner, "who has the ids of its neighbour")
	return a
}
