// Package remapping is a snapshotter that gives the files of an image the owners of
// a user namespace on any node: containerd's overlayfs, with its idmapped mounts
// where kernel and filesystem can, else with a layer of owners on top of the image.
//
// The layer is made once for an image and a mapping, and shared by all snapshots
// that ask for both. containerd's metadata store, which would remove what it didn't
// create, never sees it. It is collected with the garbage as soon as no snapshot
// stands on it: the kubelet gives each pod ids of its own, so hardly any layer
// would be asked for again, and it has as many inodes as the image.
package remapping

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/snapshot/owners"
)

// Config is how a snapshotter works.
type Config struct {
	// Root is the directory of its snapshots and its database.
	Root string
	// Strategy is the one to take; "" or "auto" for the cheapest that works here.
	Strategy Strategy
	// MountOptions are put on every overlay, as containerd's overlayfs does.
	MountOptions []string
}

const auto Strategy = "auto"

// Snapshotter is a snapshots.Snapshotter that takes id maps with any kernel and
// filesystem. It touches nothing before it is used. It is safe for concurrent use.
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
	makers  chan struct{} // has room for as many layers as are made at a time
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
	_ io.Closer             = (*Snapshotter)(nil)
)

// backend is containerd's overlayfs and the database that it keeps.
type backend struct {
	snapshots.Snapshotter
	store *storage.MetaStore
	root  string
}

// New returns a snapshotter. An unknown strategy is told by everything that needs
// one.
func New(config Config) *Snapshotter {
	return &Snapshotter{config: config, entries: map[string]*entry{}, totals: map[Strategy]Totals{}, makers: make(chan struct{}, parallelLayers)}
}

const database = "metadata.db"

// open opens what is below, and makes it when it is used for the first time.
func (s *Snapshotter) open() (*backend, error) {
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.opened != nil {
		return s.opened, nil
	}
	b, err := openBackend(s.config)
	if err != nil {
		return nil, fmt.Errorf("failed to open the snapshots in %q: %w", s.config.Root, err)
	}
	if err := s.sweep(b); err != nil {
		return nil, errors.Join(fmt.Errorf("failed to remove what a killed containerd has left in %q: %w", s.config.Root, err), b.Close())
	}
	s.opened = b
	return b, nil
}

func openBackend(config Config) (*backend, error) {
	store, err := storage.NewMetaStore(filepath.Join(config.Root, database))
	if err != nil {
		return nil, err
	}
	options := []overlay.Opt{overlay.WithMetaStore(store), overlay.AsynchronousRemove, overlay.WithRemapIDs}
	if len(config.MountOptions) > 0 {
		options = append(options, overlay.WithMountOptions(slices.Clone(config.MountOptions)))
	}
	inner, err := overlay.NewSnapshotter(config.Root, options...)
	if err != nil {
		return nil, err
	}
	return &backend{inner, store, config.Root}, nil
}

// sweep removes the layers and probes that a killed process hasn't finished. Their
// files go in the background. It has no mounts to look for, see openOverlay.
func (s *Snapshotter) sweep(b *backend) error {
	ctx := context.Background()
	var left []string
	err := b.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, makingPrefix) {
			left = append(left, info.Name)
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) { // there is nothing at all yet
		return err
	}
	for _, key := range left {
		if err := b.Remove(ctx, key); err != nil {
			return err
		}
	}
	probes, err := filepath.Glob(filepath.Join(b.root, probePattern))
	if err != nil || len(left)+len(probes) == 0 {
		return err
	}
	s.running.Go(func() {
		for _, probe := range probes {
			_ = os.RemoveAll(probe) // the next start tries again
		}
		if err := b.cleanup(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("podfsm: failed to remove the files of unfinished layers")
		}
	})
	return nil
}

// existing is what is below; nil while this snapshotter was never used.
func (s *Snapshotter) existing() (*backend, error) {
	if _, err := os.Lstat(filepath.Join(s.config.Root, database)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return s.open()
}

// of is the backend that has a snapshot of this key, unless it is a layer's.
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

// Usage implements snapshots.Snapshotter. Layers count for nobody.
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

// Prepare implements snapshots.Snapshotter. With labels for id maps it makes the
// layer of owners that is missing, while containerd's metadata store keeps out its
// garbage collection and, behind that, everybody else: see Ready.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, key, parent, opts, snapshots.Snapshotter.Prepare)
}

// View implements snapshots.Snapshotter; for id maps it is as Prepare.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, key, parent, opts, snapshots.Snapshotter.View)
}

type creator func(sn snapshots.Snapshotter, ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error)

func (s *Snapshotter) create(ctx context.Context, key, parent string, opts []snapshots.Opt, create creator) ([]mount.Mount, error) {
	if hidden(key) || hidden(parent) {
		return nil, fmt.Errorf("snapshot %q on %q has a name of podfsm's own: %w", key, parent, errdefs.ErrInvalidArgument)
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

// bootIDFile has the id of this boot. A layer is for the boot that it was made in: to
// have it on disk for sure before it counts would mean to wait for all else that is
// to be written there (syncfs(2)), and no container lives as long.
var bootIDFile = "/proc/sys/kernel/random/boot_id"

// ready makes what a snapshot on parent with these maps stands on.
func (s *Snapshotter) ready(ctx context.Context, b *backend, parent string, maps owners.Map) (Ready, error) {
	from, err := b.lineage(ctx, parent)
	if err != nil {
		return Ready{}, err
	}
	if from.remapped {
		if mapText(from.layer.maps) != mapText(maps) {
			return Ready{}, fmt.Errorf("snapshot %q has the owners of another user namespace already (%s), it can't be mapped once more (%s): %w",
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

// Remove implements snapshots.Snapshotter. Layers don't keep their image.
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

// adaptor shows a snapshot to filters as containerd does.
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

// Cleanup implements snapshots.Cleaner. containerd calls it when it has collected
// garbage.
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

func (b *backend) cleanup(ctx context.Context) error {
	return b.Snapshotter.(snapshots.Cleaner).Cleanup(ctx)
}

// collect removes the layers among these that nobody uses or is about to.
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
		// One that was taken into use meanwhile has a snapshot on it.
		if err := s.removeLayer(ctx, b, key); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return nil
}

// Close ends what is under way and closes the database. What is unfinished is
// removed at the next start.
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

// Work is what making a layer took.
type Work struct {
	// Inodes and Bytes are of the image: Chown copies both, Metacopy the inodes.
	Inodes, Bytes int64
	Took          time.Duration
}

// Totals are what a strategy has done since the start.
type Totals struct {
	Layers int64
	Work
}

// Totals are what was done since the start, by strategy, for metrics.
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
