// Package host handles processes and cgroups of the host. It holds a process by its pidfd, and
// bounds the reads of files in /proc. The processes that podfsm starts are born in cgroups, by
// which podfsm finds everything that they leave.
//
// The package trusts nothing that a pod can write, such as arguments, environment or names. It
// identifies a process by the cgroup in which podfsm started it, or by a pidfd that podfsm has had
// since the process's birth.
package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Process is one process, held by its pidfd. So it never means another process, even if the pid is
// reused. It is safe for concurrent use.
type Process struct {
	pid   int
	pidfd *os.File
}

// Open opens the process that has a pid now (pidfd_open(2), Linux 5.3).
//
// Errors: InvalidArgument for a pid that isn't positive; NotFound if there is no such process.
func Open(pid int) (*Process, error) {
	if err := checkPid(pid); err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, ended(pid)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to open process %d: %w", pid, err)
	}
	return FromPidfd(pid, pidfd)
}

// FromPidfd returns the process of a pidfd. The Process owns the pidfd from then on, and makes it
// non-blocking.
//
// Errors: InvalidArgument for a pid that isn't positive. On an error, FromPidfd closes the pidfd.
func FromPidfd(pid, pidfd int) (*Process, error) {
	err := checkPid(pid)
	if err == nil {
		err = unix.SetNonblock(pidfd, true) // so that Wait needs no thread
	}
	if err != nil {
		unix.Close(pidfd)
		return nil, err
	}
	return &Process{pid, os.NewFile(uintptr(pidfd), "pidfd")}, nil
}

// checkPid refuses pids that aren't positive: kill(2) takes them for process groups, and the kernel
// shows a process of another pid namespace as 0.
func checkPid(pid int) error {
	if pid <= 0 {
		return fmt.Errorf("%d is not the pid of a process: %w", pid, errdefs.ErrInvalidArgument)
	}
	return nil
}

func ended(pid int) error {
	return fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
}

// Pid returns the process's pid in this pid namespace. Once the process is reaped, another process
// may have that pid.
func (p *Process) Pid() int { return p.pid }

// Close closes the pidfd. A Wait that is under way goes on: it has a pidfd of its own.
func (p *Process) Close() error { return p.pidfd.Close() }

// Signal sends a signal to the process (pidfd_send_signal(2), Linux 5.1).
//
// Errors: NotFound once the process has ended and was reaped.
func (p *Process) Signal(signal unix.Signal) error {
	err := p.control(func(pidfd int) error { return unix.PidfdSendSignal(pidfd, signal, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return ended(p.pid)
	}
	if err != nil {
		return fmt.Errorf("failed to send %s to process %d: %w", unix.SignalName(signal), p.pid, err)
	}
	return nil
}

// Kill sends SIGKILL. It succeeds if the process has ended.
func (p *Process) Kill() error {
	if err := p.Signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// Alive says whether the process runs. A zombie doesn't run.
func (p *Process) Alive() bool {
	exited := false
	err := p.control(func(pidfd int) (err error) {
		exited, err = hasExited(pidfd)
		return err
	})
	return err == nil && !exited
}

// Wait returns nil once the process has ended, reaped or not. If ctx ends first, it returns the
// cause. Wait blocks no thread. Any number of goroutines may wait.
func (p *Process) Wait(ctx context.Context) error {
	waiter, err := p.dup()
	if err != nil {
		return fmt.Errorf("failed to wait for process %d: %w", p.pid, err)
	}
	defer waiter.Close()
	// A deadline in the past ends a read of the runtime's poller.
	stop := context.AfterFunc(ctx, func() { waiter.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	conn, err := waiter.SyscallConn()
	if err != nil {
		return fmt.Errorf("failed to wait for process %d: %w", p.pid, err)
	}
	var polled error
	err = conn.Read(func(pidfd uintptr) bool {
		var exited bool
		exited, polled = hasExited(int(pidfd))
		return exited || polled != nil
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	if err := errors.Join(err, polled); err != nil {
		return fmt.Errorf("failed to wait for process %d: %w", p.pid, err)
	}
	return nil
}

// StartTime returns the start time of the process in clock ticks since the boot (field 22 of
// proc_pid_stat(5)). Together, boot id, pid and start time identify a process forever.
//
// Errors: NotFound once the process has ended and was reaped.
func (p *Process) StartTime(ctx context.Context) (uint64, error) {
	stat, err := ReadStat(ctx, p.pid)
	if err != nil {
		return 0, err
	}
	// If the process is not reaped yet, no other process had its pid before, so the read was of
	// this process.
	if err := p.Signal(0); err != nil && !errors.Is(err, unix.EPERM) {
		return 0, err
	}
	return stat.StartTime, nil
}

// hasExited says whether the process of a pidfd has ended: then the pidfd is readable
// (pidfd_open(2)).
func hasExited(pidfd int) (bool, error) {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}

// dup duplicates the pidfd, because a file of the runtime's poller has one reader at a time.
func (p *Process) dup() (*os.File, error) {
	fd := -1
	err := p.control(func(pidfd int) (err error) {
		fd, err = unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// control calls f with the pidfd, which stays open during the call.
func (p *Process) control(f func(pidfd int) error) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(pidfd uintptr) { failed = f(int(pidfd)) }); err != nil {
		return err
	}
	return failed
}
