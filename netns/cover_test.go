package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

// mount makes a mount that ends with the test.
func mount(t *testing.T, source, target, kind string, flags uintptr) {
	t.Helper()
	require.NoError(t, unix.Mount(source, target, kind, flags, ""))
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

// onMount is a directory for pins beside another one, on a mount of their own with this propagation.
func onMount(t *testing.T, propagation uintptr) (dir string) {
	t.Helper()
	above := t.TempDir()
	mount(t, "pins", above, "tmpfs", 0)
	require.NoError(t, unix.Mount("", above, "", propagation, ""))
	for _, name := range []string{"netns", "other"} {
		require.NoError(t, os.Mkdir(filepath.Join(above, name), 0o755))
	}
	return filepath.Join(above, "netns")
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
	"another directory of its filesystem": {
		over:   func(dir string) string { return dir },
		source: func(dir string) string { return filepath.Join(filepath.Dir(dir), "other") },
		flags:  unix.MS_BIND,
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
	roottest.Require(t)
	for name, cover := range covers {
		t.Run(name, func(t *testing.T) {
			h, _ := capturePod(t)
			dir := onMount(t, unix.MS_PRIVATE)
			path, over := filepath.Join(dir, "pin"), cover.over(dir)
			require.NoError(t, h.Pin(path))
			found, err := Covered(dir)
			require.NoError(t, err)
			require.Empty(t, found.Pins)

			mount(t, cover.source(dir), over, cover.kind, cover.flags)
			info, err := Inspect(path)
			require.NoError(t, err)
			require.Equal(t, cover.visible, info.Pinned)
			found, err = Covered(dir)
			require.NoError(t, err)
			require.Equal(t, []string{"pin"}, found.Pins)
			require.Equal(t, over, found.Over)

			remedy := "umount " + over
			if over != dir {
				remedy = "findmnt -R " + over // there may be anything else on it
			}
			for range 2 {
				err = Unpin(t.Context(), path)
				require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
				require.ErrorContains(t, err, fmt.Sprintf("a mount on %q covers pin %q; ", over, path))
				require.ErrorContains(t, err, remedy)
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
	roottest.Require(t)
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
	roottest.Require(t)
	h, _ := capturePod(t)
	dir := onMount(t, unix.MS_SHARED)
	mount(t, dir, dir, "", unix.MS_BIND)
	path := filepath.Join(dir, "pin")
	require.NoError(t, h.Pin(path))
	require.Equal(t, 2, mountsAt(t, path))
	found, err := Covered(dir)
	require.NoError(t, err)
	require.Empty(t, found.Pins)
	require.NoError(t, Unpin(t.Context(), path))
	require.Zero(t, mountsAt(t, path))
}

// Others have pinned namespaces on what covers a pin, as "ip netns add" does. The remedy leaves theirs alone.
func TestRemedyKeepsWhatIsOnACover(t *testing.T) {
	roottest.Require(t)
	for name, cover := range covers {
		if name == "a tmpfs above" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			h, _ := capturePod(t)
			dir := onMount(t, unix.MS_PRIVATE)
			path, others, aside := filepath.Join(dir, "pin"), filepath.Join(dir, "others"), filepath.Join(filepath.Dir(dir), "aside")
			require.NoError(t, h.Pin(path))
			mount(t, cover.source(dir), dir, cover.kind, cover.flags)
			require.NoError(t, h.Pin(others))

			err := Unpin(t.Context(), path)
			require.ErrorContains(t, err, "mount --move "+dir)
			require.NotContains(t, err.Error(), "-R")
			require.NoError(t, os.Mkdir(aside, 0o755))
			require.NoError(t, unix.Mount(dir, aside, "", unix.MS_MOVE, ""))
			require.NoError(t, unix.Unmount(path, 0))
			require.NoError(t, unix.Mount(aside, dir, "", unix.MS_MOVE, ""))

			require.NoError(t, Unpin(t.Context(), path), "the stop goes on")
			require.Zero(t, mountsAt(t, path))
			info, err := Inspect(others)
			require.NoError(t, err)
			require.Equal(t, h.Inode(), info.Inode)
			require.NoError(t, Unpin(t.Context(), others))
		})
	}
}

// A cover can't be moved where its parent is shared: the kernel refuses that.
func TestRemedyOnASharedMount(t *testing.T) {
	roottest.Require(t)
	h, _ := capturePod(t)
	dir := onMount(t, unix.MS_SHARED)
	require.NoError(t, h.Pin(filepath.Join(dir, "pin")))
	mount(t, "cover", dir, "tmpfs", 0)
	require.NoError(t, h.Pin(filepath.Join(dir, "others")))
	found, err := Covered(dir)
	require.NoError(t, err)
	require.Equal(t, []string{"pin"}, found.Pins)
	require.Contains(t, found.Remedy(), "findmnt -R "+dir)
	require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	require.NoError(t, Unpin(t.Context(), filepath.Join(dir, "pin")))
}

// All mounts of the node are listed only where the directory isn't the one that was there before.
func TestMayBeCovered(t *testing.T) {
	roottest.Require(t)
	for name, may := range map[string]bool{
		"itself":                              false,
		"itself, with what is mounted there":  false,
		"another directory of its filesystem": true,
		"a tmpfs":                             true,
	} {
		t.Run(name, func(t *testing.T) {
			dir, cover := onMount(t, unix.MS_PRIVATE), covers[name]
			require.False(t, mayBeCovered(filepath.Join(dir, "pin")))
			mount(t, cover.source(dir), dir, cover.kind, cover.flags)
			require.Equal(t, may, mayBeCovered(filepath.Join(dir, "pin")))
		})
	}
	require.True(t, mayBeCovered(filepath.Join(t.TempDir(), "none", "pin")))
}

func TestCoveredWithoutADirectory(t *testing.T) {
	found, err := Covered(filepath.Join(t.TempDir(), "none", "netns"))
	require.NoError(t, err)
	require.Empty(t, found.Pins)
}
