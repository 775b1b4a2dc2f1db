package records

import (
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
)

// Replay is what the sandboxes of a ledger are by their records alone. Nothing is looked at but the records: what a restart or a
// reboot has changed since, the daemon will find out.
func Replay(saved []journal.Sandbox) ([]lifecycle.View, error) {
	return lifecycle.Replay(Table(), saved, func(key journal.Key, spec any) lifecycle.Request {
		known, ok := spec.(*Spec)
		if !ok {
			known = &Spec{Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: key.ID}}}
		}
		return lifecycle.Request{Pod: PodName(known.Config), Spec: known}
	})
}
