package plugin

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/userns"
)

// deaf mounts a filesystem that answers nothing until answers is called, and only fails then.
func deaf(t *testing.T) (dir string, answers func()) {
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	require.NoError(t, err)
	dir = t.TempDir()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd())
	require.NoError(t, unix.Mount("deaf", dir, "fuse", 0, options))
	t.Cleanup(func() {
		_ = server.Close() // or the test has
		require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	})
	return dir, func() { require.NoError(t, server.Close()) }
}

// looking are the goroutines that look at a volume.
func looking(t *testing.T) int {
	var stacks bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&stacks, 2))
	return bytes.Count(stacks.Bytes(), []byte("userns.Reach("))
}

func TestLookAtAVolumeThatDoesNotAnswer(t *testing.T) {
	dir, answers := deaf(t)
	path, l := filepath.Join(dir, "volume"), looks{}
	for n := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		err := l.at(ctx, path, os.Getpid()+n, true) // of other pods
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "doesn't answer")
		require.Equal(t, 1, looking(t), "retries join the first")
	}
	require.ErrorContains(t, l.at(t.Context(), "/proc", os.Getpid(), true), "proc", "others aren't kept")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	devices := []*runtime.Device{{HostPath: "/dev/nowhere"}, {HostPath: path}}
	require.ErrorContains(t, (&Controller{}).reachDevices(ctx, devices), fmt.Sprintf("device %q: its filesystem doesn't answer", path))
	answers()
	require.Eventually(t, func() bool { return looking(t) == 0 }, 10*time.Second, time.Millisecond)
	require.ErrorIs(t, l.at(t.Context(), path, os.Getpid(), true), unix.ENOTCONN, "the next one looks anew")
}

// Pods that come and go at a dead filesystem don't fill the node with threads.
func TestLooksAreBounded(t *testing.T) {
	dir, answers := deaf(t)
	var l looks
	for pid := range mostLooks {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		require.ErrorIs(t, l.at(ctx, filepath.Join(dir, fmt.Sprint(pid)), os.Getpid(), true), context.DeadlineExceeded)
		cancel()
	}
	require.Eventually(t, func() bool { return l.underWay.Load() == mostLooks }, 10*time.Second, time.Millisecond)
	err := l.at(t.Context(), "/proc", os.Getpid(), true)
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
	answers()
	require.Eventually(t, func() bool { return l.underWay.Load() == 0 }, 10*time.Second, time.Millisecond)
	require.ErrorContains(t, l.at(t.Context(), "/proc", os.Getpid(), true), "proc")
}

// The remedy is one that helps: where the kernel can't map tmpfs, no other tmpfs will do.
func TestVolumeRemedy(t *testing.T) {
	for _, test := range []struct {
		filesystem string
		err        error
		chosen     bool
		remedy     string
	}{
		{"ramfs", unix.EINVAL, false, "put the volume on a filesystem that can, such as ext4, xfs or btrfs, or run the pod with hostUsers: true"},
		{"tmpfs", unix.EINVAL, false, "upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or run the pod with hostUsers: true"},
		{"tmpfs", unix.EINVAL, true, "upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or run the pod by a runtime handler that leaves it on the node's users"},
		{"tmpfs", nil, false, "give the container volumes that have no mount below them, or run the pod with hostUsers: true"},
		{"tmpfs", nil, true, "give the container volumes that have no mount below them, or run the pod by a runtime handler that leaves it on the node's users"},
		{"tmpfs", unix.EPERM, true, "put the volume on a filesystem that can, such as ext4, xfs or btrfs, or run the pod by a runtime handler that leaves it on the node's users"},
	} {
		unmappable := &userns.UnmappableError{Filesystem: test.filesystem, Err: test.err}
		if test.err == nil {
			unmappable.Below = "/volume/below"
		}
		require.Equal(t, test.remedy, volumeRemedy(unmappable, test.chosen))
		require.True(t, errdefs.IsFailedPrecondition(unmappable))
	}
}
