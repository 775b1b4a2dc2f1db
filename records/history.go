package records

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// Transition is the last transition of a sandbox, as it is told to who watches. The view must have one.
func Transition(view lifecycle.View) *podfsmv1.SandboxTransition {
	metadata := view.Spec.(*Spec).Config.GetMetadata()
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

// WriteOff is a write-off as containerd's event tells of it.
func WriteOff(view lifecycle.View, w lifecycle.WriteOff) *podfsmv1.SandboxWriteOff {
	metadata := view.Spec.(*Spec).Config.GetMetadata()
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

// failedStep is the step whose failure ended the sandbox's creation, "" for none.
func failedStep(view lifecycle.View) string {
	for _, t := range view.Transitions {
		if t.Event == states.RollBack && t.Err != nil {
			return string(t.Step)
		}
	}
	return ""
}

// actsOf are the acts of a sandbox and those of its CNI plugins, in the order in which they began.
func actsOf(view lifecycle.View) []*podfsmv1.Act {
	var acts []*podfsmv1.Act
	for _, act := range view.Acts {
		acts = append(acts, &podfsmv1.Act{
			Step: string(act.Step), Kind: string(act.Kind), Error: Text(act.Err), Reason: strings.ToValidUTF8(act.Reason, "\uFFFD"),
			StartedAt: timestamp(act.Started), Duration: lasted(act.Started, act.Ended),
		})
	}
	for _, step := range view.Steps {
		acts = append(acts, pluginActs(step)...)
	}
	slices.SortStableFunc(acts, byStart)
	return acts
}

// byStart sorts acts by when they began, those of which that isn't known last.
func byStart(a, b *podfsmv1.Act) int {
	x, y := a.GetStartedAt(), b.GetStartedAt()
	switch {
	case x == nil && y == nil:
		return 0
	case x == nil:
		return 1
	case y == nil:
		return -1
	}
	return x.AsTime().Compare(y.AsTime())
}

// lasted is nil for what has not ended. What has took some time.
func lasted(from, to time.Time) *durationpb.Duration {
	if to.IsZero() {
		return nil
	}
	return durationpb.New(max(to.Sub(from).Round(time.Microsecond), time.Microsecond))
}

// pluginActs are the last runs of each plugin's commands, by the notes of the step.
func pluginActs(step lifecycle.StepView) []*podfsmv1.Act {
	plan, ok := step.Plan.(*cni.Attachment)
	if !ok {
		return nil
	}
	type run struct {
		plugin  int
		command string
	}
	last := map[run]*podfsmv1.Act{}
	var acts []*podfsmv1.Act
	for _, note := range step.Notes {
		progress, ok := note.(*cni.Progress)
		if !ok || progress.Command == "" {
			continue
		}
		plugin := slices.IndexFunc(plan.Plugins, func(s cni.PluginState) bool {
			return s.Network == progress.Network && s.Plugin == progress.Plugin
		})
		if plugin < 0 || progress.Network >= len(plan.Networks) {
			continue
		}
		act := last[run{plugin, progress.Command}]
		if act == nil {
			act = &podfsmv1.Act{}
			last[run{plugin, progress.Command}] = act
			acts = append(acts, act)
		}
		act.Step, act.Kind = string(step.Name), progress.Command
		act.Plugin = strings.ToValidUTF8(fmt.Sprintf("%s/%s", plan.Networks[progress.Network].Name, plan.Plugins[plugin].Type), "\uFFFD")
		act.StartedAt, act.Duration, act.Error = timestamp(progress.Began), nil, strings.ToValidUTF8(progress.Error, "\uFFFD")
		act.Reason = strings.ToValidUTF8(progress.Reason, "\uFFFD")
		if progress.Took > 0 {
			act.Duration = durationpb.New(progress.Took.Round(time.Microsecond))
		}
	}
	return acts
}
