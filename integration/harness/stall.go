package harness

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// stallTime is how long a stalled system call lasts unless the daemon ends.
const stallTime = time.Minute

// StallAfter has strace hold the running daemon when it has made the system
// call on the path, and StallBefore when it is about to. It lasts until the
// daemon is killed, and reaches what no fault point can: the middle of what one
// function does. They return when strace watches all of the daemon's threads.
func (n *Node) StallAfter(ctx context.Context, syscall, path string) error {
	return n.stall(ctx, syscall, "delay_exit", path)
}

// StallBefore: see StallAfter.
func (n *Node) StallBefore(ctx context.Context, syscall, path string) error {
	return n.stall(ctx, syscall, "delay_enter", path)
}

func (n *Node) stall(ctx context.Context, syscall, when, path string) error {
	inject := fmt.Sprintf("inject=%s:%s=%d", syscall, when, stallTime.Microseconds())
	n.tracer = exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+syscall, "-e", inject, "-P", path, "-p", strconv.Itoa(n.Pid()))
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

// endStall lets go of a daemon that is being killed: strace would keep it from
// being waited for.
func (n *Node) endStall() {
	if n.tracer == nil {
		return
	}
	_ = n.tracer.Process.Signal(unix.SIGKILL) // it may have ended
	_ = n.tracer.Wait()
	n.tracer = nil
}
