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

// writes counts what each daemon syncs and writes for a pod, in a run of its own: strace makes everything slow. The pods are on the node's
// users, because an unmodified containerd traces the process that it makes user namespaces with itself.
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
	count := syncs{trace: trace}
	ledger := filepath.Join(s.node.Dir(), "state/io.containerd.podsandbox.controller.v1.podfsm")
	written, err := writtenBytes(s.node.Pid())
	if err != nil {
		return err
	}
	logged := sizeOf(ledger)
	var phases times
	for range pods {
		l, err := s.newLife(ctx, onHost)
		if err != nil {
			return err
		}
		for _, phase := range []struct {
			act   func(context.Context) (float64, error)
			count *float64
		}{{l.start, &phases.start}, {l.stop, &phases.stop}, {l.remove, &phases.remove}} {
			if _, err := phase.act(ctx); err != nil {
				return err
			}
			n, err := count.since()
			if err != nil {
				return err
			}
			*phase.count += float64(n)
		}
	}
	after, err := writtenBytes(s.node.Pid())
	if err != nil {
		return err
	}
	each := func(n float64) float64 { return n / float64(pods) }
	b.results.add(metric(syncsStart, onHost), s.name, 0, each(phases.start))
	b.results.add(metric(syncsStop, onHost), s.name, 0, each(phases.stop))
	b.results.add(metric(syncsRemove, onHost), s.name, 0, each(phases.remove))
	b.results.add(metric(bytesWritten, onHost), s.name, 0, each(float64(after-written)))
	if s.name == podfsmSide {
		b.results.add(metric(ledgerBytes, onHost), s.name, 0, each(float64(sizeOf(ledger)-logged)))
	}
	return nil
}

// awaitTracer returns when strace watches all of the daemon's threads.
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

// syncs counts the calls in a file that strace writes.
type syncs struct {
	trace string
	seen  int
}

func (c *syncs) since() (int, error) {
	text, err := os.ReadFile(c.trace)
	if err != nil {
		return 0, err
	}
	all := bytes.Count(text, []byte("sync("))
	n := all - c.seen
	c.seen = all
	return n, nil
}

// writtenBytes are those that a process, without its children, has had written to disks (proc_pid_io(5)).
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

// sizeOf is that of all files in a directory, 0 without one.
func sizeOf(dir string) int64 {
	var size int64
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		if info, err := f.Info(); err == nil {
			size += info.Size()
		}
	}
	return size
}
