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
// that isn't there yet, the directory in which it would be made is looked at. Symbolic links are followed, as the container runtime does.
//
// A mount that the kernel doesn't map is an [UnmappableError].
func CheckVolume(path string, pid int) error {
	users, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return fmt.Errorf("failed to find the pod's user namespace: %w", err)
	}
	defer users.Close()
	source, err := openExisting(path)
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
	return nil
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
	Err        error  // the kernel's
}

// Mapped says whether the mount, not the kernel, is the reason: it is mapped already, or belongs to a user namespace.
func (e *UnmappableError) Mapped() bool { return errors.Is(e.Err, unix.EPERM) }

func (e *UnmappableError) Error() string {
	if e.Mapped() {
		return fmt.Sprintf("its filesystem, %s, is mounted with mapped ids already, or by a user namespace: %v", e.Filesystem, e.Err)
	}
	return fmt.Sprintf("this kernel can't map the ids of its filesystem, %s: %v", e.Filesystem, e.Err)
}

// Unwrap is the kernel's error, and its class.
func (e *UnmappableError) Unwrap() []error { return []error{e.Err, errdefs.ErrFailedPrecondition} }

// openExisting opens path, or what is there of the directories above it.
func openExisting(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err == nil || !errors.Is(err, unix.ENOENT) || path == filepath.Dir(path) {
			return f, err
		}
		path = filepath.Dir(path)
	}
}

// filesystem is the type of the filesystem that f is on, for messages.
func filesystem(f *os.File) string {
	var stat unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stat); err != nil {
		return "unknown"
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		found := uint64(m.ID) == stat.Mnt_id
		return !found, found
	})
	if err != nil || len(mounts) == 0 {
		return "unknown"
	}
	return strings.TrimSpace(mounts[0].FSType)
}
