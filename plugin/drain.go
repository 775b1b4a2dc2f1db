package plugin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// drain says whether new pods are taken. While they aren't, a file says so, for the daemons to come. The zero value takes pods and can't
// be changed. Its methods may be called by many goroutines.
type drain struct {
	since atomic.Pointer[time.Time] // nil while pods are taken

	mu   sync.Mutex // one change at a time
	path string
}

// drainFile is the file's name, in podfsm's root directory. It is empty; its time is when the drain began.
const drainFile = "draining"

// open reads how an earlier daemon has left it.
func (d *drain) open(dir string) error {
	path := filepath.Join(dir, drainFile)
	info, err := os.Stat(path)
	switch {
	case err == nil:
		since := info.ModTime()
		d.since.Store(&since)
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("failed to find out whether the node is being drained: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.path = path
	return nil
}

// set begins or ends the drain, durably. To begin or end it twice is no error.
func (d *drain) set(draining bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.path == "":
		return fmt.Errorf("podfsm has no directory to keep a drain in: %w", errdefs.ErrUnavailable)
	case draining == (d.since.Load() != nil):
		return nil
	case draining:
		if err := writeEmpty(d.path); err != nil {
			return fmt.Errorf("failed to begin the drain: %w", errors.Join(err, os.RemoveAll(d.path)))
		}
		now := time.Now()
		d.since.Store(&now)
	default:
		if err := os.RemoveAll(d.path); err != nil {
			return fmt.Errorf("failed to end the drain: %w", err)
		}
		d.since.Store(nil)
		if err := syncFile(filepath.Dir(d.path)); err != nil {
			return fmt.Errorf("the drain has ended, but may be back after a crash of the node: %w", err)
		}
	}
	return nil
}

// writeEmpty makes an empty file, durably.
func writeEmpty(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return errors.Join(syncFile(path), syncFile(filepath.Dir(path)))
}

// syncFile makes a file's content, or a directory's entries, durable.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// takesPods fails with Unavailable while no new pod is taken.
func (c *Controller) takesPods() error {
	if err := c.well(); err != nil {
		return err
	}
	if c.drain.since.Load() != nil {
		return fmt.Errorf("podfsm is being drained and takes no new pods; `podfsm drain --cancel` on the node ends that: %w", errdefs.ErrUnavailable)
	}
	return nil
}
