package plugin

import (
	"context"

	"github.com/podfsm/podfsm/lifecycle"
)

// allocateIDs takes the pod's id mapping. The mapping was validated and is on record, durably, since the sandbox was created;
// a range that podfsm picks itself will be picked here.
type allocateIDs struct{ facts lifecycle.Facts }

func (s *allocateIDs) Facts() lifecycle.Facts { return s.facts }

func (s *allocateIDs) Plan(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

// Do returns the *userns.Mappings.
func (s *allocateIDs) Do(_ context.Context, r *lifecycle.Run) (any, error) {
	mapping := r.Spec.(*Spec).Mapping
	if mapping == nil {
		return &lifecycle.Skipped{Reason: "the pod is in the host's user namespace"}, nil
	}
	return mapping, nil
}

func (s *allocateIDs) Undo(context.Context, *lifecycle.Run) error { return nil }

// Probe finds nothing: a mapping is on record, not on the host.
func (s *allocateIDs) Probe(context.Context, *lifecycle.Run) (bool, error) { return false, nil }
