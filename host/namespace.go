package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// InNetNS calls f on a thread in a network namespace. A process that f starts is born in that
// namespace.
func InNetNS(netns *os.File, f func() error) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("failed to enter network namespace %q: %w", netns.Name(), err)
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, back) // the thread stays locked, so the runtime ends it with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// In calls f on a thread in namespaces of the process. kinds are CLONE_NEW* flags of setns(2),
// which takes a pidfd since Linux 5.8. The thread's root stays the host's. In returns once the
// thread has ended, because the thread keeps the namespaces alive.
func (p *Process) In(kinds int, f func() error) error {
	return OnLastThread(func() error {
		err := p.control(func(pidfd int) error { return unix.Setns(pidfd, kinds) })
		if err != nil {
			return fmt.Errorf("failed to enter the namespaces of process %d: %w", p.pid, err)
		}
		return f()
	})
}

// Control calls f with the pidfd, which stays open during the call. f must not close it.
func (p *Process) Control(f func(pidfd int) error) error { return p.control(f) }

// reapTimeout is how long ExitStatus waits until a process that has ended is reaped. A working init
// process takes a millisecond.
const reapTimeout = 50 * time.Millisecond

// AwaitReaper waits until a process that has ended is reaped, or for timeout. From then on the
// kernel has its exit status. A pidfd then hangs up since Linux 6.9. On older kernels, AwaitReaper
// always waits for timeout.
func (p *Process) AwaitReaper(timeout time.Duration) {
	_ = p.control(func(pidfd int) error {
		awaitHangup(pidfd, timeout)
		return nil
	})
}

// awaitHangup waits for POLLHUP. Signals interrupt poll(2), and the Go runtime sends some to its own threads.
func awaitHangup(fd int, timeout time.Duration) {
	for end := time.Now().Add(timeout); time.Now().Before(end); {
		left := int(time.Until(end).Milliseconds()) + 1
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, left); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// ExitStatus returns the exit status of a process that is not a child of this process. The kernel
// has it once the process is reaped, and ExitStatus waits at most 50 ms for that.
//
// Errors: those of ioctl(2) on Linux before 6.15; ENODATA for a process that runs or was not
// reaped.
func (p *Process) ExitStatus() (status unix.WaitStatus, err error) {
	err = p.control(func(pidfd int) error {
		status, err = exitStatus(pidfd)
		if errors.Is(err, unix.ENODATA) {
			awaitHangup(pidfd, reapTimeout)
			status, err = exitStatus(pidfd)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("failed to get the exit status of process %d: %w", p.pid, err)
	}
	return status, nil
}

func exitStatus(pidfd int) (unix.WaitStatus, error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if err := unix.IoctlPidfdInfo(pidfd, &info); err != nil {
		return 0, err
	}
	if info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, unix.ENODATA
	}
	return unix.WaitStatus(info.Exit_code), nil
}
