package remapping

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/podfsm/podfsm/snapshot/owners"
)

// Ready is what a snapshot with id maps is going to stand on.
type Ready struct {
	Strategy Strategy
	// Work is what this call has done: nothing where the layer was there, or was
	// made by another call meanwhile.
	Work Work
	// Release lets the layer go. It is to be called when the snapshot is prepared,
	// or will not be.
	Release func()

	parent string // the key that the snapshot's parent has below
}

// Prepared makes what a snapshot on parent with these maps needs, before Prepare is
// called for it, because containerd's metadata store holds a lock meanwhile. sn is
// this process's own metadata store of a snapshotter. Where that isn't one of this
// package's, nothing is done and ok is false.
//
// It ends with ctx, but a layer that is under way then is made to its end. A parent
// that isn't there is NotFound; a node that can't, and ids of the image that aren't
// mapped, are FailedPrecondition.
func Prepared(ctx context.Context, sn snapshots.Snapshotter, parent string, maps owners.Map) (ready Ready, ok bool, err error) {
	q := &question{maps: maps}
	if _, err := sn.Stat(context.WithValue(ctx, questionKey{}, q), parent); err != nil {
		return Ready{}, false, err
	}
	return q.ready, q.answered, nil
}

// A question goes through containerd's metadata store with the context of a Stat,
// the only call that tells the snapshotter below by which key it knows a snapshot
// and takes no lock.
type question struct {
	maps     owners.Map
	ready    Ready
	answered bool
}

type questionKey struct{}

// answer does what the question in ctx asks for, if there is one.
func (s *Snapshotter) answer(ctx context.Context, b *backend, key string) (err error) {
	q, ok := ctx.Value(questionKey{}).(*question)
	if !ok {
		return nil
	}
	q.ready, err = s.ready(ctx, b, key, q.maps)
	q.answered = err == nil
	return err
}
