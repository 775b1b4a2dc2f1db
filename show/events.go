package show

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
)

// Transition returns the last transition of a sandbox as an event of the API. The view must have a
// transition.
func Transition(view lifecycle.View) *podfsmv1.SandboxTransition {
	metadata := view.Spec.(*records.Spec).Config.GetMetadata()
	return &podfsmv1.SandboxTransition{
		SandboxId:           view.Key.ID,
		ContainerdNamespace: view.Key.Namespace,
		PodName:             metadata.GetName(),
		PodNamespace:        metadata.GetNamespace(),
		PodUid:              metadata.GetUid(),
		Attempt:             metadata.GetAttempt(),
		Transition:          transitionOf(view.Transitions[len(view.Transitions)-1]),
	}
}

// WriteOff returns a write-off as an event of the API.
func WriteOff(view lifecycle.View, w lifecycle.WriteOff) *podfsmv1.SandboxWriteOff {
	metadata := view.Spec.(*records.Spec).Config.GetMetadata()
	return &podfsmv1.SandboxWriteOff{
		SandboxId:           view.Key.ID,
		ContainerdNamespace: view.Key.Namespace,
		PodName:             metadata.GetName(),
		PodNamespace:        metadata.GetNamespace(),
		PodUid:              metadata.GetUid(),
		Attempt:             metadata.GetAttempt(),
		Step:                string(w.Step),
		Plugin:              strings.ToValidUTF8(w.Part, "\uFFFD"),
		By:                  string(w.By),
		Reason:              strings.ToValidUTF8(w.Reason, "\uFFFD"),
		Error:               Text(w.Err),
		At:                  timestamppb.New(w.At),
	}
}

func transitionOf(t lifecycle.Transition) *podfsmv1.Transition {
	return &podfsmv1.Transition{
		Seq: t.Seq, At: timestamppb.New(t.At), Event: string(t.Event), From: string(t.From), To: string(t.To), Step: string(t.Step),
		Error: Text(t.Err), ErrorType: t.Class, After: durationpb.New(t.After.Round(time.Microsecond)), TraceId: t.TraceID,
	}
}
