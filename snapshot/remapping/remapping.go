// Package remapping is a snapshotter that gives the files of an image the owners of a user
// namespace on any node. It is containerd's overlayfs with idmapped mounts if kernel and filesystem
// support them, and otherwise with a layer of owners on top of the image.
//
// The layer is made once per image and mapping, and is shared by all snapshots with both. It is
// hidden from containerd's metadata store, which would remove it. Garbage collection removes the
// layer when no snapshot uses it. It is not cached longer: the kubelet gives each pod other ids, so
// a layer would rarely be used again, and it has as many inodes as the image.
package remapping

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/snapshot/owners"
)

// Config is the configuration of a snapshotter.
type Config struct {
	// Root is the directory of the snapshots and the database.
	Root string
	// Strategy is the strategy to use; "" or "auto" for the cheapest that works on the node.
	Strategy Strategy
	// MountOptions are options of each overlay, as in containerd's overlayfs.
	MountOptions []string
}

const auto Strategy = "auto"

// Snapshotter is a snapshots.Snapshotter that supports id maps on any kernel and filesystem. It
// makes no files before its first use. It is safe for concurrent use.
type Snapshotter struct {
	config Config

	opening sync.Mutex
	opened  *backend

	probing sync.Mutex
	probed  Strategy

	mu      sync.Mutex
	closed  bool
	entries map[string]*entry // by key of a layer
	totals  map[Strategy]Totals
	running sync.WaitGroup
	makers  chan struct{} // a semaphore for the layers made in parallel
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
	_ io.Closer             = (*Snapshotter)(nil)
)

// New returns a snapshotter. Methods that need a strategy fail if the strategy is unknown.
func New(config Config) *Snapshotter {
	return &Snapshotter{config: config, entries: map[string]*entry{}, totals: map[Strategy]Totals{}, makers: make(chan struct{}, parallelLayers)}
}

// of returns the backend if it has a snapshot of this key that is not a layer.
func (s *Snapshotter) of(key string) (*backend, error) {
	b, err := s.existing()
	if err == nil && (b == nil || hidden(key)) {
		err = fmt.Errorf("snapshot %q does not exist: %w", key, errdefs.ErrNotFound)
	}
	return b, err
}

// Stat implements snapshots.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	b, err := s.of(key)
	if err != nil {
		return snapshots.Info{}, err
	}
	info, err := b.Stat(ctx, key)
	if err != nil {
		return snapshots.Info{}, err
	}
	if err := s.answer(ctx, b, key); err != nil {
		return snapshots.Info{}, err
	}
	return visible(info), nil
}

// Update implements snapshots.Snapshotter.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	b, err := s.of(info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	info, err = b.Update(ctx, info, fieldpaths...)
	return visible(info), err
}

// Usage implements snapshots.Snapshotter. Layers are not counted.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	b, err := s.of(key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	return b.Usage(ctx, key)
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	b, err := s.of(key)
	if err != nil {
		return nil, err
	}
	mounts, err := b.Mounts(ctx, key)
	if err != nil {
		return nil, err
	}
	return b.adapt(ctx, key, mounts)
}

// Prepare implements snapshots.Snapshotter. With labels for id maps, it makes a missing layer of
// owners. Meanwhile, containerd's metadata store blocks its garbage collection and, behind that,
// all other callers; Prepared avoids this.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, key, parent, opts, snapshots.Snapshotter.Prepare)
}

// View implements snapshots.Snapshotter. For id maps, see Prepare.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, key, parent, opts, snapshots.Snapshotter.View)
}

type creator func(sn snapshots.Snapshotter, ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error)

func (s *Snapshotter) create(ctx context.Context, key, parent string, opts []snapshots.Opt, create creator) ([]mount.Mount, error) {
	if hidden(key) || hidden(parent) {
		return nil, fmt.Errorf("snapshot %q on %q uses a reserved key of podfsm: %w", key, parent, errdefs.ErrInvalidArgument)
	}
	var asked snapshots.Info
	for _, opt := range opts {
		if err := opt(&asked); err != nil {
			return nil, err
		}
	}
	maps, err := mapsOf(asked.Labels)
	if err != nil {
		return nil, err
	}
	b, err := s.open()
	if err != nil {
		return nil, err
	}
	if maps != nil && parent != "" {
		ready, err := s.ready(ctx, b, parent, *maps)
		if err != nil {
			return nil, err
		}
		defer ready.Release()
		parent = ready.parent
	}
	mounts, err := create(b.Snapshotter, ctx, key, parent, opts...)
	if err != nil {
		return nil, err
	}
	return b.adapt(ctx, key, mounts)
}

