package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"

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

// In calls f on a thread of its own in namespaces of the process; kinds are CLONE_NEW* flags of setns(2), which takes a pidfd since Linux
// 5.8. The thread's root is the host's all the while.
func (p *Process) In(kinds int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks it: the runtime ends the thread with the goroutine
		err := p.Control(func(pidfd int) error { return unix.Setns(pidfd, kinds) })
		if err != nil {
			done <- fmt.Errorf("failed to enter the namespaces of process %d: %w", p.pid, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Control gives f the pidfd, which stays open meanwhile and is the Process's to close.
func (p *Process) Control(f func(pidfd int) error) error { return p.control(f) }

// ExitStatus is how a process has ended that is not a child of this one.
//
// Errors: those of ioctl(2), on Linux before 6.15, and for a process that nobody has reaped yet or that runs.
func (p *Process) ExitStatus() (status unix.WaitStatus, err error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if err := p.control(func(pidfd int) error { return unix.IoctlPidfdInfo(pidfd, &info) }); err != nil {
		return 0, fmt.Errorf("failed to ask how process %d has ended: %w", p.pid, err)
	}
	if info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, fmt.Errorf("the kernel does not say how process %d has ended: %w", p.pid, unix.ENODATA)
	}
	return unix.WaitStatus(info.Exit_code), nil
}
