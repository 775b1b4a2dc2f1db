package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Cover is a mount that hides pins. It was mounted over their directory, or over a directory above,
// after the pins were made. "ip netns add" does so on a private mount.
type Cover struct {
	// Pins are the names of the hidden pins; none without a cover.
	Pins []string
	// Over is where the cover is mounted.
	Over string

	itself  bool // it is mounted on the directory itself
	holds   int  // mounts on it
	movable bool
}

// Covered finds what covers pins in dir.
func Covered(dir string) (Cover, error) {
	real, top, err := lookUp(dir)
	if err != nil {
		return Cover{}, err
	}
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return Cover{}, fmt.Errorf("failed to list the mounts: %w", err)
	}
	mounts, visible, holds := map[int]*mountinfo.Info{}, map[string]bool{}, 0
	var pins []*mountinfo.Info
	for _, m := range all {
		mounts[m.ID] = m
		if m.Parent == top {
			holds++
		}
		if m.FSType == "nsfs" && filepath.Dir(m.Mountpoint) == real {
			pins = append(pins, m)
			visible[m.Mountpoint] = visible[m.Mountpoint] || m.Parent == top
		}
	}
	cover := mounts[top]
	if cover == nil {
		return Cover{}, nil
	}
	found := Cover{Over: cover.Mountpoint, itself: cover.Mountpoint == real, holds: holds, movable: groupOf(mounts[cover.Parent]) == ""}
	for _, m := range pins {
		// An unmount in one of two peers propagates to the other.
		if m.Parent != top && !(visible[m.Mountpoint] && peers(mounts[m.Parent], cover)) {
			found.Pins = append(found.Pins, filepath.Base(m.Mountpoint))
		}
	}
	return found, nil
}

// Remedy says how to reach the pins again. It never unmounts what others may have mounted on the
// cover.
func (c Cover) Remedy() string {
	switch {
	case c.itself && c.holds == 0:
		return "umount " + c.Over
	case c.itself && c.movable:
		return fmt.Sprintf("mount --move %s to another directory, umount the covered pins, and mount --move it back", c.Over)
	default:
		return fmt.Sprintf("find the owner of the mount by findmnt -R %s; the pins are reachable once it is unmounted", c.Over)
	}
}

// lookUp returns the path of a directory without symlinks, and the id of the mount that it is on.
// For a missing directory it uses the closest existing one above.
func lookUp(dir string) (real string, mount int, err error) {
	real, err = filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
		above, mount, err := lookUp(filepath.Dir(dir))
		return filepath.Join(above, filepath.Base(dir)), mount, err
	}
	if err != nil {
		return "", 0, fmt.Errorf("failed to look up %q: %w", dir, err)
	}
	st, err := mountOf(real)
	return real, int(st.Mnt_id), err
}

func mountOf(path string) (st unix.Statx_t, err error) {
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID|unix.STATX_INO, &st); err != nil {
		return st, fmt.Errorf("failed to find the mount of %q: %w", path, err)
	}
	return st, nil
}

// peers reports whether two mounts propagate to each other.
func peers(a, b *mountinfo.Info) bool { return groupOf(a) != "" && groupOf(a) == groupOf(b) }

// groupOf returns the peer group of a mount, "" if it has none.
func groupOf(m *mountinfo.Info) string {
	if m == nil {
		return ""
	}
	for _, field := range strings.Fields(m.Optional) {
		if strings.HasPrefix(field, "shared:") {
			return field
		}
	}
	return ""
}

// uncovered fails with FailedPrecondition if a pin is covered.
func uncovered(path string) error {
	cover, err := Covered(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("failed to unpin network namespace %q: %w", path, err)
	}
	if slices.Contains(cover.Pins, filepath.Base(path)) {
		return fmt.Errorf("failed to unpin network namespace: a mount on %q covers pin %q; %s: %w", cover.Over, path, cover.Remedy(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// mayBeCovered reports whether another directory is mounted on the directory of a path. It is a cheap
// test before all mounts are listed, which is expensive on a full node. A bind mount of the
// directory on itself does not count: its files are the covered ones, and a file that is a mount
// point anywhere can't be removed.
func mayBeCovered(path string) bool {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return true
	}
	visible, err := mountOf(dir)
	if err != nil {
		return true
	}
	if visible.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false
	}
	below, err := belowMounts(dir)
	return err != nil || below.Ino != visible.Ino || below.Dev_major != visible.Dev_major || below.Dev_minor != visible.Dev_minor
}

// belowMounts looks at what is below all mounts on a directory, in a copy of the mount above that
// has none of them.
func belowMounts(dir string) (st unix.Statx_t, err error) {
	above, err := unix.OpenTree(unix.AT_FDCWD, filepath.Dir(dir), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return st, err
	}
	defer unix.Close(above)
	err = unix.Statx(above, filepath.Base(dir), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO, &st)
	return st, err
}
