package netns

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The test binary plays the shim and pause too: roleEnv says which, and shimEnv carries the shimOptions.
const (
	roleEnv = "NETNS_TEST_ROLE"
	shimEnv = "NETNS_TEST_SHIM"

	testNamespace = "k8s.io"

	// The race detector delays the end of a process by a second, to report late races.
	promptExit = "GORACE=atexit_sleep_ms=0"
)

// shimOptions says how the shim starts pause.
type shimOptions struct {
	Flags        uintptr // clone flags of pause
	IDs          []IDMap // mapping of pause with CLONE_NEWUSER; podIDs if nil
	LeaveZombie  bool    // don't reap pause
	ShimInNetNS  bool    // start pause from a network namespace that the host's user namespace owns
	ShimInUserNS bool    // run the shim itself in a user namespace
	ID           string  // of the sandbox; if it is another pod's, pause is in no cgroup of its own
}

func (o shimOptions) ids() []IDMap {
	if o.IDs != nil {
		return o.IDs
	}
	return podIDs()
}

func podIDs() []IDMap { return []IDMap{{0, 600000, 65536}} }

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "shim":
		if err := shim(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	case "pause":
		waitForEOF()
	default:
		os.Exit(m.Run())
	}
}

func waitForEOF() { io.Copy(io.Discard, os.Stdin) }

// shim starts pause, prints its pid, and when pause has ended a line more; it ends itself, and pause with it, at the end of stdin.
func shim() error {
	var o shimOptions
	if err := json.Unmarshal([]byte(os.Getenv(shimEnv)), &o); err != nil {
		return err
	}
	if o.ShimInNetNS {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
	}
	// By /proc, because pause's uid can't pass through the directories above the test binary.
	pause := exec.Command("/proc/self/exe")
	pause.Env = []string{roleEnv + "=pause", promptExit}
	pause.SysProcAttr = &syscall.SysProcAttr{Cloneflags: o.Flags}
	if o.Flags&unix.CLONE_NEWUSER != 0 {
		pause.SysProcAttr.UidMappings = sysProcIDMap(o.ids())
		pause.SysProcAttr.GidMappings = sysProcIDMap(o.ids())
		pause.SysProcAttr.GidMappingsEnableSetgroups = true
		pause.SysProcAttr.Credential = &syscall.Credential{}
	}
	stdin, err := pause.StdinPipe()
	if err != nil {
		return err
	}
	if err := pause.Start(); err != nil {
		return err
	}
	fmt.Println(pause.Process.Pid)
	if o.LeaveZombie {
		waitForEOF()
		return stdin.Close()
	}
	go func() {
		waitForEOF()
		stdin.Close()
	}()
	pause.Wait()
	fmt.Println("reaped")
	waitForEOF()
	return nil
}

func sysProcIDMap(ids []IDMap) []syscall.SysProcIDMap {
	var maps []syscall.SysProcIDMap
	for _, m := range ids {
		maps = append(maps, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return maps
}

// pod is a shim and its pause.
type pod struct {
	options shimOptions
	shim    *exec.Cmd
	output  *bufio.Reader
	pid     int
	id      string
	cgroup  string
}

func startPod(t *testing.T, o shimOptions) *pod {
	t.Helper()
	id := cmp.Or(o.ID, "pod"+strconv.Itoa(os.Getpid())+filepath.Base(t.TempDir()))
	options, err := json.Marshal(o)
	require.NoError(t, err)

	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"containerd-shim-runc-v2", "-namespace", testNamespace, "-id", id, "-address", "/run/containerd/containerd.sock"}
	cmd.Env = []string{roleEnv + "=shim", shimEnv + "=" + string(options), promptExit}
	cmd.Stderr = os.Stderr
	if o.ShimInUserNS {
		// With the host's ids, so that it may map any of them to pause.
		all := []IDMap{{0, 0, 1 << 31}}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: sysProcIDMap(all), GidMappings: sysProcIDMap(all), GidMappingsEnableSetgroups: true}
	}
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	p := &pod{options: o, shim: cmd, output: bufio.NewReader(stdout), id: id}
	t.Cleanup(func() {
		stdin.Close()
		io.Copy(io.Discard, p.output)
		cmd.Wait()
	})
	p.pid, err = strconv.Atoi(p.line(t))
	require.NoError(t, err)
	if o.ID == "" {
		p.enterCgroup(t)
	}
	return p
}

