package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// InNetNS calls f with its thread in a network namespace. A process that f starts is born there.
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
		return errors.Join(err, back) // the thread stays locked, so it ends with its goroutine and nobody else gets it
	}
	runtime.UnlockOSThread()
	return err
}

// In calls f on a thread in namespaces of the process; kinds are CLONE_NEW* flags of setns(2), which takes a pidfd since Linux 5.8. The
// thread's root is the host's all the while. In returns when the thread has ended, which kept the namespaces alive.
func (p *Process) In(kinds int, f func() error) error {
	return onLastThread(func() error {
		err := p.control(func(pidfd int) error { return unix.Setns(pidfd, kinds) })
		if err != nil {
			return fmt.Errorf("failed to enter the namespaces of process %d: %w", p.pid, err)
		}
		return f()
	})
}

// Control gives f the pidfd, which stays open meanwhile and is the Process's to close.
func (p *Process) Control(f func(pidfd int) error) error { return p.control(f) }

// reaping is how long ExitStatus waits for the parent of a process that has ended. An init process that works takes a millisecond.
const reaping = 50 * time.Millisecond

// AwaitReaper waits until the parent of a process that has ended has reaped it, but not longer than a timeout: the kernel says from then
// on how the process has ended. A pidfd hangs up then (Linux 6.9); before, the whole timeout passes.
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

// ExitStatus is how a process has ended that is not a child of this one. The kernel tells when the process has been reaped, for which it
// waits 50 ms at most.
//
// Errors: those of ioctl(2), on Linux before 6.15, and ENODATA for a process that runs or that nobody reaps.
func (p *Process) ExitStatus() (status unix.WaitStatus, err error) {
	err = p.control(func(pidfd int) error {
		status, err = exitStatus(pidfd)
		if errors.Is(err, unix.ENODATA) {
			awaitHangup(pidfd, reaping)
			status, err = exitStatus(pidfd)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("failed to ask how process %d has ended: %w", p.pid, err)
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
