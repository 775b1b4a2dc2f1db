package harness

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// stallTime bounds a stalled system call, which usually ends with the daemon.
const stallTime = time.Minute

// StallAfter lets strace stall the running daemon after it has made the system call on the path;
// StallBefore stalls it before. The stall lasts until the daemon is killed. Unlike a fault point,
// it reaches the middle of a function. Both return when strace watches all threads of the daemon.
func (n *Node) StallAfter(ctx context.Context, syscall, path string) error {
	return n.trace(ctx, syscall, stalled("delay_exit"), "-P", path)
}

// StallBefore stalls the daemon before a system call. See StallAfter.
func (n *Node) StallBefore(ctx context.Context, syscall, path string) error {
	return n.trace(ctx, syscall, stalled("delay_enter"), "-P", path)
}

// StallChild lets strace stall each process that the daemon starts before a system call. See
// StallAfter.
func (n *Node) StallChild(ctx context.Context, syscall string) error {
	return n.trace(ctx, syscall, stalled("delay_enter"))
}

// calls are the numbers of the system calls for WaitChildIn.
var calls = map[string]int{"close_range": unix.SYS_CLOSE_RANGE, "pivot_root": unix.SYS_PIVOT_ROOT, "capset": unix.SYS_CAPSET}

// WaitChildIn waits until a process of the daemon is stalled in a system call by StallChild.
func (n *Node) WaitChildIn(ctx context.Context, syscall string) error {
	return poll(ctx, pollInterval, func() error {
		children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", n.Pid()))
		if err != nil {
			return err
		}
		for _, file := range children {
			pids, _ := os.ReadFile(file) // empty for a thread that has ended
			for pid := range strings.FieldsSeq(string(pids)) {
				// The file begins with the number (proc_pid_syscall(5)).
				call, _ := os.ReadFile(filepath.Join("/proc", pid, "syscall"))
				if strings.HasPrefix(string(call), strconv.Itoa(calls[syscall])+" ") {
					return nil
				}
			}
		}
		return fmt.Errorf("no process of the daemon is in %s: %w", syscall, errdefs.ErrUnavailable)
	})
}

// FailChild lets strace fail a system call of the processes that the daemon starts, with an error
// such as "EIO", until EndTrace.
func (n *Node) FailChild(ctx context.Context, syscall, errno string) error {
	return n.trace(ctx, syscall, "error="+errno)
}

// EndTrace detaches strace from the daemon, which continues.
func (n *Node) EndTrace() error {
	if n.tracer == nil {
		return nil
	}
	err := n.tracer.Process.Signal(unix.SIGTERM) // strace detaches from each thread first
	_ = n.tracer.Wait()
	n.tracer = nil
	return err
}

// stalled returns what strace does to a system call that has to wait.
func stalled(when string) string {
	return fmt.Sprintf("%s=%d", when, stallTime.Microseconds())
}

func (n *Node) trace(ctx context.Context, syscall, injection string, flags ...string) error {
	inject := fmt.Sprintf("inject=%s:%s", syscall, injection)
	flags = append(flags, "-f", "-qq", "-o", "/dev/null", "-e", "trace="+syscall, "-e", inject, "-p", strconv.Itoa(n.Pid()))
	n.tracer = exec.Command("strace", flags...)
	if err := n.tracer.Start(); err != nil {
		return fmt.Errorf("failed to start strace, `make deps` installs it: %w", err)
	}
	return poll(ctx, pollInterval, func() error {
		statuses, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", n.Pid()))
		if err != nil {
			return err
		}
		for _, file := range statuses {
			if status, err := os.ReadFile(file); err == nil && bytes.Contains(status, []byte("TracerPid:\t0\n")) {
				return fmt.Errorf("strace doesn't watch %q: %w", file, errdefs.ErrUnavailable)
			}
		}
		return nil
	})
}

// endStall detaches strace from a daemon that is being killed: otherwise the daemon could not be
// reaped.
func (n *Node) endStall() {
	if n.tracer == nil {
		return
	}
	_ = n.tracer.Process.Signal(unix.SIGKILL) // strace may have ended
	_ = n.tracer.Wait()
	n.tracer = nil
}
