package cni

import (
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// otherRuntime runs a plugin as another runtime would: a shell with a child, which ends with its
// stdin.
func otherRuntime(t *testing.T, attr *syscall.SysProcAttr, env ...string) (finish func()) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "cat; :")
	cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, env...)
	cmd.SysProcAttr = attr
	in, out := io.Pipe()
	cmd.Stdin = in
	require.NoError(t, cmd.Start())
	return func() {
		require.NoError(t, out.Close())
		require.NoError(t, cmd.Wait())
	}
}

func TestInFlight(t *testing.T) {
	d := newDriver(t, Options{})
	const add, del, bin, elsewhere = "CNI_COMMAND=ADD", "CNI_COMMAND=DEL", "CNI_PATH=/opt/cni/bin", "CNI_PATH=/opt/cni/elsewhere"
	userNS := &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{Size: 1}},
	}
	for _, tc := range []struct {
		name     string
		env      []string
		attr     *syscall.SysProcAttr
		inFlight bool
	}{
		{name: "other directories, same network namespace", env: []string{add, bin}, inFlight: true},
		{name: "our directories", env: []string{del, elsewhere}, inFlight: true},
		{name: "it takes and frees nothing", env: []string{"CNI_COMMAND=CHECK", elsewhere}},
		{name: "a container's mount namespace", env: []string{add, elsewhere}, attr: &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}},
		{name: "a user namespace", env: []string{add, elsewhere}, attr: userNS},
		{name: "a pid namespace", env: []string{add, elsewhere}, attr: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}},
		{name: "a user", env: []string{add, elsewhere}, attr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			finish := otherRuntime(t, tc.attr, tc.env...)
			defer finish()
			pid, err := d.InFlight(t.Context(), Config{BinDirs: []string{"/opt/cni/elsewhere"}})
			require.NoError(t, err)
			require.Equal(t, tc.inFlight, pid != 0, pid)
		})
	}
	pid, err := d.InFlight(t.Context(), Config{})
	require.NoError(t, err)
	require.Zero(t, pid)

	t.Run("in a pod's network namespace", func(t *testing.T) {
		var finish func()
		inNetNS(t, newNetNS(t), func() error {
			finish = otherRuntime(t, nil, add, elsewhere)
			return nil
		})
		defer finish()
		pid, err := d.InFlight(t.Context(), Config{BinDirs: []string{"/opt/cni/elsewhere"}})
		require.NoError(t, err)
		require.NotZero(t, pid)
		pid, err = d.InFlight(t.Context(), Config{BinDirs: []string{"/opt/cni/bin"}})
		require.NoError(t, err)
		require.Zero(t, pid)
	})

	t.Run("a daemon that a plugin of ours has left", func(t *testing.T) {
		group, err := makeGroup(d.groups, run{id: sandboxID, command: "ADD"})
		require.NoError(t, err)
		cmd := exec.Command("sleep", "600")
		cmd.Env = []string{add, elsewhere}
		startIn(t, group, cmd)
		pid, err := d.InFlight(t.Context(), Config{})
		require.NoError(t, err)
		require.Equal(t, cmd.Process.Pid, pid, "the daemon is not marked yet")
		require.NoError(t, keep(t.Context(), group))
		pid, err = d.InFlight(t.Context(), Config{})
		require.NoError(t, err)
		require.Zero(t, pid)
	})
}

// startIn starts a process in a group, and reaps it at the end of the test.
func startIn(t *testing.T, group host.Group, cmd *exec.Cmd) {
	t.Helper()
	require.NoError(t, group.Start(func(cgroupFD int) error {
		if cgroupFD >= 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroupFD}
		}
		return cmd.Start()
	}))
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Kill)
		<-reaped
	})
}
