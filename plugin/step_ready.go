package plugin

import (
	"context"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// declareReady makes sure that pause still runs after all that was done around it.
type declareReady struct {
	*node
	facts lifecycle.Facts
}

func (s *declareReady) Facts() lifecycle.Facts { return s.facts }

func (s *declareReady) Plan(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *declareReady) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	if err := runsAs(ctx, s.node, r.Key.ID, r.Result(states.StartPause).(*Pause).Pid, containerd.Running); err != nil {
		return nil, err
	}
	return &Ready{}, nil
}

func (s *declareReady) Undo(context.Context, *lifecycle.Run) error { return nil }

func (s *declareReady) Probe(context.Context, *lifecycle.Run) (bool, error) { return false, nil }