// bootIDFile holds the id of this boot. A layer is only used in the boot in which it was made. A
// layer that is kept longer would have to be on disk before its first use. That would mean to wait
// for all pending writes of the filesystem (syncfs(2)), and no container outlives a boot.
var bootIDFile = "/proc/sys/kernel/random/boot_id"

// ready makes the layer for a snapshot on parent with these maps.
func (s *Snapshotter) ready(ctx context.Context, b *backend, parent string, maps owners.Map) (Ready, error) {
	from, err := b.lineage(ctx, parent)
	if err != nil {
		return Ready{}, err
	}
	if from.remapped {
		if mapText(from.layer.maps) != mapText(maps) {
			return Ready{}, fmt.Errorf("snapshot %q is already mapped to another user namespace (%s), and can't be mapped again (%s): %w",
				parent, mapText(from.layer.maps), mapText(maps), errdefs.ErrFailedPrecondition)
		}
		return Ready{Strategy: from.layer.strategy, Release: func() {}, parent: parent}, nil
	}
	strategy, err := s.strategy(ctx, b)
	if err != nil {
		return Ready{}, err
	}
	if strategy == IDMap {
		return Ready{Strategy: strategy, Release: func() {}, parent: parent}, nil
	}
	boot, err := os.ReadFile(bootIDFile)
	if err != nil {
		return Ready{}, fmt.Errorf("failed to read the id of this boot: %w", err)
	}
	l := layer{strategy: strategy, maps: maps, boot: strings.TrimSpace(string(boot)), parent: parent}
	work, release, err := s.hold(ctx, b, l)
	if err != nil {
		return Ready{}, err
	}
	return Ready{Strategy: strategy, Work: work, Release: release, parent: l.key()}, nil
}

// Commit implements snapshots.Snapshotter.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	b, err := s.of(key)
	if err != nil {
		return err
	}
	return b.Commit(ctx, name, key, opts...)
}

// Remove implements snapshots.Snapshotter. A layer doesn't prevent the removal of its image.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	b, err := s.of(key)
	if err != nil {
		return err
	}
	if err := b.Remove(ctx, key); !errdefs.IsFailedPrecondition(err) {
		return err
	}
	if err := s.collect(ctx, b, func(l layer) bool { return l.parent == key }); err != nil {
		return err
	}
	return b.Remove(ctx, key)
}

// Walk implements snapshots.Snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	b, err := s.existing()
	if b == nil || err != nil {
		return err
	}
	return b.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		info = visible(info)
		if hidden(info.Name) || !filter.Match(adaptor(info)) {
			return nil
		}
		return fn(ctx, info)
	})
}

// adaptor shows the fields of a snapshot to filters, as in containerd.
func adaptor(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			value, ok := info.Labels[strings.Join(path[1:], ".")]
			return value, ok
		}
		return "", false
	})
}

// Cleanup implements snapshots.Cleaner. containerd calls it after each garbage collection.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	b, err := s.existing()
	if b == nil || err != nil {
		return err
	}
	if err := s.collect(ctx, b, func(layer) bool { return true }); err != nil {
		return err
	}
	return b.cleanup(ctx)
}

// collect removes those of the layers that are not in use.
func (s *Snapshotter) collect(ctx context.Context, b *backend, among func(layer) bool) error {
	used, keys := map[string]bool{}, []string{}
	err := b.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		used[info.Parent] = true
		if l, ok := parseLayer(info.Name); ok && among(l) {
			keys = append(keys, info.Name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if used[key] {
			continue
		}
		// A layer taken into use meanwhile has a snapshot on it.
		if err := s.removeLayer(ctx, b, key); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return nil
}

// Close ends the work under way and closes the database. The next start removes unfinished layers.
func (s *Snapshotter) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, e := range s.entries {
		e.cancel()
	}
	s.mu.Unlock()
	s.running.Wait()
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.opened == nil {
		return nil
	}
	return s.opened.Close()
}

// Work is the cost of making a layer.
type Work struct {
	// Inodes and Bytes are those of the image. Chown copies both, Metacopy only inodes.
	Inodes, Bytes int64
	Took          time.Duration
}

// Totals is the work of a strategy since the start.
type Totals struct {
	Layers int64
	Work
}

// Totals returns the work since the start, by strategy.
func (s *Snapshotter) Totals() map[Strategy]Totals {
	s.mu.Lock()
	defer s.mu.Unlock()
	totals := make(map[Strategy]Totals, len(s.totals))
	for strategy, t := range s.totals {
		totals[strategy] = t
	}
	return totals
}

func (s *Snapshotter) count(strategy Strategy, work Work) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.totals[strategy]
	t.Layers++
	t.Inodes += work.Inodes
	t.Bytes += work.Bytes
	t.Took += work.Took
	s.totals[strategy] = t
}
