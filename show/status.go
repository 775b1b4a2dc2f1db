package show

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
)

// Status returns the part of podfsm's status that its sandboxes show.
func Status(views []lifecycle.View) *podfsmv1.StatusResponse {
	response := &podfsmv1.StatusResponse{
		Sandboxes:       map[string]uint32{},
		PendingCleanups: uint32(Pending(views)),
		SlowestStep:     slowestStep(views, time.Now()),
	}
	for _, view := range views {
		response.Sandboxes[string(view.State)]++
	}
	return response
}

// slowestStep returns the step of all creations that took longest, or is running for longer; nil if
// no step has begun.
func slowestStep(views []lifecycle.View, now time.Time) (slowest *podfsmv1.SlowestStep) {
	var longest time.Duration
	for _, view := range views {
		for _, step := range view.Steps {
			declared, _ := records.Table().Step(step.Name)
			took, running := step.Duration, step.Status == lifecycle.StepRunning
			if running {
				took = now.Sub(step.Started)
			}
			if declared.OnDemand || step.Started.IsZero() || took <= longest {
				continue
			}
			longest = took
			metadata := view.Spec.(*records.Spec).Config.GetMetadata()
			slowest = &podfsmv1.SlowestStep{
				Step: string(step.Name), SandboxId: view.Key.ID, PodName: metadata.GetName(), PodNamespace: metadata.GetNamespace(),
				StartedAt: timestamppb.New(step.Started),
			}
			if !running {
				slowest.Duration = durationpb.New(took.Round(time.Microsecond))
			}
		}
	}
	return slowest
}
