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

// Cover is a mount that hides pins: it was made over their directory, or over a directory above that, when they were there already, as
// "ip netns add" does on a private mount.
type Cover struct {
	// Pins are the names of the hidden pins; none without a cover.
	Pins []string
	// Over is where the cover is mounted.
	Over string

	itself  bool // it is mounted on the directory itself
	holds   int  // mounts
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
		// What is unmounted in one of two peers goes from the other, too.
		if m.Parent != top && !(visible[m.Mountpoint] && peers(mounts[m.Parent], cover)) {
			found.Pins = append(found.Pins, filepath.Base(m.Mountpoint))
		}
	}
	return found, nil
}

// Remedy says how to reach the pins again. What is on the cover may be others', so nothing that it says takes that away.
func (c Cover) Remedy() string {
	switch {
	case c.itself && c.holds == 0:
		return "umount " + c.Over
	case c.itself && c.movable:
		return fmt.Sprintf("mount --move %s to a directory aside, umount the pins that it covered, and mount --move it back", c.Over)
	default:
		return fmt.Sprintf("see by findmnt -R %s whose it is: the pins can be reached once it is gone", c.Over)
	}
}

// lookUp is the path of a directory without symlinks, and the id of the mount that it is on. Of a directory that isn't there it is the one
// above.
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
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st); err != nil {
		return st, fmt.Errorf("failed to find the mount of %q: %w", path, err)
	}
	return st, nil
}

// peers says whether two mounts propagate to each other.
func peers(a, b *mountinfo.Info) bool { return groupOf(a) != "" && groupOf(a) == groupOf(b) }

// groupOf is the peer group of a mount, "" where it has none.
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

// mayBeCovered says whether another filesystem is mounted on the directory of a path. A mount of the directory on itself is no such one: its
// files are those that it covers, and none that is a mount point, somewhere, can be removed. To list all mounts costs more on a full node.
func mayBeCovered(path string) bool {
	dir, err := mountOf(filepath.Dir(path))
	if err != nil {
		return true
	}
	if dir.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false
	}
	above, err := mountOf(filepath.Join(filepath.Dir(path), ".."))
	return err != nil || dir.Dev_major != above.Dev_major || dir.Dev_minor != above.Dev_minor
}
