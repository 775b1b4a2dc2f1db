package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// group is a process that leads a process group of its own.
type group struct {
	cmd            *exec.Cmd
	stdout, stderr io.Reader
}

// startGroup starts cmd, unless ctx has ended. Its WaitDelay is how long [group.wait] waits for pipes after it has ended.
func startGroup(ctx context.Context, cmd *exec.Cmd) (*group, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	return &group{cmd, stdout, stderr}, cmd.Start()
}

// wait copies the output, and returns how the process has ended once no process of its group lives. When ctx ends first, it kills
// the group and returns the cause of that; and WaitDelay after the end of the process, it kills those that still hold the pipes.
//
// A process that can't be killed, because it hangs in the kernel, is waited for without end: to go on beside it would race with it.
func (g *group) wait(ctx context.Context, stdout, stderr io.Writer) error {
	var copies sync.WaitGroup
	copies.Go(func() { io.Copy(stdout, g.stdout) })
	copies.Go(func() { io.Copy(stderr, g.stderr) })
	drained := closedAfter(copies.Wait)
	exited := closedAfter(g.waitForExit)

	var killed error
	select {
	case <-exited:
	case <-ctx.Done():
		killed = fmt.Errorf("killed: %w", context.Cause(ctx))
		g.kill()
		<-exited
	}
	select {
	case <-drained:
	case <-time.After(g.cmd.WaitDelay):
	case <-ctx.Done():
	}
	g.kill()

	err := g.cmd.Wait() // closes our ends of the pipes
	<-drained
	waitForGroupEnd(g.cmd.Process.Pid)

	if killed != nil {
		return killed
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		return nil // the process itself succeeded
	}
	return err
}

func closedAfter(wait func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait()
	}()
	return done
}

// waitForExit returns when the process has ended, and leaves it a zombie, which keeps the group's number from being reused.
func (g *group) waitForExit() {
	for unix.Waitid(unix.P_PID, g.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}

// kill ends all processes of the group, and the process itself if it has left it. It must not be called after the process was
// reaped, when the number may be another's.
func (g *group) kill() {
	pid := g.cmd.Process.Pid
	_ = unix.Kill(-pid, unix.SIGKILL) // fails only when there is none
	_ = unix.Kill(pid, unix.SIGKILL)
}

// waitForGroupEnd returns when no process of a group whose leader was reaped lives. All have been killed, so it takes no longer
// than the kernel needs to end them.
func waitForGroupEnd(pgid int) {
	for delay := time.Millisecond; groupLives(pgid); delay = min(2*delay, 100*time.Millisecond) {
		time.Sleep(delay)
	}
}

func groupLives(pgid int) bool {
	if errors.Is(unix.Kill(-pgid, 0), unix.ESRCH) {
		return false
	}
	// The kernel gives the number to a process again only after the group has none left.
	if !errors.Is(unix.Kill(pgid, 0), unix.ESRCH) {
		return false
	}
	// Zombies count for kill(2). They are there for a moment, and for good where nobody reaps orphans.
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		if memberLives(stat, pgid) {
			return true
		}
	}
	return false
}

// memberLives tells whether the process of a /proc/PID/stat is in the group and no zombie: fields 3, state, and 5, pgrp, of
// proc_pid_stat(5), which are counted from the end of the name because that may hold anything.
func memberLives(stat string, pgid int) bool {
	data, err := os.ReadFile(stat)
	if err != nil {
		return false // it has ended meanwhile
	}
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 3 || string(fields[2]) != strconv.Itoa(pgid) {
		return false
	}
	state := string(fields[0])
	return state != "Z" && state != "X"
}
