package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// allocateIDs takes the pod's id mapping from the request, or chooses one.
type allocateIDs struct{ *node }

// AllocateIDs is the name of the step allocateIDs.
const AllocateIDs = records.AllocateIDs

func (s *allocateIDs) Declaration() lifecycle.Declaration {
	return s.bounded(lifecycle.Declaration{
		Step: states.Step{
			Name:    AllocateIDs,
			Done:    "The id ranges were put on record.",
			State:   "IDsAllocated",
			Meaning: "Its user and group id ranges are its pod's alone, unless they are the node's, and on record.",
		},
		Lasting: true,
	})
}

// Reserve returns the *userns.Mappings that podfsm chooses, nil for a pod whose request decides. A
// range of the pool is held from here on. It is the first call of a creation, so Reserve also refuses a
// pod that the node lacks something for.
func (s *allocateIDs) Reserve(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if err := s.lacks(ctx, spec); err != nil {
		return nil, err
	}
	switch spec.Choose {
	case userns.ModeAuto:
		m, err := s.ids.Allocate(ctx, holder(r.Key, spec))
		if err != nil {
			return nil, err
		}
		return &m, nil
	case userns.ModeNode:
		return s.policies.of(s.stock.handlerName(spec.Handler)).NodeWide, nil
	default:
		return nil, nil
	}
}

// Do returns the *userns.Mappings. No pod with another uid holds the ids, except if they are
// node-wide.
func (s *allocateIDs) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	h := holder(r.Key, spec)
	switch chosen, planned := r.Plan().(*userns.Mappings); {
	case spec.Choose == userns.ModeAuto && planned:
		return chosen, nil
	case planned:
		h = ofNode(h, *chosen)
	case spec.Mapping == nil:
		return &lifecycle.Skipped{Reason: inHostUserNS}, nil
	}
	if err := s.ids.Hold(ctx, h); err != nil {
		return nil, err
	}
	return &h.Mappings, nil
}

const inHostUserNS = "the pod is in the host's user namespace"

// Find returns the mapping from the request, or from the plan, which outlives a reboot.
func (s *allocateIDs) Find(_ context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	switch chosen, planned := r.Plan().(*userns.Mappings); {
	case planned:
		return chosen, nil
	case spec.Choose == userns.ModeAuto || spec.Choose == userns.ModeNode:
		return nil, fmt.Errorf("no record of the ids of sandbox %q: %w", r.Key.ID, errdefs.ErrNotFound)
	case spec.Mapping == nil:
		return &lifecycle.Skipped{Reason: inHostUserNS}, nil
	default:
		return spec.Mapping, nil
	}
}

// Undo releases the ids. The undos of all steps that use the ids come before.
func (s *allocateIDs) Undo(_ context.Context, r *lifecycle.Run) error {
	s.releaseIDs(holderID(r.Key))
	return nil
}

// Probe returns false: a mapping is in the ledger, not on the host.
func (s *allocateIDs) Probe(context.Context, *lifecycle.Run) (bool, error) { return false, nil }
