package netns

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// _IO sets bits above the type and number of an ioctl that differ between architectures. x/sys has
// them for nsfs.
const ioctlNone = unix.NS_GET_USERNS &^ 0xffff

// pidfdGetNetNamespace is an ioctl of a pidfd that returns the network namespace of its process:
// _IO(0xFF, 4) in linux/pidfd.h, since Linux 6.11. Unlike a path below /proc, it can't race with
// pid reuse.
const pidfdGetNetNamespace = ioctlNone | 0xff<<8 | 4

// nsID identifies a namespace by device and inode, for as long as the namespace exists
// (namespaces(7)).
type nsID struct {
	dev, ino uint64
}

// hostNS is the network namespace that containerd was started in. It is read once, at package
// initialization: later, a goroutine on the main thread may be in a pod's network namespace, and
// /proc/self means the main thread.
var hostNS, hostErr = statNS("/proc/self/ns/net")

// openNetNS opens the network namespace of the process by its pidfd, or by /proc on kernels that
// can't.
func openNetNS(process *host.Process) (*os.File, error) {
	var file *os.File
	err := process.Control(func(pidfd int) (err error) {
		file, err = nsOfPidfd(pidfd)
		return err
	})
	// Kernels before 6.11 answer ENOTTY to this ioctl.
	if errors.Is(err, unix.ENOTTY) {
		file, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", process.Pid()))
	}
	if err != nil {
		return nil, fmt.Errorf("failed to open the network namespace of process %d: %w", process.Pid(), err)
	}
	return file, nil
}

func nsOfPidfd(pidfd int) (*os.File, error) {
	fd, err := unix.IoctlRetInt(pidfd, pidfdGetNetNamespace)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "net"), nil
}

// ownerOf returns the user namespace that owns a namespace (ioctl_nsfs(2)).
func ownerOf(ns *os.File) (nsID, error) {
	fd, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return nsID{}, fmt.Errorf("failed to find the owner of namespace %q: %w", ns.Name(), err)
	}
	owner := os.NewFile(uintptr(fd), "user")
	defer owner.Close()
	return identify(owner)
}

func identify(file *os.File) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return nsID{}, fmt.Errorf("failed to stat %q: %w", file.Name(), err)
	}
	return nsID{uint64(st.Dev), st.Ino}, nil
}

func statNS(path string) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nsID{}, fmt.Errorf("failed to stat %q: %w", path, err)
	}
	return nsID{uint64(st.Dev), st.Ino}, nil
}

// openPath opens path for reading. O_NONBLOCK, because path may be a fifo.
func openPath(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|flags, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("network namespace %q does not exist: %w", path, errdefs.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("failed to open %q: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func onNSFS(file *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &st); err != nil {
		return false, fmt.Errorf("failed to find the filesystem of %q: %w", file.Name(), err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// ByPidfd reports whether this kernel opens the namespaces of a process by its pidfd, since Linux
// 6.11. Otherwise [Capture] opens them by /proc. An error means that the kernel has no pidfds, so
// that Capture can't work.
func ByPidfd() (bool, error) {
	self, err := host.Open(os.Getpid())
	if err != nil {
		return false, err
	}
	defer self.Close()
	err = self.Control(func(pidfd int) error {
		ns, err := nsOfPidfd(pidfd)
		if err == nil {
			ns.Close()
		}
		return err
	})
	return err == nil, nil
}
