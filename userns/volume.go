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

// CheckVolume says whether the files at an absolute path can be mounted under other ids (mount_setattr(2), "ID-mapped mounts"), by
// doing so with the user namespace of process pid, which must not be this process's own, on a mount that is attached nowhere. Of a path
// that isn't there yet, the directory in which it would be made is looked at. Symbolic links are followed, as the container runtime does,
// and an automount point is triggered: what is mounted there then is looked at.
//
// A mount that the kernel doesn't map is an [UnmappableError]. So is, where below is asked for, one below path: the runtime binds it
// without mapping its ids.
func CheckVolume(path string, pid int, below bool) error {
	users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return fmt.Errorf("failed to find the pod's user namespace: %w", err)
	}
	defer users.Close()
	source, exists, err := openExisting(path)
	if err != nil {
		return fmt.Errorf("failed to look at it: %w", err)
	}
	defer source.Close()

	tree, err := unix.OpenTree(int(source.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("failed to take a copy of its mount: %w", err)
	}
	defer unix.Close(tree)
	if err := mapIDs(tree, users); err != nil {
		return &UnmappableError{Filesystem: filesystem(source), Err: err}
	}
	if !below || !exists { // what is to be made has nothing below it
		return nil
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &stat); err != nil {
		return fmt.Errorf("failed to look at it: %w", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	return checkBelow(source)
}

// Reach opens a path, as [CheckVolume] does: where its filesystem doesn't answer, it doesn't return.
func Reach(path string) error {
	f, _, err := openExisting(path)
	if err != nil {
		return fmt.Errorf("failed to look at it: %w", err)
	}
	return f.Close()
}

// checkBelow fails with an [UnmappableError] if there is a mount below source.
func checkBelow(source *os.File) error {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", source.Fd()))
	if err != nil {
		return fmt.Errorf("failed to find its path: %w", err)
	}
	id, err := mountID(source)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("failed to list mounts: %w", err)
	}
	parents := map[int]int{}
	for _, m := range mounts {
		parents[m.ID] = m.Parent
	}
	for _, m := range mounts {
		// One that isn't on source's own mount, or on one on that, is covered by it.
		if strings.HasPrefix(m.Mountpoint, strings.TrimSuffix(path, "/")+"/") && descends(m.ID, id, parents) {
			return &UnmappableError{Filesystem: m.FSType, Below: m.Mountpoint}
		}
	}
	return nil
}

// descends says whether a mount is on another one, or on one that is.
func descends(id, ancestor int, parents map[int]int) bool {
	for range parents { // no chain is longer
		parent, ok := parents[id]
		if !ok || parent == ancestor {
			return ok && id != ancestor
		}
		id = parent
	}
	return false
}

// CheckTmpfs says whether this kernel mounts tmpfs under other ids, which Linux does since 6.3, by doing so on a mount that is attached
// nowhere. A kernel that can't is an [UnmappableError].
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

// Try makes a user namespace, whose root is the user and the group [TryHostID], and returns its descriptor.
func Try() (*os.File, error) {
	onlyRoot := fmt.Sprintf("0:%d:1", TryHostID)
	return mount.GetUsernsFD(onlyRoot, onlyRoot)
}

// newTmpfs is a mount that is attached nowhere.
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

// Tmpfs is a filesystem type (tmpfs(5)).
const Tmpfs = "tmpfs"

// UnmappableError says that a mount can't have other ids. It is a FailedPrecondition error.
type UnmappableError struct {
	Filesystem string // its type
	Below      string // where it is, for one below the volume, which nobody has tried to map
	Err        error  // the kernel's, for any other
}

// Mapped says whether the mount, not the kernel, is the reason: it is mapped already, or belongs to a user namespace.
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

// Unwrap is the kernel's error, and its class.
func (e *UnmappableError) Unwrap() []error {
	if e.Err == nil {
		return []error{errdefs.ErrFailedPrecondition}
	}
	return []error{e.Err, errdefs.ErrFailedPrecondition}
}

// openExisting opens path, or what is there of the directories above it. It triggers automounts, as open_tree(2) does, unlike open(2)
// with O_PATH.
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

// mountID is the id, as in mountinfo, of the mount that f is on.
func mountID(f *os.File) (int, error) {
	var stat unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stat); err != nil {
		return 0, fmt.Errorf("failed to find its mount: %w", err)
	}
	return int(stat.Mnt_id), nil
}

// filesystem is the type of the filesystem that f is on, for messages.
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
