package host

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		pid int
		is  func(error) bool
	}{
		{0, errdefs.IsInvalidArgument},
		{-1, errdefs.IsInvalidArgument},
		{-os.Getpid(), errdefs.IsInvalidArgument},
		{1<<22 + 1, errdefs.IsNotFound}, // above the greatest pid_max
	} {
		_, err := Open(tc.pid)
		require.Truef(t, tc.is(err), "%d: %v", tc.pid, err)
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	require.NoError(t, err)
	_, err = FromPidfd(0, fd)
	require.True(t, errdefs.IsInvalidArgument(err), err)
	require.ErrorIs(t, unix.Close(fd), unix.EBADF)
}

func TestProcess(t *testing.T) {
	t.Parallel()
	cmd := sleeper(t)
	p, err := Open(cmd.Process.Pid)
	require.NoError(t, err)
	defer p.Close()
	require.Equal(t, cmd.Process.Pid, p.Pid())
	require.True(t, p.Alive())
	started, err := p.StartTime(t.Context())
	require.NoError(t, err)
	require.NotZero(t, started)

	short, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, errors.New("too long"))
	defer cancel()
	require.EqualError(t, p.Wait(short), "too long")

	// Any number of goroutines may wait, and all return.
	var waiting sync.WaitGroup
	ends := make([]error, 8)
	for i := range ends {
		waiting.Go(func() { ends[i] = p.Wait(t.Context()) })
	}
	require.NoError(t, p.Kill())
	waiting.Wait()
	require.NoError(t, errors.Join(ends...))

	// A zombie still has its pid.
	require.False(t, p.Alive())
	require.NoError(t, p.Wait(t.Context()))
	again, err := p.StartTime(t.Context())
	require.NoError(t, err)
	require.Equal(t, started, again)

	_ = cmd.Wait()
	_, err = p.StartTime(t.Context())
	require.True(t, errdefs.IsNotFound(err), err)
	require.True(t, errdefs.IsNotFound(p.Signal(unix.SIGTERM)))
	require.NoError(t, p.Kill())
	require.NoError(t, p.Wait(t.Context()))
}

func TestProcessClosed(t *testing.T) {
	t.Parallel()
	p, err := Open(os.Getpid())
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.Error(t, p.Signal(0))
	require.Error(t, p.Wait(t.Context()))
	require.False(t, p.Alive())
}
