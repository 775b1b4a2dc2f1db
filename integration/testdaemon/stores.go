package main

import (
	"context"
	"io"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/podfsm/podfsm/integration/faults"
)

// wrapStores adds points to containerd's own records of a pod: its lease, its sandbox record, and
// the snapshotter below its metadata. It registers every plugin again, as the front does.
func wrapStores() {
	around := map[string]func(any) any{
		plugins.LeasePlugin.String() + ".manager":      func(i any) any { return &faultyLeases{i.(leases.Manager)} },
		plugins.SandboxStorePlugin.String() + ".local": func(i any) any { return &faultySandboxes{i.(sandbox.Store)} },
		plugins.SnapshotPlugin.String() + ".overlayfs": func(i any) any { return &faultySnapshotter{i.(cleaningSnapshotter)} },
	}
	graph := registry.Graph(nil)
	registry.Reset()
	for _, r := range graph {
		if wrap, ok := around[r.URI()]; ok {
			real := r.InitFn
			r.InitFn = func(ic *plugin.InitContext) (any, error) {
				instance, err := real(ic)
				if err != nil {
					return nil, err
				}
				return wrap(instance), nil
			}
		}
		registry.Register(&r)
	}
}

// between runs act between the points before and after it.
func between(ctx context.Context, point string, act func() error) error {
	if err := faults.Hit(ctx, point+".before"); err != nil {
		return err
	}
	if err := act(); err != nil {
		return err
	}
	return faults.Hit(ctx, point+".after")
}

type faultyLeases struct{ leases.Manager }

func (l *faultyLeases) Create(ctx context.Context, opts ...leases.Opt) (made leases.Lease, err error) {
	err = between(ctx, "leases.create", func() (err error) {
		made, err = l.Manager.Create(ctx, opts...)
		return err
	})
	return made, err
}

type faultySandboxes struct{ sandbox.Store }

func (s *faultySandboxes) Create(ctx context.Context, record sandbox.Sandbox) (made sandbox.Sandbox, err error) {
	err = between(ctx, "sandboxes.create", func() (err error) {
		made, err = s.Store.Create(ctx, record)
		return err
	})
	return made, err
}

func (s *faultySandboxes) Update(ctx context.Context, record sandbox.Sandbox, fields ...string) (made sandbox.Sandbox, err error) {
	err = between(ctx, "sandboxes.update", func() (err error) {
		made, err = s.Store.Update(ctx, record, fields...)
		return err
	})
	return made, err
}

func (s *faultySandboxes) Delete(ctx context.Context, id string) error {
	return between(ctx, "sandboxes.delete", func() error { return s.Store.Delete(ctx, id) })
}

// cleaningSnapshotter has the interfaces of the overlayfs snapshotter that the metadata store uses.
type cleaningSnapshotter interface {
	snapshots.Snapshotter
	snapshots.Cleaner
	io.Closer
}

type faultySnapshotter struct{ cleaningSnapshotter }

func (s *faultySnapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) (mounts []mount.Mount, err error) {
	err = between(ctx, "snapshotter.prepare", func() (err error) {
		mounts, err = s.cleaningSnapshotter.Prepare(ctx, key, parent, opts...)
		return err
	})
	return mounts, err
}

func (s *faultySnapshotter) Remove(ctx context.Context, key string) error {
	return between(ctx, "snapshotter.remove", func() error { return s.cleaningSnapshotter.Remove(ctx, key) })
}
