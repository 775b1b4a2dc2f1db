package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Covered are the names of the pins in dir that dir leads to no more: something was mounted over dir, or over a directory above dir, when
// they were there already, as "ip netns add" does on a private mount. over is where; "" without such pins.
func Covered(dir string) (names []string, over string, err error) {
	real, top, err := lookUp(dir)
	if err != nil {
		return nil, "", err
	}
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, "", fmt.Errorf("failed to list the mounts: %w", err)
	}
	mounts, visible := map[int]*mountinfo.Info{}, map[string]bool{}
	var pins []*mountinfo.Info
	for _, m := range all {
		mounts[m.ID] = m
		if m.FSType == "nsfs" && filepath.Dir(m.Mountpoint) == real {
			pins = append(pins, m)
			visible[m.Mountpoint] = visible[m.Mountpoint] || m.Parent == top
		}
	}
	for _, m := range pins {
		// What is unmounted in one of two peers goes from the other, too.
		if m.Parent != top && !(visible[m.Mountpoint] && peers(mounts[m.Parent], mounts[top])) {
			names = append(names, filepath.Base(m.Mountpoint))
		}
	}
	if len(names) == 0 || mounts[top] == nil {
		return nil, "", nil
	}
	return names, mounts[top].Mountpoint, nil
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
func peers(a, b *mountinfo.Info) bool {
	group := func(m *mountinfo.Info) string {
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
	return group(a) != "" && group(a) == group(b)
}

// uncovered fails with FailedPrecondition if a pin is covered.
func uncovered(path string) error {
	names, over, err := Covered(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("failed to unpin network namespace %q: %w", path, err)
	}
	for _, name := range names {
		if name == filepath.Base(path) {
			return fmt.Errorf("failed to unpin network namespace %q: something was mounted over it on %q; umount -R %s: %w", path, over, over, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// mayBeCovered says whether something is mounted on the directory of a path itself. To list all mounts costs more on a full node.
func mayBeCovered(path string) bool {
	st, err := mountOf(filepath.Dir(path))
	return err != nil || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
