package netns

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

// capturePod returns the captured network namespace of a new pod, and the inode of the user namespace that owns it.
func capturePod(t *testing.T) (h *Handle, owner uint64) {
	t.Helper()
	p := startPod(t, unix.CLONE_NEWUSER|unix.CLONE_NEWNET)
	h, err := Capture(p.Process)
	require.NoError(t, err)
	t.Cleanup(func() { h.Close() })
	return h, p.inode(t, "user")
}

// pinPath is a path in a directory that doesn't exist yet.
func pinPath(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns", "pin")
	t.Cleanup(func() {
		for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		}
	})
	return path
}

func mountsAt(t *testing.T, path string) int {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	return strings.Count(string(mounts), " "+path+" ")
}

func TestPinAndUnpin(t *testing.T) {
	roottest.Require(t)
	h, owner := capturePod(t)
	path := pinPath(t)
	want := Info{Pinned: true, Inode: h.Inode(), OwnerUsernsInode: owner}

	info, err := Inspect(path)
	require.NoError(t, err)
	require.Zero(t, info)
	require.NoError(t, Unpin(t.Context(), path), "nothing is pinned yet")

	for range 2 {
		require.NoError(t, h.Pin(path))
		require.Equal(t, 1, mountsAt(t, path))
		info, err = Inspect(path)
		require.NoError(t, err)
		require.Equal(t, want, info)
	}
	dir, err := os.Stat(filepath.Dir(path))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o755), dir.Mode().Perm())

	// The pin alone keeps the namespace, and it can be opened again.
	require.NoError(t, h.Close())
	again, err := Open(path)
	require.NoError(t, err)
	require.Equal(t, want.Inode, again.Inode())
	require.NoError(t, again.Close())

	for range 2 {
		require.NoError(t, Unpin(t.Context(), path))
		require.NoFileExists(t, path)
		require.Zero(t, mountsAt(t, path))
	}
}

func TestPinAfterKill(t *testing.T) {
	roottest.Require(t)
	h, _ := capturePod(t)
	path := pinPath(t)
	// What a kill between making the mount point and mounting leaves.
	require.NoError(t, os.Mkdir(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, nil, 0o444))

	info, err := Inspect(path)
	require.NoError(t, err)
	require.Zero(t, info)
	require.NoError(t, h.Pin(path))
	require.Equal(t, 1, mountsAt(t, path))
	require.NoError(t, Unpin(t.Context(), path))

	require.NoError(t, os.WriteFile(path, nil, 0o444))
	require.NoError(t, Unpin(t.Context(), path), "a mount point without a mount")
	require.NoFileExists(t, path)
}

func TestPinWhereSomethingElseIs(t *testing.T) {
	roottest.Require(t)
	h, _ := capturePod(t)
	for name, put := range map[string]func(t *testing.T, path string){
		"file with content": func(t *testing.T, path string) { require.NoError(t, os.WriteFile(path, []byte("x"), 0o644)) },
		"directory":         func(t *testing.T, path string) { require.NoError(t, os.Mkdir(path, 0o755)) },
		"fifo":              func(t *testing.T, path string) { require.NoError(t, unix.Mkfifo(path, 0o644)) },
		"symlink to a file": func(t *testing.T, path string) {
			require.NoError(t, os.WriteFile(path+".target", nil, 0o644))
			require.NoError(t, os.Symlink(path+".target", path))
		},
		"dangling symlink": func(t *testing.T, path string) { require.NoError(t, os.Symlink(path+".absent", path)) },
		"symlink to the same namespace": func(t *testing.T, path string) {
			require.NoError(t, h.Pin(path+".target"))
			t.Cleanup(func() { require.NoError(t, Unpin(context.Background(), path+".target")) })
			require.NoError(t, os.Symlink(path+".target", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := pinPath(t)
			require.NoError(t, os.Mkdir(filepath.Dir(path), 0o755))
			put(t, path)
			before, err := os.Lstat(path)
			require.NoError(t, err)

			require.True(t, errdefs.IsFailedPrecondition(h.Pin(path)))
			require.True(t, errdefs.IsFailedPrecondition(Unpin(t.Context(), path)))
			_, err = Inspect(path)
			require.True(t, errdefs.IsFailedPrecondition(err))

			after, err := os.Lstat(path)
			require.NoError(t, err)
			require.True(t, os.SameFile(before, after), "must be left alone")
			require.Zero(t, mountsAt(t, path))
			require.NoFileExists(t, path+".absent")
		})
	}
}

func TestPinWhereAnotherIsPinned(t *testing.T) {
	roottest.Require(t)
	first, _ := capturePod(t)
	second, _ := capturePod(t)
	path := pinPath(t)
	require.NoError(t, first.Pin(path))
	require.True(t, errdefs.IsAlreadyExists(second.Pin(path)))
	info, err := Inspect(path)
	require.NoError(t, err)
	require.Equal(t, first.Inode(), info.Inode)
	require.NoError(t, Unpin(t.Context(), path))
}

func TestUnpinStack(t *testing.T) {
	roottest.Require(t)
	h, _ := capturePod(t)
	path := pinPath(t)
	require.NoError(t, h.Pin(path))
	require.NoError(t, unix.Mount(fdPath(h.ns), path, "", unix.MS_BIND, ""))
	require.Equal(t, 2, mountsAt(t, path))
	require.NoError(t, Unpin(t.Context(), path))
	require.Zero(t, mountsAt(t, path))
	require.NoFileExists(t, path)
}

func TestUnpinCanceled(t *testing.T) {
	roottest.Require(t)
	h, _ := capturePod(t)
	path := pinPath(t)
	require.NoError(t, h.Pin(path))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, Unpin(ctx, path), context.Canceled)
	require.Equal(t, 1, mountsAt(t, path))
	require.NoError(t, Unpin(t.Context(), path))
}

// A failed mount leaves no mount point behind.
func TestPinFails(t *testing.T) {
	roottest.Require(t)
	h, _ := capturePod(t)
	path := pinPath(t)
	// An ordinary file of the same name as the descriptor's would be no namespace: mounting a directory on a file fails.
	dir, err := os.Open(t.TempDir())
	require.NoError(t, err)
	defer dir.Close()
	broken := &Handle{ns: dir, id: h.id}
	require.ErrorIs(t, broken.Pin(path), unix.ENOTDIR)
	require.NoFileExists(t, path)
}
