package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Pin mounts the namespace on path, which keeps it alive until [Unpin]. Pin makes missing parent
// directories with mode 0755, as containerd makes /var/run/netns. It is idempotent, and uses an
// empty file at path, which a kill between making and mounting leaves.
//
// Errors: AlreadyExists if another namespace is pinned at path, FailedPrecondition if anything else
// is there, a symlink included.
func (h *Handle) Pin(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("failed to make the directory of network namespace %q: %w", path, err)
	}
	// O_EXCL follows no symlink.
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o444)
	if err == nil {
		unix.Close(fd)
	} else if !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("failed to make the mount point of network namespace %q: %w", path, err)
	}
	return h.pinOn(path)
}

// pinOn mounts the namespace on the file at path, unless it is mounted there already.
func (h *Handle) pinOn(path string) error {
	target, kind, err := openTarget(path)
	if err != nil {
		return err
	}
	defer target.Close()
	if kind == pinned {
		id, err := identify(target)
		if err != nil {
			return err
		}
		if id != h.id {
			return fmt.Errorf("failed to pin network namespace %d: network namespace %d is pinned at %q; umount %s: %w", h.id.ino, id.ino, path, path, errdefs.ErrAlreadyExists)
		}
		return nil
	}
	// Both ends are named by descriptor, so that a concurrent rename can't change what is mounted
	// where.
	if err := unix.Mount(fdPath(h.ns), fdPath(target), "", unix.MS_BIND, ""); err != nil {
		err = fmt.Errorf("failed to pin network namespace %d at %q: %w", h.id.ino, path, err)
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// Unpin undoes [Handle.Pin] at path. The namespace ends with its last process and descriptor. Unpin
// is idempotent, and succeeds if path does not exist. It detaches mounts lazily, so it does not
// block.
//
// Errors: FailedPrecondition if path was not made by Pin, or if a mount covers the pin.
func Unpin(ctx context.Context, path string) error {
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("failed to unpin network namespace %q: %w", path, err)
		}
		target, kind, err := openTarget(path)
		if errdefs.IsNotFound(err) {
			return uncovered(path)
		}
		if err != nil {
			return err
		}
		target.Close()
		if kind == plain {
			break
		}
		// Repeated for each mount stacked at path: callers that bring their own namespace may have
		// mounted it before.
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("failed to unmount network namespace %q: %w", path, err)
		}
	}
	err := os.Remove(path)
	if errors.Is(err, unix.EBUSY) || mayBeCovered(path) {
		if err := uncovered(path); err != nil {
			return err
		}
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("failed to remove the mount point of network namespace %q: %w", path, err)
	}
	return nil
}

// Info is what [Inspect] finds.
type Info struct {
	Pinned           bool
	Inode            uint64 // of the namespace; 0 unless Pinned
	OwnerUsernsInode uint64 // of the user namespace that owns it; 0 unless Pinned
}

// Inspect returns what is pinned at path. A missing path, or a mount point without a mount, is not
// pinned and no error.
//
// Errors: FailedPrecondition if anything else is at path, a symlink included.
func Inspect(path string) (Info, error) {
	target, kind, err := openTarget(path)
	if errdefs.IsNotFound(err) {
		return Info{}, nil
	}
	if err != nil {
		return Info{}, err
	}
	defer target.Close()
	if kind == plain {
		return Info{}, nil
	}
	ns, err := openPath(fdPath(target), 0)
	if err != nil {
		return Info{}, err
	}
	defer ns.Close()
	if err := checkNetNS(ns); err != nil {
		return Info{}, err
	}
	id, err := identify(ns)
	if err != nil {
		return Info{}, err
	}
	owner, err := ownerOf(ns)
	if err != nil {
		return Info{}, err
	}
	return Info{Pinned: true, Inode: id.ino, OwnerUsernsInode: owner.ino}, nil
}

// targetKind is the kind of file at the path of a pin.
type targetKind int

const (
	plain  targetKind = iota // an empty file: a mount point
	pinned                   // a namespace
)

// openTarget opens path, without following symlinks and without the side effects of opening a
// device.
//
// Errors: NotFound if path does not exist, FailedPrecondition if it is neither a namespace nor an
// empty file.
func openTarget(path string) (*os.File, targetKind, error) {
	file, err := openPath(path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, 0, err
	}
	kind, err := kindOf(file)
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, kind, nil
}

func kindOf(file *os.File) (targetKind, error) {
	namespace, err := onNSFS(file)
	if err != nil {
		return 0, err
	}
	if namespace {
		return pinned, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return 0, fmt.Errorf("failed to stat %q: %w", file.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0 {
		return 0, fmt.Errorf("%q is neither a pinned network namespace nor an empty mount point; remove it: %w", file.Name(), errdefs.ErrFailedPrecondition)
	}
	return plain, nil
}

func fdPath(file *os.File) string {
	return fmt.Sprintf("/proc/self/fd/%d", file.Fd())
}
