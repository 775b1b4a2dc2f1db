package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"go.opentelemetry.io/otel/trace"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/snapshot"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// remapSnapshot makes pause's root filesystem with the pod's ids. The snapshot's key is the
// sandbox's id.
type remapSnapshot struct{ *node }

// RemapSnapshot is the name of the step remapSnapshot.
const RemapSnapshot states.Event = "remap_snapshot"

func (s *remapSnapshot) Declaration() lifecycle.Declaration {
	return s.bounded(lifecycle.Declaration{
		Step: states.Step{
			Name:    RemapSnapshot,
			Done:    "The pause rootfs was remapped to them.",
			State:   "SnapshotRemapped",
			Meaning: "The rootfs of its pause container is owned by those ids.",
		},
		Holds: []states.Event{AllocateIDs},
	})
}

func (s *remapSnapshot) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *remapSnapshot) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	image, err := s.client.GetImage(ctx, spec.Image)
	if err != nil {
		return nil, fmt.Errorf("failed to get the pause image %q: %w", spec.Image, err)
	}
	uids, gids := mapping(r)
	made, err := s.snapshots.Prepare(ctx, snapshot.Request{
		Key:                    r.Key.ID,
		Snapshotter:            spec.Snapshotter,
		Image:                  image,
		UIDs:                   uids,
		GIDs:                   gids,
		Annotations:            spec.Config.GetAnnotations(),
		AppendImageAnnotations: !s.stock.image.DisableSnapshotAnnotations,
	})
	if err != nil {
		return nil, err
	}
	trace.SpanFromContext(ctx).SetAttributes(tracing.SnapshotStrategy.String(string(made.Strategy)))
	log.G(ctx).WithFields(log.Fields{tracing.LogSandbox: r.Key.ID, "strategy": made.Strategy, "snapshotter": spec.Snapshotter}).
		Debug("root filesystem of pause prepared")
	return &Snapshot{
		Snapshotter: spec.Snapshotter, Parent: made.Parent, Strategy: string(made.Strategy),
		Inodes: made.Work.Inodes, Bytes: made.Work.Bytes, Took: made.Work.Took,
	}, nil
}

// Find finds the snapshot by its key. The strategy that remapped it is unknown.
func (s *remapSnapshot) Find(ctx context.Context, r *lifecycle.Run) (any, error) {
	snapshotter := r.Spec.(*Spec).Snapshotter
	parent, err := s.snapshots.Parent(ctx, snapshotter, r.Key.ID)
	if err != nil {
		return nil, err
	}
	return &Snapshot{Snapshotter: snapshotter, Parent: parent}, nil
}

func (s *remapSnapshot) Undo(ctx context.Context, r *lifecycle.Run) error {
	return s.snapshots.Remove(ctx, r.Spec.(*Spec).Snapshotter, r.Key.ID)
}

func (s *remapSnapshot) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	return s.snapshots.Exists(ctx, r.Spec.(*Spec).Snapshotter, r.Key.ID)
}
