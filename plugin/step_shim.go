package plugin

import (
	"context"

	"github.com/podfsm/podfsm/lifecycle"
)

// startShim starts the process that runs the pod's containers, when the first of them needs it. The process ends with the last container,
// see [podTasks], and the step is done again for the next one.
type startShim struct {
	*node
	facts lifecycle.Facts
}

func (s *startShim) Facts() lifecycle.Facts { return s.facts }

func (s *startShim) Plan(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *startShim) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	record, err := s.containers.Get(ctx, r.Key.ID)
	if err != nil {
		return nil, err
	}
	return nil, s.shims.Start(ctx, record, r.Spec.(*Spec).RuntimePath)
}

func (s *startShim) Undo(ctx context.Context, r *lifecycle.Run) error {
	return s.shims.End(ctx, r.Key.ID)
}

func (s *startShim) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	return s.shims.Exists(ctx, r.Key.ID)
}
