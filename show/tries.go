package show

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/lifecycle"
)

// triesOf returns the tries of a sandbox and those of its CNI plugins, in the order in which they
// began.
func triesOf(view lifecycle.View) []*podfsmv1.Try {
	var tries []*podfsmv1.Try
	for _, try := range view.Tries {
		tries = append(tries, &podfsmv1.Try{
			Step: string(try.Step), Kind: string(try.Operation), Error: Text(try.Err), Reason: strings.ToValidUTF8(try.Reason, "\uFFFD"),
			StartedAt: timestamp(try.Started), Duration: lasted(try.Started, try.Ended),
		})
	}
	for _, step := range view.Steps {
		tries = append(tries, pluginTries(step)...)
	}
	slices.SortStableFunc(tries, byStart)
	return tries
}

// byStart compares tries by their start. An unknown start sorts last.
func byStart(a, b *podfsmv1.Try) int {
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

// lasted returns the duration of a try; nil if it has not ended. A try that has ended took at
// least a microsecond.
func lasted(from, to time.Time) *durationpb.Duration {
	if to.IsZero() {
		return nil
	}
	return durationpb.New(max(to.Sub(from).Round(time.Microsecond), time.Microsecond))
}

// pluginTries returns the last run of each plugin's commands from the notes of the step.
func pluginTries(step lifecycle.StepView) []*podfsmv1.Try {
	plan, ok := step.Plan.(*cni.Attachment)
	if !ok {
		return nil
	}
	type run struct {
		plugin  int
		command string
	}
	last := map[run]*podfsmv1.Try{}
	var tries []*podfsmv1.Try
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
		try := last[run{plugin, progress.Command}]
		if try == nil {
			try = &podfsmv1.Try{}
			last[run{plugin, progress.Command}] = try
			tries = append(tries, try)
		}
		try.Step, try.Kind = string(step.Name), progress.Command
		try.Plugin = strings.ToValidUTF8(fmt.Sprintf("%s/%s", plan.Networks[progress.Network].Name, plan.Plugins[plugin].Type), "\uFFFD")
		try.StartedAt, try.Duration, try.Error = timestamp(progress.Began), nil, strings.ToValidUTF8(progress.Error, "\uFFFD")
		try.Reason = strings.ToValidUTF8(progress.Reason, "\uFFFD")
		if progress.Took > 0 {
			try.Duration = durationpb.New(progress.Took.Round(time.Microsecond))
		}
	}
	return tries
}
