package netns

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The bits that _IO sets above the type and the number of an ioctl differ between architectures; x/sys knows those of nsfs.
const ioctlNone = unix.NS_GET_USERNS &^ 0xffff

// Ioctls of a pidfd that return a namespace of its process: _IO(0xFF, n) of linux/pidfd.h, since kernel 6.11. They can't race with
// pid reuse, as the path below /proc can.
const (
	pidfdGetNetNamespace  = ioctlNone | 0xff<<8 | 4
	pidfdGetUserNamespace = ioctlNone | 0xff<<8 | 9
)

// nsKind is a kind of namespace: the pidfd ioctl that returns it, and its name below /proc/PID/ns.
type nsKind struct {
	ioctl uint
	name  string
}

var (
	netNS  = nsKind{pidfdGetNetNamespace, "net"}
	userNS = nsKind{pidfdGetUserNamespace, "user"}
)

// nsID tells namespaces apart: equal device and inode are the same namespace, while somebody keeps it alive (namespaces(7)).
type nsID struct {
	dev, ino uint64
}

// host holds the namespaces that containerd was started in. They are read once, while package variables are set, because
// goroutines that enter a pod's network namespace for a moment may do so on the main thread, which /proc/self stands for.
var host, hostErr = readHost()

func readHost() (host struct{ net, user nsID }, err error) {
	if host.net, err = statNS("/proc/self/ns/net"); err != nil {
		return host, err
	}
	host.user, err = statNS("/proc/self/ns/user")
	return host, err
}

func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, gone(pid)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to open a pidfd of process %d (kernel 5.3 or newer is needed): %w", pid, err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", pid)), nil
}

// checkAlive returns NotFound when the process has ended. A pidfd is readable from that moment on, also while its process is still
// a zombie (pidfd_open(2)).
func checkAlive(pidfd *os.File, pid int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("failed to poll the pidfd of process %d: %w", pid, err)
		case n > 0:
			return gone(pid)
		}
		return nil
	}
}

func gone(pid int) error {
	return fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
}

// openNS opens a namespace of the process: by its pidfd, or by /proc where the kernel can't yet.
func openNS(pidfd *os.File, pid int, kind nsKind) (*os.File, error) {
	file, err := nsOfPidfd(pidfd, kind)
	// ENOTTY: the ioctl is unknown to a kernel before 6.11.
	if errors.Is(err, unix.ENOTTY) {
		file, err = os.Open(procPath(pid, "ns/"+kind.name))
	}
	if err != nil {
		return nil, fmt.Errorf("failed to open the %s namespace of process %d: %w", kind.name, pid, err)
	}
	return file, nil
}

func nsOfPidfd(pidfd *os.File, kind nsKind) (*os.File, error) {
	fd, err := unix.IoctlRetInt(int(pidfd.Fd()), kind.ioctl)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), kind.name), nil
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

// openPath opens path for reading. O_NONBLOCK, because somebody may have put a fifo there.
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

// ByPidfd says whether this kernel gives out the namespaces of a process by its pidfd, since Linux 6.11; [Capture] opens them by /proc
// where it doesn't. An error says that there are no pidfds at all, so that nothing can be captured.
func ByPidfd() (bool, error) {
	pidfd, err := openPidfd(os.Getpid())
	if err != nil {
		return false, err
	}
	defer pidfd.Close()
	ns, err := nsOfPidfd(pidfd, netNS)
	if err != nil {
		return false, nil
	}
	return true, ns.Close()
}
