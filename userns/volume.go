package userns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// CheckVolume says whether the files at an absolute path can be mounted under other ids (mount_setattr(2), "ID-mapped mounts"), by
// doing so with the user namespace of process pid, which must not be this process's own, on a mount that is attached nowhere. Of a path
// that isn't there yet, the directory in which it would be made is looked at. Symbolic links are followed, as the container runtime does.
//
// A mount that the kernel doesn't map is a FailedPrecondition error that names its filesystem.
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
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(users.Fd())})
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("its filesystem, %s, is mounted with mapped ids already, or by a user namespace: %w: %w", filesystem(source), err, errdefs.ErrFailedPrecondition)
	case err != nil:
		return fmt.Errorf("this kernel can't map the ids of its filesystem, %s: %w: %w", filesystem(source), err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

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
