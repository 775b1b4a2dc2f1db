package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/faults"
)

const (
	dirPattern = "podfsm-node-*"
	// maxSocketDir is the longest socket_dir that containerd 2.4 takes on Linux:
	// a socket's path has at most 107 bytes, and its name is a SHA-256.
	maxSocketDir = 42

	removeTimeout = 20 * time.Second
)

// makeDir makes the directory of the node, whose name is also the name of the node.
func (n *Node) makeDir() error {
	dir, err := os.MkdirTemp("", dirPattern)
	if err != nil {
		return err
	}
	made.Lock()
	made.dirs = append(made.dirs, dir)
	made.Unlock()
	n.dir, n.name, n.Faults = dir, filepath.Base(dir), faults.Dir(filepath.Join(dir, "faults"))
	if len(n.path("s")) > maxSocketDir {
		return errors.Join(os.Remove(dir), fmt.Errorf("%q is too long for a directory of unix sockets, set TMPDIR to a shorter path: %w", dir, errdefs.ErrInvalidArgument))
	}
	// Remapped root must be able to traverse to its rootfs.
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	for _, below := range []string{"root", "state", "tmp", "bin", "cni/bin", "cni/net.d", "faults/real", "logs"} {
		if err := os.MkdirAll(n.path(below), 0o711); err != nil {
			return err
		}
	}
	n.lock, err = lockDir(dir)
	return err
}

// lockDir locks the directory of a node until the file is closed.
//
// Errors: unix.EWOULDBLOCK when another process has the lock.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Sweep removes the nodes of killed test processes. It skips nodes in use and kept nodes.
func Sweep(ctx context.Context) error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPattern))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		if isKept(dir) {
			continue
		}
		lock, err := lockDir(dir)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
			continue // in use, or closed meanwhile
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, remove(ctx, dir))
		lock.Close()
	}
	return errors.Join(errs...)
}

// remove removes everything of the node with this directory, processes included.
func remove(ctx context.Context, dir string) error {
	if is, err := filepath.Match(dirPattern, filepath.Base(dir)); !is || err != nil {
		return fmt.Errorf("%q is not the directory of a node: %w", dir, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, Patience(removeTimeout))
	defer cancel()
	// Processes first: they hold the rest. Mounts next, so that nothing is removed through them.
	if err := powerOff(ctx, dir); err != nil {
		return err
	}
	return errors.Join(removeCNICache(dir), removeAll(dir))
}

// removeAll removes a directory, including files that a container made immutable before its test
// was killed.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	err = walk(dir, func(path string, d os.DirEntry) error {
		if !d.Type().IsRegular() {
			return nil
		}
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		const immutable = 0x10 // FS_IMMUTABLE_FL
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^immutable)
	})
	return errors.Join(err, os.RemoveAll(dir))
}

// powerOff removes all of a node except for its files: processes, then mounts, then cgroups.
func powerOff(ctx context.Context, dir string) error {
	if err := poll(ctx, pollInterval, func() error { return killAll(dir) }); err != nil {
		return err
	}
	if err := unmountAll(dir); err != nil {
		return err
	}
	if err := stopSlice(filepath.Base(dir)); err != nil {
		return err
	}
	return poll(ctx, pollInterval, func() error { return removeCgroups(filepath.Base(dir)) })
}

// killAll kills every process of the node, and fails while any is left.
func killAll(dir string) error {
	processes, err := nodeProcesses(dir)
	if err != nil {
		return err
	}
	for _, p := range processes {
		if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("failed to kill %v: %w", p, err)
		}
	}
	if len(processes) > 0 {
		return fmt.Errorf("%d processes still run: %v: %w", len(processes), processes, errdefs.ErrUnavailable)
	}
	return nil
}

// unmountAll unmounts everything below dir, the last mount first.
func unmountAll(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("failed to unmount %q: %w", m.Mountpoint, err)
		}
	}
	return nil
}

func removeCgroups(name string) error {
	cgroups, err := nodeCgroups(name)
	if err != nil {
		return err
	}
	for _, dir := range slices.Backward(cgroups) {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("failed to remove cgroup %q: %w", dir, err)
		}
	}
	return nil
}

func removeCNICache(dir string) error {
	files, err := nodeCNICache(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return nil
}

// made are the directories of all nodes of this process.
var made struct {
	sync.Mutex
	dirs []string
}

// Leftovers returns the resources on the machine that belong to nodes of this process. After every
// Close it is empty.
func Leftovers() ([]string, error) {
	made.Lock()
	defer made.Unlock()
	var left []string
	for _, dir := range made.dirs {
		of, err := leftoversOf(dir)
		if err != nil {
			return nil, err
		}
		left = append(left, of...)
	}
	return left, nil
}

func leftoversOf(dir string) ([]string, error) {
	processes, err := nodeProcesses(dir)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, err
	}
	cgroups, err := nodeCgroups(filepath.Base(dir))
	if err != nil {
		return nil, err
	}
	left, err := nodeCNICache(dir)
	if err != nil {
		return nil, err
	}
	left = append(left, cgroups...)
	for _, p := range processes {
		left = append(left, p.String())
	}
	for _, m := range mounts {
		left = append(left, "mount "+m.Mountpoint)
	}
	if _, err := os.Lstat(dir); err == nil {
		left = append(left, dir)
	}
	return left, nil
}
