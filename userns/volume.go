package userns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// CheckVolume fails if the files at an absolute path can't be mounted under other ids
// (mount_setattr(2), "ID-mapped mounts"). It maps a detached copy of the mount to the user
// namespace of process pid, which must not be this process's own. If path does not exist, it checks
// the closest directory above. It follows symlinks as the container runtime does, and triggers
// automounts.
//
// A mount that the kernel can't map is an [UnmappableError].
func CheckVolume(path string, pid int) error {
	users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return fmt.Errorf("failed to find the pod's user namespace: %w", err)
	}
	defer users.Close()
	source, _, err := openExisting(path)
	if err != nil {
		return fmt.Errorf("failed to open it: %w", err)
	}
	defer source.Close()

	tree, err := unix.OpenTree(int(source.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("failed to copy its mount: %w", err)
	}
	defer unix.Close(tree)
	if err := mapIDs(tree, users); err != nil {
		return &UnmappableError{Filesystem: filesystem(source), Err: err}
	}
	return nil
}

// Reach opens a path as [CheckVolume] does. It blocks as long as the path's filesystem does not
// respond.
func Reach(path string) error {
	f, _, err := openExisting(path)
	if err != nil {
		return fmt.Errorf("failed to open it: %w", err)
	}
	return f.Close()
}

// CheckBelow fails with an [UnmappableError] if a filesystem is mounted below one of the paths: the
// runtime bind-mounts it with the volume, without mapping its ids. It follows paths as
// [CheckVolume] does. All paths share one list of the node's mounts, because a node has several
// mounts per pod. listmount(2) would list as many for a directory of the root filesystem.
func CheckBelow(paths []string) error {
	var volumes []volume
	for _, path := range paths {
		v, exists, err := openVolume(path)
		if err != nil {
			return fmt.Errorf("failed to open %q: %w", path, err)
		}
		if exists { // a missing path has no mounts below it
			volumes = append(volumes, v)
		}
	}
	if len(volumes) == 0 {
		return nil
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("failed to list mounts: %w", err)
	}
	parents := map[int]int{}
	for _, m := range mounts {
		parents[m.ID] = m.Parent
	}
	for _, v := range volumes {
		for _, m := range mounts {
			// A mount that is not on the volume's own mount, directly or not, is covered by it.
			if strings.HasPrefix(m.Mountpoint, v.prefix) && descends(m.ID, v.mount, parents) {
				return &UnmappableError{Volume: v.path, Filesystem: m.FSType, Below: m.Mountpoint}
			}
		}
	}
	return nil
}

// volume is a directory or file of the node.
type volume struct {
	path   string
	prefix string // of the paths below it, without symbolic links
	mount  int    // the id of its mount
}

// openVolume examines path, which need not exist.
func openVolume(path string) (v volume, exists bool, err error) {
	f, exists, err := openExisting(path)
	if err != nil {
		return v, false, err
	}
	defer f.Close()
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return v, false, err
	}
	id, err := mountID(f)
	return volume{path: path, prefix: strings.TrimSuffix(real, "/") + "/", mount: id}, exists, err
}

// descends reports whether a mount is on another one, directly or not.
func descends(id, ancestor int, parents map[int]int) bool {
	for range parents { // the maximum length of a chain
		parent, ok := parents[id]
		if !ok || parent == ancestor {
			return ok && id != ancestor
		}
		id = parent
	}
	return false
}

// CheckTmpfs fails with an [UnmappableError] if this kernel can't mount tmpfs under other ids,
// which Linux can since 6.3. It tries on a detached mount.
func CheckTmpfs() error {
	users, err := Try()
	if err != nil {
		return fmt.Errorf("failed to make a user namespace: %w", err)
	}
	defer users.Close()
	tree, err := newTmpfs()
	if err != nil {
		return fmt.Errorf("failed to mount tmpfs: %w", err)
	}
	defer unix.Close(tree)
	if err := mapIDs(tree, users); err != nil {
		return &UnmappableError{Filesystem: Tmpfs, Err: err}
	}
	return nil
}

// Try makes a user namespace that maps root to [TryHostID], and returns its descriptor.
func Try() (*os.File, error) {
	onlyRoot := fmt.Sprintf("0:%d:1", TryHostID)
	return mount.GetUsernsFD(onlyRoot, onlyRoot)
}

// newTmpfs returns a detached tmpfs mount.
func newTmpfs() (tree int, err error) {
	context, err := unix.Fsopen(Tmpfs, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(context)
	if err := unix.FsconfigCreate(context); err != nil {
		return -1, err
	}
	return unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
}

func mapIDs(tree int, users *os.File) error {
	return unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(users.Fd())})
}

// Tmpfs is the filesystem type of tmpfs(5).
const Tmpfs = "tmpfs"

// UnmappableError is a mount whose ids can't be mapped. It is a FailedPrecondition error.
type UnmappableError struct {
	Filesystem string // its type
	Volume     string // the path given to CheckBelow
	Below      string // the mount below Volume, which was not tried; "" for Volume itself
	Err        error  // of the kernel; nil for a mount below Volume
}

// Mapped reports whether the mount is the reason, not the kernel: it is mapped already, or belongs
// to a user namespace.
func (e *UnmappableError) Mapped() bool { return errors.Is(e.Err, unix.EPERM) }

func (e *UnmappableError) Error() string {
	if e.Below != "" {
		return fmt.Sprintf("%q, of the filesystem %s, is mounted below it, and the runtime maps no ids there", e.Below, e.Filesystem)
	}
	if e.Mapped() {
		return fmt.Sprintf("its filesystem, %s, is mounted with mapped ids already, or by a user namespace: %v", e.Filesystem, e.Err)
	}
	return fmt.Sprintf("this kernel can't map the ids of its filesystem, %s: %v", e.Filesystem, e.Err)
}

// Unwrap returns the kernel's error, and the error's class.
func (e *UnmappableError) Unwrap() []error {
	if e.Err == nil {
		return []error{errdefs.ErrFailedPrecondition}
	}
	return []error{e.Err, errdefs.ErrFailedPrecondition}
}

// openExisting opens path, or the closest existing directory above it. It triggers automounts, as
// open_tree(2) does, unlike open(2) with O_PATH.
func openExisting(path string) (f *os.File, exists bool, err error) {
	for at := path; ; at = filepath.Dir(at) {
		fd, err := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLOEXEC)
		if err == nil {
			return os.NewFile(uintptr(fd), at), at == path, nil
		}
		if !errors.Is(err, unix.ENOENT) || at == filepath.Dir(at) {
			return nil, false, &os.PathError{Op: "open_tree", Path: at, Err: err}
		}
	}
}

// mountID returns the id in mountinfo of the mount that f is on.
func mountID(f *os.File) (int, error) {
	var stat unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stat); err != nil {
		return 0, fmt.Errorf("failed to find its mount: %w", err)
	}
	return int(stat.Mnt_id), nil
}

// filesystem returns the type of the filesystem that f is on, for messages.
func filesystem(f *os.File) string {
	id, err := mountID(f)
	if err != nil {
		return "unknown"
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.ID != id, m.ID == id })
	if err != nil || len(mounts) == 0 {
		return "unknown"
	}
	return strings.TrimSpace(mounts[0].FSType)
}
