package records

import (
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// Replay returns the sandboxes of a ledger by their records alone. It doesn't examine the host. The
// next daemon will find what a restart or a reboot has changed.
func Replay(saved []ledger.Sandbox) ([]lifecycle.View, error) {
	return lifecycle.Replay(Table(), saved, func(key ledger.Key, spec any) lifecycle.Request {
		known, ok := spec.(*Spec)
		if !ok {
			known = &Spec{Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: key.ID}}}
		}
		return lifecycle.Request{Pod: PodName(known.Config), Spec: known}
	})
}

// AllocateIDs is the name of the step that allocates a pod's ids.
const AllocateIDs states.Event = "allocate_ids"

// MappingsOf returns a sandbox's id mappings; nil in the host's user namespace.
func MappingsOf(view lifecycle.View) *userns.Mappings {
	if allocated, _, ok := ResultOf[*userns.Mappings](view); ok {
		return allocated
	}
	return view.Spec.(*Spec).Mapping // not allocated yet, or its record is lost
}

// NetworkOf returns the network to which a sandbox is attached. It returns false once the
// attachment is undone.
func NetworkOf(view lifecycle.View) (*Network, bool) {
	attached, step, ok := ResultOf[*Network](view)
	return attached, ok && step.Status != lifecycle.StepUndone
}

// ResultOf returns a result by its type, and the step that has it: another release may have named
// the step differently.
func ResultOf[T any](view lifecycle.View) (result T, step lifecycle.StepView, ok bool) {
	for _, step := range view.Steps {
		if result, ok := step.Result.(T); ok {
			return result, step, true
		}
	}
	return result, step, false
}
