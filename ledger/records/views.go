package records

import (
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
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
