package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

func TestIn(t *testing.T) {
	roottest.Require(t)
	cmd := elsewhere(t, "/", unix.CLONE_NEWNET|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC)
	p, err := Open(cmd.Process.Pid)
	require.NoError(t, err)
	defer p.Close()
	kinds := map[string]int{"net": unix.CLONE_NEWNET, "uts": unix.CLONE_NEWUTS, "ipc": unix.CLONE_NEWIPC}
	before := map[string]string{}
	for kind := range kinds {
		before[kind], err = os.Readlink("/proc/self/ns/" + kind)
		require.NoError(t, err)
	}
	for range 20 { // on the first thread, too, if it were up to the scheduler
		for kind, flag := range kinds {
			want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.Pid(), kind))
			require.NoError(t, err)
			var tid int
			var got string
			require.NoError(t, p.In(flag, func() (err error) {
				tid = unix.Gettid()
				got, err = os.Readlink("/proc/thread-self/ns/" + kind)
				return err
			}))
			require.Equal(t, want, got)
			require.NotEqual(t, os.Getpid(), tid)
			require.ErrorIs(t, unix.Tgkill(os.Getpid(), tid, 0), unix.ESRCH, "the thread has ended")
			now, err := os.Readlink("/proc/self/ns/" + kind)
			require.NoError(t, err)
			require.Equal(t, before[kind], now)
		}
	}
	failed := errors.New("failed")
	require.Equal(t, failed, p.In(unix.CLONE_NEWNET, func() error { return failed }))
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.ErrorIs(t, p.In(unix.CLONE_NEWNET, func() error { panic("it was called") }), unix.ESRCH)
}

func TestInNetNS(t *testing.T) {
	roottest.Require(t)
	cmd := elsewhere(t, "/", unix.CLONE_NEWNET)
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	require.NoError(t, err)
	defer ns.Close()
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	require.NoError(t, err)
	own, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	require.NoError(t, InNetNS(ns, func() error {
		out, err := exec.Command("readlink", "/proc/self/ns/net").Output()
		require.Equal(t, want+"\n", string(out))
		return err
	}))
	failed := errors.New("failed")
	require.Equal(t, failed, InNetNS(ns, func() error { return failed }))
	now, err := os.Readlink("/proc/thread-self/ns/net")
	require.NoError(t, err)
	require.Equal(t, own, now)
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	require.ErrorIs(t, InNetNS(null, func() error { panic("it was called") }), unix.EINVAL)
}

func TestExitStatus(t *testing.T) {
	self, err := Open(os.Getpid())
	require.NoError(t, err)
	defer self.Close()
	if _, err := self.ExitStatus(); !errors.Is(err, unix.ENODATA) {
		t.Skipf("needs Linux 6.15: %v", err)
	}
	for script, want := range map[string]func(unix.WaitStatus) bool{
		"exit 3":        func(s unix.WaitStatus) bool { return s.Exited() && s.ExitStatus() == 3 },
		"kill -KILL $$": func(s unix.WaitStatus) bool { return s.Signaled() && s.Signal() == syscall.SIGKILL },
	} {
		cmd := exec.Command("sh", "-c", "read line; "+script)
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		p, err := Open(cmd.Process.Pid)
		require.NoError(t, err)
		require.NoError(t, stdin.Close())
		require.NoError(t, p.Wait(t.Context()))
		_, err = p.ExitStatus()
		require.ErrorIs(t, err, unix.ENODATA, "the process is not reaped")
		told := make(chan unix.WaitStatus)
		go func() {
			status, err := p.ExitStatus() // waits for the other one
			if err != nil {
				t.Error(err)
			}
			told <- status
		}()
		_ = cmd.Wait()
		require.True(t, want(<-told), script)
		require.NoError(t, p.Close())
	}
}

// AwaitReaper goes on waiting under a storm of signals, as the runtime sends them to its threads.
func TestAwaitReaperAmongSignals(t *testing.T) {
	cmd := exec.Command("true")
	require.NoError(t, cmd.Start())
	p, err := Open(cmd.Process.Pid)
	require.NoError(t, err)
	defer p.Close()
	require.NoError(t, p.Wait(t.Context()))

	tids, returned := make(chan int), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tids <- unix.Gettid()
		p.AwaitReaper(time.Minute)
		close(returned)
	}()
	tid := <-tids
	for range 200 {
		require.NoError(t, unix.Tgkill(os.Getpid(), tid, unix.SIGURG))
		select {
		case <-returned:
			t.Fatal("the process was not reaped")
		case <-time.After(100 * time.Microsecond):
		}
	}
	if _, err := p.ExitStatus(); !errors.Is(err, unix.ENODATA) {
		t.Skipf("needs Linux 6.15: %v", err)
	}
	_ = cmd.Wait()
	<-returned
}
