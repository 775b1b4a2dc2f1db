package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/states"
)

// declareReady sets the pod's sysctls, now that its interfaces exist, and checks that pause still
// runs.
type declareReady struct{ *node }

// DeclareReady is the name of the step declareReady.
const DeclareReady states.Event = "declare_ready"

func (s *declareReady) Declaration() lifecycle.Declaration {
	return s.bounded(lifecycle.Declaration{
		Step: states.Step{
			Name:  DeclareReady,
			Done:  "The sandbox was found complete.",
			State: states.Ready,
		},
	})
}

func (s *declareReady) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *declareReady) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	process, err := s.pauses.Process(holderID(r.Key))
	if err != nil {
		return nil, err
	}
	_, oci, err := s.container(ctx, r.Key.ID)
	if err != nil {
		return nil, err
	}
	if err := pause.SetSysctls(process, oci); err != nil {
		return nil, err
	}
	if !process.Alive() {
		return nil, fmt.Errorf("pause, process %d, has ended: %w", process.Pid(), errdefs.ErrUnavailable)
	}
	return &Ready{}, nil
}

// Find succeeds: recovery only calls it if containerd's record says that the sandbox was started.
func (s *declareReady) Find(context.Context, *lifecycle.Run) (any, error) { return &Ready{}, nil }

func (s *declareReady) Undo(context.Context, *lifecycle.Run) error { return nil }

func (s *declareReady) Probe(context.Context, *lifecycle.Run) (bool, error) { return false, nil }
