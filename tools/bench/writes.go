package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// writes counts the syncs and written bytes of each daemon, and of the programs that it waits for,
// from the start of a pod to its removal. It is a separate run, because strace slows everything
// down. The pods have the users of the node, because an unmodified containerd itself traces the
// process with which it makes user namespaces.
func writes(ctx context.Context, b *bench) error {
	for _, s := range b.sides {
		if err := b.countWrites(ctx, s, b.fewer(25)); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func (b *bench) countWrites(ctx context.Context, s *side, pods int) (err error) {
	trace := filepath.Join(s.node.Dir(), "tmp/strace")
	strace := exec.CommandContext(ctx, "strace", "-f", "-qq", "-o", trace, "-e", "trace=fsync,fdatasync", "-p", strconv.Itoa(s.node.Pid()))
	var stderr bytes.Buffer
	strace.Stderr = &stderr
	if err := strace.Start(); err != nil {
		return fmt.Errorf("failed to start strace, `make deps` installs it: %w", err)
	}
	defer func() {
		_ = strace.Process.Signal(unix.SIGINT) // lets go of the daemon
		if end := strace.Wait(); end != nil && !errors.As(end, new(*exec.ExitError)) {
			err = errors.Join(err, end)
		}
	}()
	if err := s.awaitTracer(ctx); err != nil {
		return errors.Join(err, errors.New(stderr.String()))
	}
	syncs, written, err := s.writesSoFar(trace)
	if err != nil {
		return err
	}
	for range pods {
		if _, err := cycle(ctx, s, onHost); err != nil {
			return err
		}
	}
	syncsAfter, writtenAfter, err := s.writesSoFar(trace)
	if err != nil {
		return err
	}
	b.results.add(metric(syncsPerPod, onHost), s.name, 0, float64(syncsAfter-syncs)/float64(pods))
	b.results.add(metric(bytesPerPod, onHost), s.name, 0, float64(writtenAfter-written)/float64(pods))
	return nil
}

// writesSoFar returns the number of syncs that strace has seen, and of bytes that the daemon has
// written.
func (s *side) writesSoFar(trace string) (syncs, bytesWritten int, err error) {
	calls, err := os.ReadFile(trace)
	if err != nil {
		return 0, 0, err
	}
	bytesWritten, err = writtenBytes(s.node.Pid())
	return bytes.Count(calls, []byte("sync(")), bytesWritten, err
}

// awaitTracer waits until strace watches all threads of the daemon.
func (s *side) awaitTracer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		untraced := 0
		statuses, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", s.node.Pid())) // a pattern that is well-formed
		for _, file := range statuses {
			if status, err := os.ReadFile(file); err == nil && bytes.Contains(status, []byte("TracerPid:\t0\n")) {
				untraced++
			}
		}
		if untraced == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("strace doesn't watch the daemon: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// writtenBytes returns the bytes that a process and its reaped children have written to disks
// (proc_pid_io(5)).
func writtenBytes(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, err
	}
	_, after, found := strings.Cut(string(text), "\nwrite_bytes: ")
	if !found {
		return 0, errors.New("the kernel doesn't count written bytes")
	}
	line, _, _ := strings.Cut(after, "\n")
	return strconv.Atoi(line)
}
