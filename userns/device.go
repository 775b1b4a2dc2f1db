package userns

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxEntries bounds the entries of a directory of devices that are examined. A larger directory
// counts as usable.
const maxEntries = 10000

// notDevices are the subdirectories of a directory of devices that containerd skips.
var notDevices = []string{"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"}

// unusableDevice returns why a container can't use a device of the node, as the rest of "it …", and
// "" if it can or may. A user namespace can't make devices, so the runtime bind-mounts the node's
// file, by the path that the device has in the container. The file keeps its owner and group. These
// are the node's, unless an administrator has given it to the pods of mode node. In a directory,
// one usable device suffices.
func (m Mappings) unusableDevice(d *runtime.Device) (reason string) {
	var needed uint32
	if strings.Contains(d.GetPermissions(), "r") {
		needed |= 0o4
	}
	if strings.Contains(d.GetPermissions(), "w") {
		needed |= 0o2
	}
	root, err := filepath.EvalSymlinks(d.GetHostPath())
	if err != nil {
		return "" // containerd's service reports it
	}
	var moved, closed string
	open, left := false, maxEntries+1 // and the directory itself
	_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if left--; left < 0 {
			open = true
			return fs.SkipAll
		}
		switch {
		case err != nil:
			return nil
		case path != root && entry.IsDir() && slices.Contains(notDevices, entry.Name()):
			return fs.SkipDir
		case entry.Type()&os.ModeDevice == 0 || path != root && entry.Name() == "console":
			return nil
		}
		bound := path
		if d.GetContainerPath() != "" {
			bound = filepath.Join(d.GetContainerPath(), strings.TrimPrefix(path, root))
		}
		switch {
		case !sameDevice(path, bound):
			moved = fmt.Sprintf("has the device %q as %q, and in a user namespace a device keeps its path", path, bound)
			return fs.SkipAll
		case m.mayOpen(bound, needed):
			open = true
		case closed == "":
			closed = fmt.Sprintf("has the device %q, which no id of its user namespace may open", path)
		}
		return nil
	})
	if moved != "" || open {
		return moved
	}
	return closed
}

// sameDevice reports whether two paths are the same device. If the first is missing it returns
// true: containerd's service reports it.
func sameDevice(a, b string) bool {
	var of, at unix.Stat_t
	if a == b || unix.Stat(a, &of) != nil {
		return true
	}
	return unix.Stat(b, &at) == nil && of.Rdev == at.Rdev && of.Mode&unix.S_IFMT == at.Mode&unix.S_IFMT
}

// mayOpen reports whether one of the mapped ids has the needed permissions for a file. A file with
// an access control list counts as permitted.
func (m Mappings) mayOpen(path string, needed uint32) bool {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return true // removed meanwhile
	}
	has := func(permissions uint32) bool { return permissions&needed == needed }
	if has(stat.Mode) || m.UIDs.hasHostID(stat.Uid) && has(stat.Mode>>6) || m.GIDs.hasHostID(stat.Gid) && has(stat.Mode>>3) {
		return true
	}
	_, err := unix.Getxattr(path, "system.posix_acl_access", nil) // acl(5)
	return err == nil
}
