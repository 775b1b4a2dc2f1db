package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// scenario is a sequence of steps on a machine.
type scenario struct {
	name    string
	smoke   bool
	on      platform
	cluster bool   // needs Kubernetes, whose first build takes half an hour
	options string // for the kernel
	critest bool   // it needs critest
	rounds  int    // of power cuts
	do      step
}

// scenarioTimeout bounds a scenario, which has roundTimeout more for each round.
const (
	scenarioTimeout = 2 * time.Hour
	roundTimeout    = 5 * time.Minute
)

// try runs the scenario on a new machine. After a failure, the logs, the journal and podfsm's files
// are kept, or the disk if the machine does not answer.
func (s scenario) try(ctx context.Context, dir string, base base, parts string) (err error) {
	begun := time.Now()
	dir = filepath.Join(dir, s.name)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	progress("=== %s", s.name)
	timeout := scenarioTimeout + time.Duration(s.rounds)*roundTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not done within %v", timeout))
	defer cancel()
	m, err := newMachine(ctx, dir, base, parts)
	if err != nil {
		return err
	}
	m.options = s.options
	disks := []string{"root.qcow2", "parts.qcow2"}
	defer func() {
		m.cut()
		for _, disk := range disks {
			err = errors.Join(err, os.Remove(m.path(disk)))
		}
	}()
	log, err := os.Create(m.path("scenario.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	if err := steps(boot, s.do, shutDown)(ctx, m, &results{log: log}); err != nil {
		if kept := m.keep(ctx); kept != nil {
			progress("the machine does not answer, its disk is %s: %v", m.path("root.qcow2"), kept)
			disks = disks[1:]
		}
		return err
	}
	progress("--- PASS: %s (%.0f s)", s.name, time.Since(begun).Seconds())
	return nil
}

// keep saves what explains a failure.
func (m *machine) keep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	for file, script := range map[string]string{
		"journal.log": "journalctl --no-pager --output short-precise",
		"state.tar":   "cd /; tar -cf - --ignore-failed-read --warning=none lab/.build/failed {var/lib,run}/containerd/io.containerd.podsandbox.controller.v1.podfsm 2>/dev/null || true",
	} {
		f, err := os.Create(m.path(file))
		if err != nil {
			return err
		}
		err = m.run(ctx, f, script)
		f.Close()
		if err != nil {
			return fmt.Errorf("failed to keep %s: %w", file, err)
		}
	}
	return nil
}

// results shows the result of each test, and keeps the whole output. It is safe for concurrent use.
type results struct {
	mu   sync.Mutex
	log  io.Writer
	rest []byte
}

func (r *results) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rest = append(r.rest, p...)
	for {
		line, rest, found := bytes.Cut(r.rest, []byte("\n"))
		if !found {
			break
		}
		if bytes.HasPrefix(line, []byte("--- ")) || bytes.HasPrefix(line, []byte("    --- FAIL")) {
			progress("    %s", line)
		}
		r.rest = rest
	}
	return r.log.Write(p)
}
