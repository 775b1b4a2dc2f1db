package netns

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/internal/roottest"
)

func TestCapture(t *testing.T) {
	roottest.Require(t)
	kill := func(p *pod) { p.kill() }
	for _, tc := range []struct {
		name   string
		flags  uintptr
		before func(*pod)
		is     func(error) bool // nil: captured
		text   string
	}{
		{name: "user namespace of its own", flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET},
		{name: "host's user namespace", flags: unix.CLONE_NEWNET},
		{name: "host's network namespace", is: errdefs.IsFailedPrecondition, text: "is in the host's network namespace"},
		{name: "host's network namespace, another user namespace", flags: unix.CLONE_NEWUSER, is: errdefs.IsFailedPrecondition, text: "is in the host's network namespace"},
		{name: "has ended", flags: unix.CLONE_NEWNET, before: kill, is: errdefs.IsNotFound, text: "has ended"},
		{name: "has ended, on the host's network", before: kill, is: errdefs.IsNotFound, text: "has ended"},
		{
			name: "has ended and is not reaped", flags: unix.CLONE_NEWNET, is: errdefs.IsNotFound, text: "has ended",
			before: func(p *pod) {
				_ = p.Kill()
				_ = p.Wait(t.Context())
			},
		},
		{name: "pidfd is closed", flags: unix.CLONE_NEWNET, before: func(p *pod) { p.Close() }, is: errdefs.IsNotFound, text: "has ended"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := startPod(t, tc.flags)
			if tc.before != nil {
				tc.before(p)
			}
			open := countFDs(t)
			h, err := Capture(p.Process)
			if tc.is != nil {
				require.Error(t, err)
				require.True(t, tc.is(err), "class of %v", err)
				require.ErrorContains(t, err, tc.text)
				require.Nil(t, h)
			} else {
				require.NoError(t, err)
				require.Equal(t, p.inode(t, "net"), h.Inode())
				id, err := identify(h.File())
				require.NoError(t, err)
				require.Equal(t, h.Inode(), id.ino)
				require.NoError(t, h.Close())
			}
			require.Equal(t, open, countFDs(t), "file descriptors leak")
		})
	}
}

// A namespace that was captured outlives its process.
func TestCaptureOutlivesTheProcess(t *testing.T) {
	roottest.Require(t)
	p := startPod(t, unix.CLONE_NEWUSER|unix.CLONE_NEWNET)
	h, err := Capture(p.Process)
	require.NoError(t, err)
	defer h.Close()
	p.kill()
	require.NoError(t, host.InNetNS(h.File(), func() error {
		id, err := statNS("/proc/thread-self/ns/net")
		require.Equal(t, h.Inode(), id.ino)
		return err
	}))
}

// An ioctl that no kernel knows stands for the one that this kernel doesn't: kernels before 6.11 say ENOTTY, too.
func TestUnknownPidfdIoctl(t *testing.T) {
	self, err := host.Open(os.Getpid())
	require.NoError(t, err)
	defer self.Close()
	err = self.Control(func(pidfd int) error {
		_, err := unix.IoctlRetInt(pidfd, ioctlNone|0xff<<8|0xfe)
		return err
	})
	require.ErrorIs(t, err, unix.ENOTTY)
	_, err = ByPidfd()
	require.NoError(t, err)
}

func TestOpen(t *testing.T) {
	roottest.Require(t)
	p := startPod(t, unix.CLONE_NEWUSER|unix.CLONE_NEWNET)
	h, err := Open(p.file("ns/net"))
	require.NoError(t, err)
	require.Equal(t, p.inode(t, "net"), h.Inode())
	require.NoError(t, h.Close())

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "plain"), nil, 0o644))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	open := countFDs(t)
	for path, class := range map[string]func(error) bool{
		filepath.Join(dir, "absent"):     errdefs.IsNotFound,
		filepath.Join(dir, "plain"):      errdefs.IsInvalidArgument,
		filepath.Join(dir, "fifo"):       errdefs.IsInvalidArgument,
		p.file("ns/user"):                errdefs.IsInvalidArgument,
		p.file("ns/uts"):                 errdefs.IsInvalidArgument,
		p.file("status"):                 errdefs.IsInvalidArgument,
		filepath.Join(dir, "plain", "x"): func(err error) bool { return errors.Is(err, unix.ENOTDIR) },
	} {
		_, err := Open(path)
		require.True(t, class(err), "%q: %v", path, err)
	}
	require.Equal(t, open, countFDs(t), "file descriptors leak")
}
