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

// entry is a layer that somebody waits for or is about to use, or that is being
// removed. Its users are guarded by the snapshotter's lock; work and err don't
// change once done is closed.
type entry struct {
	users   int
	leaving bool // nobody may join; done is closed when it has gone
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

// hold returns once the layer is there. It isn't collected before release. The
// first who needs it makes it, and all others wait for that. It is made to its end
// also when nobody waits any more: the kubelet will ask again.
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
			return Work{}, nil, fmt.Errorf("gave up on waiting for the owners of image %q: %w", l.parent, ctx.Err())
		case <-e.done:
		}
		if e.leaving {
			continue // it has gone
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

// join becomes a user of the layer, and starts to make it for the first one. An
// entry that is leaving is returned as it is, to be waited for.
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
			delete(s.entries, l.key()) // the next one looks again
		}
		close(e.done)
	})
	return e, true, nil
}

// leave ends a use.
func (s *Snapshotter) leave(key string, e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.users--
	if e.users == 0 && e.finished() && s.entries[key] == e {
		delete(s.entries, key)
	}
}

// removeLayer removes a layer, or what is left of an unfinished one, unless
// somebody uses it. Who comes meanwhile waits, and makes it anew.
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

// parallelLayers bounds the layers that are made at a time, each by several workers:
// after a drain, all pods of a node come at once.
const parallelLayers = 4

// make makes a layer that isn't there yet.
func (s *Snapshotter) make(ctx context.Context, b *backend, l layer) (work Work, err error) {
	defer func() {
		if p := recover(); p != nil { // which would end the daemon
			log.G(ctx).Errorf("podfsm: panic: %v\n%s", p, debug.Stack())
			err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
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
		return Work{}, fmt.Errorf("failed to give image %q the owners of a user namespace by %s: %w", l.parent, l.strategy, err)
	}
	work = Work{Inodes: stats.Inodes, Bytes: stats.Bytes, Took: time.Since(started)}
	s.count(l.strategy, work)
	log.G(ctx).WithFields(log.Fields{
		"strategy": l.strategy, "parent": l.parent, "inodes": work.Inodes, "bytes": work.Bytes, "seconds": work.Took.Seconds(),
	}).Info("podfsm: an image has got the owners of a user namespace")
	return work, nil
}

// Phases of making a layer, in order.
const (
	PhasePrepared  = "prepared"  // it is on record as unfinished
	PhaseMounted   = "mounted"   // its owners are about to be changed
	PhaseShifted   = "shifted"   // they all are
	PhaseCommitted = "committed" // it is on record as finished, and nobody stands on it
)

// AtPhase is called after each phase of making a layer, which fails with its error.
// It is for builds for tests, to be set before containerd runs.
var AtPhase = func(_ context.Context, phase string) error { return nil }

// remap makes a layer. Killed at any point it leaves an unfinished snapshot, which
// the next try replaces, or the layer.
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
	// The work directory has an index that would count as a path of each hard
	// linked file.
	if err := os.RemoveAll(option(mounts, "workdir")); err != nil {
		return stats, err
	}
	// Not by the snapshotter's Commit, which would walk all files again to add up
	// a size that nobody sees.
	err = b.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, l.making(), l.key(), snapshots.Usage{Inodes: stats.Inodes})
		return err
	})
	if err != nil {
		return stats, err
	}
	return stats, AtPhase(ctx, PhaseCommitted)
}

// discard removes an unfinished layer with its files.
func (b *backend) discard(ctx context.Context, key string) error {
	if err := b.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return b.cleanup(ctx)
}

// dir is where the files of all snapshots are.
func (b *backend) dir() string { return filepath.Join(b.root, "snapshots") }

// shift changes the owners in an overlay that nobody else sees.
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

// remapOptions are those of the overlay in which the owners are changed. Without
// index=on each path of a hard linked file would become a file of its own. The
// strategy decides about metacopy, whatever the default of the node is. Nothing is
// synced file by file (volatile): a layer ends with the boot.
func remapOptions(dir string, strategy Strategy, mounts []mount.Mount) []string {
	options := []string{"index=on", "metacopy=off", "volatile"}
	if strategy == Metacopy {
		options[1] = "metacopy=on"
	}
	for _, o := range mounts[len(mounts)-1].Options {
		for _, key := range []string{"lowerdir=", "upperdir=", "workdir="} {
			if strings.HasPrefix(o, key) {
				options = append(options, strings.ReplaceAll(o, dir+"/", "")) // a mount takes one page of options
			}
		}
	}
	return options
}

// option is the value of an option of the last mount, "" where it isn't given.
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
