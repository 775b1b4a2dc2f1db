package remapping

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/podfsm/podfsm/snapshot/owners"
	"github.com/podfsm/podfsm/tracing"
)

// entry is a layer in use, being made, or being removed. users is guarded by the snapshotter's
// lock. work and err don't change after done is closed.
type entry struct {
	users   int
	leaving bool // being removed; done is closed after the removal
	done    chan struct{}
	cancel  context.CancelFunc
	work    Work
	err     error
}

func (e *entry) finished() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}

// hold returns when the layer exists, and keeps it from collection until release. The first caller
// makes the layer, concurrent callers wait for it. A layer is completed even if all callers give
// up, because the kubelet retries.
func (s *Snapshotter) hold(ctx context.Context, b *backend, l layer) (work Work, release func(), err error) {
	for {
		e, first, err := s.join(ctx, b, l)
		if err != nil {
			return Work{}, nil, err
		}
		leave := func() {}
		if !e.leaving {
			leave = sync.OnceFunc(func() { s.leave(l.key(), e) })
		}
		select {
		case <-ctx.Done():
			leave()
			return Work{}, nil, fmt.Errorf("failed to wait for the remap of image %q: %w", l.parent, ctx.Err())
		case <-e.done:
		}
		if e.leaving {
			continue // removed
		}
		if e.err != nil {
			leave()
			return Work{}, nil, e.err
		}
		if !first {
			return Work{}, leave, nil
		}
		return e.work, leave, nil
	}
}

// join adds a user of the layer, and starts to make it for the first one. If the entry is leaving,
// join adds no user, and the caller waits for the removal.
func (s *Snapshotter) join(ctx context.Context, b *backend, l layer) (_ *entry, first bool, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, fmt.Errorf("containerd is stopping: %w", errdefs.ErrUnavailable)
	}
	if e := s.entries[l.key()]; e != nil {
		if !e.leaving {
			e.users++
		}
		return e, false, nil
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	e := &entry{users: 1, done: make(chan struct{}), cancel: cancel}
	s.entries[l.key()] = e
	s.running.Go(func() {
		defer cancel()
		work, err := s.make(ctx, b, l)
		s.mu.Lock()
		defer s.mu.Unlock()
		e.work, e.err = work, err
		if err != nil || e.users == 0 {
			delete(s.entries, l.key()) // the next call checks again
		}
		close(e.done)
	})
	return e, true, nil
}

// leave removes a user.
func (s *Snapshotter) leave(key string, e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.users--
	if e.users == 0 && e.finished() && s.entries[key] == e {
		delete(s.entries, key)
	}
}

// removeLayer removes a layer, finished or not, unless it is in use. Concurrent callers of hold
// wait, and make the layer again.
func (s *Snapshotter) removeLayer(ctx context.Context, b *backend, key string) error {
	l, _ := parseLayer(key)
	s.mu.Lock()
	if s.entries[l.key()] != nil {
		s.mu.Unlock()
		return nil
	}
	e := &entry{leaving: true, done: make(chan struct{}), cancel: func() {}}
	s.entries[l.key()] = e
	s.mu.Unlock()
	err := b.Remove(ctx, key)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, l.key())
	close(e.done)
	return err
}

// parallelLayers bounds the layers that are made in parallel, each by several workers. After a
// drain, all pods of a node start at once.
const parallelLayers = 4

// make makes a missing layer.
func (s *Snapshotter) make(ctx context.Context, b *backend, l layer) (work Work, err error) {
	defer func() {
		if p := recover(); p != nil { // a panic would end the daemon
			err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
			log.G(ctx).WithError(err).Errorf("panic, please report it: %s", debug.Stack())
		}
	}()
	if _, err := b.Stat(ctx, l.key()); !errdefs.IsNotFound(err) {
		return Work{}, err
	}
	select {
	case s.makers <- struct{}{}:
		defer func() { <-s.makers }()
	case <-ctx.Done():
		return Work{}, ctx.Err()
	}
	ctx, span := tracing.Start(ctx, tracing.SpanRemap, tracing.SnapshotStrategy.String(string(l.strategy)))
	defer func() {
		span.SetAttributes(tracing.SnapshotInodes.Int64(work.Inodes), tracing.SnapshotBytes.Int64(work.Bytes))
		tracing.End(span, err)
	}()
	started := time.Now()
	stats, err := b.remap(ctx, l)
	if err != nil {
		return Work{}, fmt.Errorf("failed to remap the owners of image %q by %s: %w", l.parent, l.strategy, err)
	}
	work = Work{Inodes: stats.Inodes, Bytes: stats.Bytes, Took: time.Since(started)}
	s.count(l.strategy, work)
	log.G(ctx).WithFields(log.Fields{
		"strategy": l.strategy, "parent": l.parent, "inodes": work.Inodes, "bytes": work.Bytes, "seconds": work.Took.Seconds(),
	}).Info("remapped the owners of an image")
	return work, nil
}

