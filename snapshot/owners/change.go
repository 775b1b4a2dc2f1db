package owners

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// plan is the new owners and attributes of a file.
type plan struct {
	uid, gid uint32
	// mode is 0, or the permissions to restore after chown(2).
	mode uint32
	// attributes are those to set after chown(2): attributes with ids. chown(2) removes file
	// capabilities.
	attributes []attribute
}

// maxAttribute is the size of the longest value of an extended attribute, and of
// the longest list of names (linux/limits.h).
const maxAttribute = 64 << 10

// plan returns the plan for a file by its current owners and attributes.
func (v *visitor) plan(dir int, name string, st *unix.Statx_t) (p plan, err error) {
	if p.uid, err = v.ids.uid(st.Uid); err != nil {
		return p, err
	}
	if p.gid, err = v.ids.gid(st.Gid); err != nil {
		return p, err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFLNK {
		return p, nil // permissions and attributes of a symlink have no effect
	}
	if st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 && kind != unix.S_IFDIR {
		p.mode = uint32(st.Mode &^ unix.S_IFMT)
	}
	p.attributes, err = v.planAttributes(dir, name)
	return p, err
}

// planAttributes returns the attributes with ids, with the ids mapped.
func (v *visitor) planAttributes(dir int, name string) (shifted []attribute, err error) {
	path := fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
	size, err := unix.Llistxattr(path, nil) // most files have none, and allocating a large buffer is slow in the kernel
	if err == nil && size > 0 {
		size, err = unix.Llistxattr(path, v.buffer)
	}
	if size == 0 || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("failed to list extended attributes: %w", err)
	}
	for key := range bytes.SplitSeq(bytes.Clone(v.buffer[:size]), []byte{0}) {
		shift := shifter(string(key))
		if shift == nil {
			continue
		}
		size, err := unix.Lgetxattr(path, string(key), v.buffer)
		if err != nil {
			return nil, fmt.Errorf("failed to read extended attribute %s: %w", key, err)
		}
		value, err := shift(v.buffer[:size], v.ids)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", key, err)
		}
		shifted = append(shifted, attribute{name: string(key), value: slices.Clip(value)})
	}
	return shifted, nil
}

// apply changes the file by its plan, unless the walk has already failed.
func (v *visitor) apply(dir int, name string, p plan) error {
	if v.unmapped.seen.Load() {
		return nil
	}
	if p.mode == 0 && len(p.attributes) == 0 {
		return unix.Fchownat(dir, name, int(p.uid), int(p.gid), unix.AT_SYMLINK_NOFOLLOW)
	}
	return applyWhole(dir, name, p)
}

// applyWhole opens the file, because not all kernels can set permissions or attributes by name
// without following symlinks.
func applyWhole(dir int, name string, p plan) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := unix.Fchownat(fd, "", int(p.uid), int(p.gid), unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if p.mode != 0 {
		if err := unix.Chmod(path, p.mode); err != nil {
			return fmt.Errorf("failed to restore its permissions: %w", err)
		}
	}
	for _, a := range p.attributes {
		if err := unix.Setxattr(path, a.name, a.value, 0); err != nil {
			return fmt.Errorf("failed to set extended attribute %s: %w", a.name, err)
		}
	}
	return nil
}
