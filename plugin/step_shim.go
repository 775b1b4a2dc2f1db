package plugin

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// startShim starts the shim, which runs the pod's containers, when the first container needs it.
// The shim ends with the last container, see [podTasks]; the step is repeated for the next one.
type startShim struct{ *node }

// StartShim is the name of the step startShim.
const StartShim states.Event = "start_shim"

// shimTimeout bounds the start of a shim, which takes about 20 ms.
const shimTimeout = 30 * time.Second

func (s *startShim) Declaration() lifecycle.Declaration {
	return lifecycle.Declaration{
		Step: states.Step{
			Name:     StartShim,
			Done:     "The process that runs the pod's containers was started.",
			OnDemand: true,
		},
		// The shim runs containers in the pod's namespaces and with its ids.
		Holds:  []states.Event{AllocateIDs, StartPause, CaptureNetNS},
		AtStop: true,
		// Other requests for the pod wait meanwhile.
		Deadline:     min(shimTimeout, s.limits.runtime),
		UndoDeadline: s.limits.runtime,
	}
}

func (s *startShim) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *startShim) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	record, err := s.containers.Get(ctx, r.Key.ID)
	if err != nil {
		return nil, err
	}
	return nil, s.shims.Start(ctx, record, r.Spec.(*Spec).RuntimePath)
}

// Find finds a shim that containerd knows, or the remains of one.
func (s *startShim) Find(ctx context.Context, r *lifecycle.Run) (any, error) {
	exists, err := s.shims.Exists(ctx, r.Key.ID)
	if err == nil && !exists {
		err = fmt.Errorf("sandbox %q has no shim: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	return nil, err
}

func (s *startShim) Undo(ctx context.Context, r *lifecycle.Run) error {
	return s.shims.End(ctx, r.Key.ID)
}

func (s *startShim) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	return s.shims.Exists(ctx, r.Key.ID)
}