// Phases of making a layer, in order.
const (
	PhasePrepared  = "prepared"  // recorded as unfinished
	PhaseMounted   = "mounted"   // owners not changed yet
	PhaseShifted   = "shifted"   // all owners changed
	PhaseCommitted = "committed" // recorded as finished, and not used yet
)

// AtPhase is called after each phase of making a layer, which fails with its error. It is for test
// builds, and must be set before containerd runs.
var AtPhase = func(_ context.Context, phase string) error { return nil }

// remap makes a layer. If it is killed, it leaves the complete layer, or an unfinished snapshot
// that the next try replaces.
func (b *backend) remap(ctx context.Context, l layer) (stats owners.Stats, err error) {
	if err := b.Remove(ctx, l.making()); err != nil && !errdefs.IsNotFound(err) {
		return stats, err
	}
	mounts, err := b.Prepare(ctx, l.making(), l.parent)
	if err != nil {
		return stats, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.discard(context.WithoutCancel(ctx), l.making()))
		}
	}()
	if err := AtPhase(ctx, PhasePrepared); err != nil {
		return stats, err
	}
	if stats, err = shift(ctx, b.dir(), l, mounts); err != nil {
		return stats, err
	}
	if err := AtPhase(ctx, PhaseShifted); err != nil {
		return stats, err
	}
	// The work directory holds an index, which counts as a path of each file with hard links.
	if err := os.RemoveAll(option(mounts, "workdir")); err != nil {
		return stats, err
	}
	// Not by the snapshotter's Commit, which would walk all files again to compute a size that is
	// never shown.
	err = b.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, l.making(), l.key(), snapshots.Usage{Inodes: stats.Inodes})
		return err
	})
	if err != nil {
		return stats, err
	}
	return stats, AtPhase(ctx, PhaseCommitted)
}

// discard removes an unfinished layer and its files.
func (b *backend) discard(ctx context.Context, key string) error {
	if err := b.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return b.cleanup(ctx)
}

// dir returns the directory with the files of all snapshots.
func (b *backend) dir() string { return filepath.Join(b.root, "snapshots") }

// shift changes the owners in a private overlay.
func shift(ctx context.Context, dir string, l layer, mounts []mount.Mount) (stats owners.Stats, err error) {
	root, err := openOverlay(dir, remapOptions(dir, l.strategy, mounts))
	if err != nil {
		return stats, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	if err := AtPhase(ctx, PhaseMounted); err != nil {
		return stats, err
	}
	return owners.Shift(ctx, root, l.maps)
}

// remapOptions returns the options of the overlay in which the owners are changed. Without
// index=on, hard links would become separate files. metacopy is set by the strategy, whatever the
// node's default. The overlay is volatile, so files are not synced one by one: a layer is only used
// until the next boot.
func remapOptions(dir string, strategy Strategy, mounts []mount.Mount) []string {
	options := []string{"index=on", "metacopy=off", "volatile"}
	if strategy == Metacopy {
		options[1] = "metacopy=on"
	}
	for _, o := range mounts[len(mounts)-1].Options {
		for _, key := range []string{"lowerdir=", "upperdir=", "workdir="} {
			if strings.HasPrefix(o, key) {
				options = append(options, strings.ReplaceAll(o, dir+"/", "")) // mount(2) accepts one page of options
			}
		}
	}
	return options
}

// option returns the value of an option of the last mount, "" if it is not set.
func option(mounts []mount.Mount, key string) string {
	if len(mounts) == 0 {
		return ""
	}
	for _, o := range mounts[len(mounts)-1].Options {
		if value, ok := strings.CutPrefix(o, key+"="); ok {
			return value
		}
	}
	return ""
}
