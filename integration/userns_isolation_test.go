package integration

import (
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// done is the output of a successful attack.
const done = "done"

// battlefield is a node with the targets of all attacks.
type battlefield struct {
	*harness.Node
	process   *osexec.Cmd // of the host's root
	hierarchy string      // of cgroup v1, mounted at its name in the node's directory
	device    string      // a block device with an ext4 filesystem on which there is a directory lost+found
}

// attacker is a pod with an attacking container, and its neighbour.
type attacker struct {
	*battlefield
	mode      userMode
	container *harness.Container
	pid       int
	neighbour int    // the first process of a container of another pod
	owner     uint32 // the host's id of that process
}

// attack only succeeds from a pod on the host's users, although both kinds of pods have all
// capabilities.
type attack struct {
	name string
	// args are the arguments of the command attack.
	args func(*attacker) []string
	// brokenOut attacks are made by a process that has left all namespaces of its container except
	// for the user namespace, for those of the node.
	brokenOut bool
	// before prepares the attack.
	before func(*testing.T, *attacker)
	// bites requires the effect of the attack on the host, and reverts it.
	bites func(*testing.T, *attacker)
	// fails is the output of the attack in a user namespace.
	fails string
	// sharesIDs is the output in a pod that shares its ids with its neighbour; "" stands for fails.
	sharesIDs string
	// control is the output in a pod on the host's users; "" stands for done.
	control string
}

// giveHierarchy changes the owner of the host's hierarchy.
func (a *attacker) giveHierarchy(t *testing.T, id int) {
	for _, file := range []string{"", "release_agent", "cgroup.procs"} {
		require.NoError(t, os.Chown(filepath.Join(a.Dir(), a.hierarchy, file), id, id))
	}
}

func (a *attacker) stuff(name string) string { return filepath.Join(a.Dir(), "stuff", name) }

// endHierarchy makes the kernel release an unmounted hierarchy. The kernel releases it some time
// after the last unmount, unless a cgroup in it was removed just before.
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

// agentArgs are the arguments for an attack by the release agent of a hierarchy.
func (a *attacker) agentArgs(name, hierarchy string) []string {
	return []string{name, hierarchy, a.stuff("payload"), "/stuff/loot"}
}

// The protection of user namespaces. Each attack has a control that proves that the user namespace
// is the barrier: the same attack succeeds from a pod on the host's users with the same
// capabilities.
func TestIsolation(t *testing.T) {
	n, _ := startNodeWithModes(t)
	field := prepareBattlefield(t, n)
	before, err := n.Rest(t.Context())
	require.NoError(t, err)

	t.Run("attacks", func(t *testing.T) {
		control := field.attacker(t, hostUsers)
		var attackers []*attacker
		for _, mode := range userModes {
			attackers = append(attackers, field.attacker(t, mode))
		}
		for _, attack := range attacks {
			t.Run(attack.name, func(t *testing.T) {
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

// try makes an attack and requires its output.
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

// brokenOut runs the command attack in the attacker's user namespace and the other namespaces of
// the node.
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

// idOf returns the host's user id of a process.
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
		// A device with restricted access is not given to a pod that podfsm has mapped.
		require.NoError(t, os.Chmod(device, 0o666))
		t.Cleanup(func() { require.NoError(t, os.Chmod(device, info.Mode().Perm())) })
		return true
	}, waitFor, tick)
	return device
}

// tmpfs is a tmpfs of the host, outside of the volumes, because a mount below a volume can not be
// mapped with it.
func (f *battlefield) tmpfs() string { return filepath.Join(f.Dir(), "tmpfs-of-host") }

// attacker runs two pods of a mode, one of which attacks.
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
