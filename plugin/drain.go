package plugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/records"
)

// drain says whether new pods are taken. While they aren't, a file says so, for the daemons to come. The zero value takes pods and can't
// be changed. Its methods may be called by many goroutines.
type drain struct {
	changing sync.Mutex // one change at a time
	path     string

	mu       sync.Mutex
	since    time.Time     // when the drain began; zero while pods are taken
	entering int           // pods that were let in, and aren't on record yet
	settled  chan struct{} // closed once there are none; nil while nobody waits for that
}

var errDraining = fmt.Errorf("podfsm is being drained and takes no new pods; `podfsm drain --cancel` on the node ends that: %w", errdefs.ErrUnavailable)

// open reads how an earlier daemon has left it.
func (d *drain) open(dir string) error {
	since, err := records.DrainingSince(dir)
	if err != nil {
		return err
	}
	d.setSince(since)
	d.changing.Lock()
	defer d.changing.Unlock()
	d.path = filepath.Join(dir, records.DrainFile)
	return nil
}

// begin has no new pod taken, durably, and waits for those that were let in before: when it has succeeded, every pod that there can be is
// on record. When ctx ends first, it fails, and the drain goes on. To begin it again is no error.
func (d *drain) begin(ctx context.Context) error {
	if err := d.refuse(); err != nil {
		return err
	}
	select {
	case <-d.settling():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("no new pods are taken, but one that was let in before isn't on record yet: %w", context.Cause(ctx))
	}
}

// refuse has no new pod taken, durably.
func (d *drain) refuse() error {
	d.changing.Lock()
	defer d.changing.Unlock()
	if d.path == "" {
		return errNoDrain
	}
	if _, draining := d.draining(); draining {
		return nil
	}
	if err := writeEmpty(d.path); err != nil {
		return fmt.Errorf("failed to begin the drain: %w", errors.Join(err, os.RemoveAll(d.path)))
	}
	d.setSince(time.Now())
	return nil
}

// end has new pods taken again, durably. To end it twice is no error.
func (d *drain) end() error {
	d.changing.Lock()
	defer d.changing.Unlock()
	if d.path == "" {
		return errNoDrain
	}
	if _, draining := d.draining(); !draining {
		return nil
	}
	if err := os.RemoveAll(d.path); err != nil {
		return fmt.Errorf("failed to end the drain: %w", err)
	}
	d.setSince(time.Time{})
	if err := syncFile(filepath.Dir(d.path)); err != nil {
		return fmt.Errorf("the drain has ended, but may be back after a crash of the node: %w", err)
	}
	return nil
}

var errNoDrain = fmt.Errorf("podfsm has no directory to keep a drain in: %w", errdefs.ErrUnavailable)

// enter lets a new pod in, or fails with Unavailable while none is taken. left has to be called once the pod is on record, or isn't going
// to be.
func (d *drain) enter() (left func(), _ error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.since.IsZero() {
		return nil, errDraining
	}
	d.entering++
	return d.leave, nil
}

func (d *drain) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.entering--
	if d.entering == 0 && d.settled != nil {
		close(d.settled)
		d.settled = nil
	}
}

// settling is closed as soon as no pod that was let in is on its way.
func (d *drain) settling() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.settled == nil {
		d.settled = make(chan struct{})
	}
	settled := d.settled
	if d.entering == 0 {
		close(settled)
		d.settled = nil
	}
	return settled
}

func (d *drain) setSince(since time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.since = since
}

// draining says whether no new pods are taken, and since when.
func (d *drain) draining() (since time.Time, _ bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since, !d.since.IsZero()
}

// settledSince is when the drain began; false while pods are taken, or one that was let in before it isn't on record yet.
func (d *drain) settledSince() (time.Time, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since, !d.since.IsZero() && d.entering == 0
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
