package remapping

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/podfsm/podfsm/snapshot/owners"
)

// Ready is the parent of a snapshot with id maps.
type Ready struct {
	Strategy Strategy
	// Work is the work of this call: none if the layer existed or a concurrent call made it.
	Work Work
	// Release allows the collection of the layer. The caller calls it after the snapshot was
	// prepared, or won't be.
	Release func()

	parent string // the key of the snapshot's parent in the backend
}

// Prepared makes the layer that a snapshot on parent with these maps needs. Callers use it before
// Prepare, which containerd's metadata store calls with a lock held. sn is this process's metadata
// store of a snapshotter. If that snapshotter is not from this package, ok is false and nothing is
// done.
//
// Prepared returns when ctx ends, but a layer under way is completed. Errors: NotFound if parent
// does not exist; FailedPrecondition if the node has no strategy, or ids of the image are not
// mapped.
func Prepared(ctx context.Context, sn snapshots.Snapshotter, parent string, maps owners.Map) (ready Ready, ok bool, err error) {
	q := &question{maps: maps}
	if _, err := sn.Stat(context.WithValue(ctx, questionKey{}, q), parent); err != nil {
		return Ready{}, false, err
	}
	return q.ready, q.answered, nil
}

// A question passes containerd's metadata store in the context of Stat: the only call that tells
// the backend its own key of a snapshot and takes no lock.
type question struct {
	maps     owners.Map
	ready    Ready
	answered bool
}

type questionKey struct{}

// answer handles the question in ctx, if there is one.
func (s *Snapshotter) answer(ctx context.Context, b *backend, key string) (err error) {
	q, ok := ctx.Value(questionKey{}).(*question)
	if !ok {
		return nil
	}
	q.ready, err = s.ready(ctx, b, key, q.maps)
	q.answered = err == nil
	return err
}
