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

	"github.com/podfsm/podfsm/ledger/records"
)

// drain refuses new pods from [drain.begin] to [drain.end], also across restarts: a file in the
// root directory records it. The zero value takes pods and can't be changed. Its methods may be
// called by many goroutines.
type drain struct {
	changing sync.Mutex // one change at a time
	path     string

	mu       sync.Mutex
	since    time.Time     // when the drain began; zero while pods are taken
	entering int           // pods that were admitted and aren't in the ledger yet
	settled  chan struct{} // closed when entering is 0; nil while no caller waits
}

var errDraining = fmt.Errorf("podfsm is draining and takes no new pods; run `podfsm drain --cancel` on the node to end the drain: %w", errdefs.ErrUnavailable)

// open restores the drain that an earlier daemon recorded.
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

// begin starts the drain, durably, and waits until the pods admitted before are in the ledger.
// After begin has succeeded, no pod can be missing from a list. If ctx ends first, begin fails and
// the drain stays on. It is idempotent.
func (d *drain) begin(ctx context.Context) error {
	if err := d.refuse(); err != nil {
		return err
	}
	select {
	case <-d.settling():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("drain started, but a pod admitted before is not in the ledger yet: %w", context.Cause(ctx))
	}
}

// refuse starts the drain, durably, and doesn't wait.
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
		return fmt.Errorf("failed to start the drain: %w", errors.Join(err, os.RemoveAll(d.path)))
	}
	d.setSince(time.Now())
	return nil
}

// end ends the drain, durably. It is idempotent.
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
		return fmt.Errorf("drain ended, but may return after a crash of the node: %w", err)
	}
	return nil
}

var errNoDrain = fmt.Errorf("podfsm has no directory to keep a drain in: %w", errdefs.ErrUnavailable)

// enter admits a new pod, or fails with Unavailable during a drain. The caller calls left when the
// pod is in the ledger or has failed.
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

// settling returns a channel that is closed when all admitted pods are in the ledger.
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

// draining reports whether a drain is on, and since when.
func (d *drain) draining() (since time.Time, _ bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since, !d.since.IsZero()
}

// settledSince returns when the drain began. It returns false without a drain, and until all pods
// admitted before are in the ledger.
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
