package netns

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// The test binary plays pause, too, where roleEnv says so.
const (
	roleEnv = "NETNS_TEST_ROLE"

	// The race detector delays the end of a process by a second, to report late races.
	promptExit = "GORACE=atexit_sleep_ms=0"
)

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) == "pause" {
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	os.Exit(m.Run())
}

// pod is a pause process, a child of the test that is reaped at its end.
type pod struct {
	*host.Process
	cmd *exec.Cmd
}

// startPod starts pause in new namespaces, and as root of a new user namespace where it gets one.
func startPod(t *testing.T, flags uintptr) *pod {
	t.Helper()
	cmd := exec.Command("/proc/self/exe") // its uid can't pass through the directories above the test binary
	cmd.Env = []string{roleEnv + "=pause", promptExit}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if flags&unix.CLONE_NEWUSER != 0 {
		ids := []syscall.SysProcIDMap{{HostID: 600000, Size: 65536}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
		cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
	}
	_, err := cmd.StdinPipe() // closed by Wait
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	p := &pod{cmd: cmd}
	t.Cleanup(func() { p.kill() })
	p.Process, err = host.Open(cmd.Process.Pid)
	require.NoError(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// kill ends and reaps pause.
func (p *pod) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// file is a file of pause in /proc.
func (p *pod) file(name string) string { return fmt.Sprintf("/proc/%d/%s", p.Pid(), name) }

func (p *pod) inode(t *testing.T, namespace string) uint64 {
	t.Helper()
	id, err := statNS(p.file("ns/" + namespace))
	require.NoError(t, err)
	return id.ino
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}
