// Package faults makes named points in running processes fail, wait or die as a
// test tells them to.
//
// The test and the processes share a control directory. The test writes a
// program for a point:
//
//	1*error(no space left)->2*delay(500)->block
//
// Each term says what the next hits of the point do: N times with a leading
// "N*", else forever:
//
//	off           nothing
//	error(TEXT)   Hit returns an error with this text, which must not contain ")->"
//	delay(MS)     Hit waits, in milliseconds
//	block         Hit waits until the test releases the point
//	die           the process kills itself by SIGKILL
//
// A program that has run out does nothing. The form follows the failpoints of
// FreeBSD's fail(9).
package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Env names the environment variable that holds the control directory.
const Env = "PODFSM_FAULTS"

// pollInterval is the time between two looks at the control directory. Files survive the death of a
// process, a connection would not.
const pollInterval = 2 * time.Millisecond

// Hit passes the point in the control directory named by Env. Without that variable or a program
// for the point, it returns nil at once.
func Hit(ctx context.Context, point string) error {
	dir := os.Getenv(Env)
	if dir == "" {
		return nil
	}
	return Dir(dir).Hit(ctx, point)
}

// Dir is a control directory. Its methods are safe for concurrent use, also
// from several processes.
type Dir string

// Set gives the point a program and resets its hits.
//
// Errors: ErrInvalidArgument for an invalid program.
func (d Dir) Set(point, text string) error {
	if _, err := parse(text); err != nil {
		return err
	}
	if err := d.Clear(point); err != nil {
		return err
	}
	// A reader must never see half a program.
	if err := os.WriteFile(d.file(point, "new"), []byte(text), 0o600); err != nil {
		return fmt.Errorf("failed to set fault point %q: %w", point, err)
	}
	return os.Rename(d.file(point, "new"), d.file(point, "program"))
}

// Clear turns the point off. Blocked hits continue.
func (d Dir) Clear(point string) error {
	for _, kind := range []string{"program", "hits", "release"} {
		if err := os.Remove(d.file(point, kind)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("failed to clear fault point %q: %w", point, err)
		}
	}
	return nil
}

// Release lets blocked and later hits of the point continue.
func (d Dir) Release(point string) error {
	if err := os.WriteFile(d.file(point, "release"), nil, 0o600); err != nil {
		return fmt.Errorf("failed to release fault point %q: %w", point, err)
	}
	return nil
}

// Hits returns how often the point was reached since its program was set.
func (d Dir) Hits(point string) (int, error) {
	data, err := os.ReadFile(d.file(point, "hits"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("failed to read hits of fault point %q: %w", point, err)
	}
	return len(data), nil
}

// WaitReached waits until the point was reached n times since its program was set.
func (d Dir) WaitReached(ctx context.Context, point string, n int) error {
	for {
		hits, err := d.Hits(point)
		if err != nil || hits >= n {
			return err
		}
		if err := pause(ctx, pollInterval); err != nil {
			return fmt.Errorf("fault point %q was reached %d times, not %d: %w", point, hits, n, err)
		}
	}
}

// Hit counts a hit of the point and runs the point's program for it. The error is that of an
// error(TEXT) term, or wraps the error of ctx.
func (d Dir) Hit(ctx context.Context, point string) error {
	text, err := os.ReadFile(d.file(point, "program"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("failed to read fault point %q: %w", point, err)
	}
	p, err := parse(string(text))
	if err != nil {
		return err
	}
	hit, err := d.count(point)
	if err != nil {
		return err
	}
	return d.act(ctx, point, p.at(hit))
}

func (d Dir) act(ctx context.Context, point string, a action) error {
	switch a.kind {
	case "error":
		return errors.New(a.text)
	case "delay":
		return pause(ctx, a.delay)
	case "block":
		return d.block(ctx, point)
	case "die":
		return unix.Kill(unix.Getpid(), unix.SIGKILL)
	}
	return nil
}

func (d Dir) block(ctx context.Context, point string) error {
	for {
		if exists(d.file(point, "release")) || !exists(d.file(point, "program")) {
			return nil
		}
		if err := pause(ctx, pollInterval); err != nil {
			return fmt.Errorf("blocked at fault point %q: %w", point, err)
		}
	}
}

// Lock waits for the exclusive lock of a file. A signal interrupts the system call, but not the
// wait.
func Lock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// count adds a byte for this hit and returns its number. The lock orders the hits of several
// processes.
func (d Dir) count(point string) (int, error) {
	f, err := os.OpenFile(d.file(point, "hits"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return 0, fmt.Errorf("failed to count a hit of fault point %q: %w", point, err)
	}
	defer f.Close()
	if err := Lock(f); err != nil {
		return 0, fmt.Errorf("failed to lock fault point %q: %w", point, err)
	}
	if _, err := f.WriteString("."); err != nil {
		return 0, fmt.Errorf("failed to count a hit of fault point %q: %w", point, err)
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return int(info.Size()), nil
}

// Points returns the points that have a program.
func (d Dir) Points() ([]string, error) {
	files, err := filepath.Glob(d.file("*", "program"))
	if err != nil {
		return nil, err
	}
	points := make([]string, len(files))
	for i, f := range files {
		points[i] = strings.TrimSuffix(filepath.Base(f), ".program")
	}
	return points, nil
}

func (d Dir) file(point, kind string) string {
	return filepath.Join(string(d), point+"."+kind)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
