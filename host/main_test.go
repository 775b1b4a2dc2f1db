package host

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/internal/roottest"
)

// sleeper starts a process that is killed and reaped at the end of the test.
func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// startIn starts a shell script in cgroups, and reaps it at the end of the test.
func startIn(t *testing.T, c Cgroups, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	require.NoError(t, c.Start(func(cgroupFD int) error {
		if cgroupFD >= 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroupFD}
		}
		return cmd.Start()
	}))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// kinds returns groups of each cgroup version on this host.
func kinds(t *testing.T) map[string]Groups {
	t.Helper()
	roottest.Require(t)
	name := "podfsm-test-" + strconv.Itoa(os.Getpid()) + "-" + filepath.Base(t.Name())
	groups := map[string]Groups{}
	own, err := GroupsBelow(name)
	require.NoError(t, err)
	groups["own"] = own
	if _, err := os.Stat("/sys/fs/cgroup/freezer/tasks"); err == nil {
		groups["v1"] = Groups{filepath.Join("/sys/fs/cgroup/freezer", name)}
	}
	t.Cleanup(func() {
		for _, g := range groups {
			require.NoError(t, Group{dir: g.dir}.end(context.Background()))
		}
	})
	return groups
}

// soon waits for a condition that takes only moments.
func soon(t *testing.T, condition func() bool, what string) {
	t.Helper()
	require.Eventually(t, condition, 5*time.Second, 2*time.Millisecond, what)
}