func (p *pod) line(t *testing.T) string {
	t.Helper()
	line, err := p.output.ReadString('\n')
	require.NoError(t, err)
	return strings.TrimSpace(line)
}

// hierarchy is one of v1, or v2.
func hierarchy() string {
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
		root = filepath.Join(root, "pids")
	}
	return root
}

// join moves pause into the cgroup of another pod's.
func (p *pod) join(t *testing.T, other *pod) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(hierarchy(), other.cgroup, "cgroup.procs"), []byte(strconv.Itoa(p.pid)), 0))
	t.Cleanup(func() { p.leaveCgroup(t, hierarchy()) })
}

// enterCgroup puts pause into a cgroup of its own.
func (p *pod) enterCgroup(t *testing.T) {
	t.Helper()
	root := hierarchy()
	p.cgroup = "/podfsm-netns-test-" + p.id + "/" + p.id
	dir := filepath.Join(root, p.cgroup)
	require.NoError(t, os.MkdirAll(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.pid)), 0))
	t.Cleanup(func() {
		if unix.Kill(p.pid, 0) == nil {
			p.leaveCgroup(t, root)
		}
		require.NoError(t, os.Remove(dir))
		require.NoError(t, os.Remove(filepath.Dir(dir)))
	})
}

// leaveCgroup moves pause, which ends only with its shim, out of the cgroup, so that the cgroup can be removed.
func (p *pod) leaveCgroup(t *testing.T, root string) {
	err := os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(strconv.Itoa(p.pid)), 0)
	if err != nil {
		require.ErrorIs(t, err, unix.ESRCH)
	}
}

// expect is what holds for the pod.
func (p *pod) expect() Expect {
	e := Expect{Pid: p.pid, Namespace: testNamespace, ID: p.id, CgroupPath: p.cgroup, Alive: func(context.Context) error { return nil }}
	if p.options.Flags&unix.CLONE_NEWUSER != 0 {
		e.UIDs, e.GIDs = p.options.ids(), p.options.ids()
	}
	return e
}

func (p *pod) netnsInode(t *testing.T) uint64 {
	t.Helper()
	id, err := statNS(procPath(p.pid, "ns/net"))
	require.NoError(t, err)
	return id.ino
}

// kill ends pause and returns when it has ended: reaped, or a zombie with LeaveZombie.
func (p *pod) kill(t *testing.T) {
	t.Helper()
	pidfd, err := unix.PidfdOpen(p.pid, 0)
	require.NoError(t, err)
	defer unix.Close(pidfd)
	require.NoError(t, unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0))
	waitForExit(t, pidfd)
	if !p.options.LeaveZombie {
		require.Equal(t, "reaped", p.line(t))
	}
}

// killShim ends the shim; pause lives on as an orphan until its stdin ends, which the shim held.
func (p *pod) killShim(t *testing.T) {
	t.Helper()
	keep, err := os.OpenFile(procPath(p.pid, "fd/0"), os.O_WRONLY, 0)
	require.NoError(t, err)
	pidfd, err := unix.PidfdOpen(p.pid, 0)
	require.NoError(t, err)
	t.Cleanup(func() {
		keep.Close()
		waitForExit(t, pidfd)
		unix.Close(pidfd)
	})
	require.NoError(t, p.shim.Process.Kill())
	require.Error(t, p.shim.Wait())
}

func waitForExit(t *testing.T, pidfd int) {
	t.Helper()
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			require.NoError(t, err)
			return
		}
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("root is needed to make namespaces, cgroups and mounts")
	}
	t.Skip("root is needed to make namespaces, cgroups and mounts")
}
