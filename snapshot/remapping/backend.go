package remapping

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// backend is containerd's overlayfs snapshotter and its database.
type backend struct {
	snapshots.Snapshotter
	store *storage.MetaStore
	root  string
}

const database = "metadata.db"

// open opens the backend, and makes its files at the first use.
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
		return nil, errors.Join(fmt.Errorf("failed to remove unfinished layers in %q: %w", s.config.Root, err), b.Close())
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

// sweep removes the layers and probes that a killed process left unfinished, the files in the
// background. There are no mounts to remove, see openOverlay.
func (s *Snapshotter) sweep(b *backend) error {
	ctx := context.Background()
	var left []string
	err := b.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, makingPrefix) {
			left = append(left, info.Name)
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) { // nothing was made yet
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
			_ = os.RemoveAll(probe) // the next start retries
		}
		if err := b.cleanup(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("failed to remove the files of unfinished layers")
		}
	})
	return nil
}

// existing returns the backend, nil if this snapshotter was never used.
func (s *Snapshotter) existing() (*backend, error) {
	if _, err := os.Lstat(filepath.Join(s.config.Root, database)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return s.open()
}

func (b *backend) cleanup(ctx context.Context) error {
	return b.Snapshotter.(snapshots.Cleaner).Cleanup(ctx)
}
