package netns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// mount makes a mount that ends with the test.
func mount(t *testing.T, source, target, kind string, flags uintptr) {
	t.Helper()
	require.NoError(t, unix.Mount(source, target, kind, flags, ""))
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

// onMount is a directory for pins, on a mount of its own with this propagation.
func onMount(t *testing.T, propagation uintptr) (dir string) {
	t.Helper()
	above := t.TempDir()
	mount(t, "pins", above, "tmpfs", 0)
	require.NoError(t, unix.Mount("", above, "", propagation, ""))
	dir = filepath.Join(above, "netns")
	require.NoError(t, os.Mkdir(dir, 0o755))
	return dir
}

// What "ip netns add" does, and others, to a directory with pins.
var covers = map[string]struct {
	over    func(dir string) string
	source  func(dir string) string
	kind    string
	flags   uintptr
	visible bool // the pin, by a copy of its mount
}{
	"itself": {
		over:   func(dir string) string { return dir },
		source: func(dir string) string { return dir },
		flags:  unix.MS_BIND,
	},
	"itself, with what is mounted there": {
		over:    func(dir string) string { return dir },
		source:  func(dir string) string { return dir },
		flags:   unix.MS_BIND | unix.MS_REC,
		visible: true,
	},
	"a tmpfs": {
		over:   func(dir string) string { return dir },
		source: func(string) string { return "cover" },
		kind:   "tmpfs",
	},
	"a tmpfs above": {
		over:   filepath.Dir,
		source: func(string) string { return "cover" },
		kind:   "tmpfs",
	},
}

// Something is mounted over pins. Unpin says so, and does its work once that is gone.
func TestUnpinCovered(t *testing.T) {
	requireRoot(t)
	for name, cover := range covers {
		t.Run(name, func(t *testing.T) {
			h, _ := capturePod(t)
			dir := onMount(t, unix.MS_PRIVATE)
			path, over := filepath.Join(dir, "pin"), cover.over(dir)
			require.NoError(t, h.Pin(path))
			pins, _, err := Covered(dir)
			require.NoError(t, err)
			require.Empty(t, pins)

			mount(t, cover.source(dir), over, cover.kind, cover.flags)
			info, err := Inspect(path)
			require.NoError(t, err)
			require.Equal(t, cover.visible, info.Pinned)
			pins, at, err := Covered(dir)
			require.NoError(t, err)
			require.Equal(t, []string{"pin"}, pins)
			require.Equal(t, over, at)

			for range 2 {
				err = Unpin(t.Context(), path)
				require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
				require.ErrorContains(t, err, "umount -R "+over)
			}
			require.NoError(t, unix.Unmount(over, 0))
			require.NoError(t, Unpin(t.Context(), path))
			require.NoFileExists(t, path)
			require.Zero(t, mountsAt(t, path))
		})
	}
}

// A pin that is made again in what covers its directory leads to the namespace. Its end still finds the first one.
func TestPinAgainInACover(t *testing.T) {
	requireRoot(t)
	for name, cover := range covers {
		t.Run(name, func(t *testing.T) {
			h, _ := capturePod(t)
			dir := onMount(t, unix.MS_PRIVATE)
			path, over := filepath.Join(dir, "pin"), cover.over(dir)
			require.NoError(t, h.Pin(path))
			mount(t, cover.source(dir), over, cover.kind, cover.flags)

			require.NoError(t, h.Pin(path))
			info, err := Inspect(path)
			require.NoError(t, err)
			require.Equal(t, h.Inode(), info.Inode)
			err = Unpin(t.Context(), path)
			if over == dir {
				require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
			}
			require.NoError(t, unix.Unmount(over, unix.MNT_DETACH))
			require.NoError(t, Unpin(t.Context(), path))
			require.Zero(t, mountsAt(t, path))
		})
	}
}

// On a shared mount a directory that is mounted on itself is a peer of what it covers: pins that are made from then on are seen in both, and
// go from both.
func TestPinsOfPeersAreNotCovered(t *testing.T) {
	requireRoot(t)
	h, _ := capturePod(t)
	dir := onMount(t, unix.MS_SHARED)
	mount(t, dir, dir, "", unix.MS_BIND)
	path := filepath.Join(dir, "pin")
	require.NoError(t, h.Pin(path))
	require.Equal(t, 2, mountsAt(t, path))
	pins, _, err := Covered(dir)
	require.NoError(t, err)
	require.Empty(t, pins)
	require.NoError(t, Unpin(t.Context(), path))
	require.Zero(t, mountsAt(t, path))
}

func TestCoveredWithoutADirectory(t *testing.T) {
	pins, over, err := Covered(filepath.Join(t.TempDir(), "none", "netns"))
	require.NoError(t, err)
	require.Empty(t, pins)
	require.Empty(t, over)
}
