package plugin

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// labelPod is a minimal step: this declaration and these methods are all that a new step needs.
type labelPod struct{ labelled map[string]bool }

func (s *labelPod) Declaration() lifecycle.Declaration {
	return lifecycle.Declaration{
		Step: states.Step{
			Name:    "label_pod",
			Done:    "Its labels were set.",
			State:   "Labelled",
			Meaning: "Its labels are set.",
		},
		Holds:    []states.Event{CaptureNetNS},
		AtStop:   true,
		Deadline: time.Minute, UndoDeadline: time.Minute,
	}
}

func (s *labelPod) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *labelPod) Do(_ context.Context, r *lifecycle.Run) (any, error) {
	s.labelled[r.Key.ID] = true
	return nil, nil
}

func (s *labelPod) Undo(_ context.Context, r *lifecycle.Run) error {
	delete(s.labelled, r.Key.ID)
	return nil
}

func (s *labelPod) Probe(_ context.Context, r *lifecycle.Run) (bool, error) {
	return s.labelled[r.Key.ID], nil
}

// One line in the list, and the step is run, shown, measured and undone.
func TestStepThatIsAdded(t *testing.T) {
	added := &labelPod{map[string]bool{}}
	w := newWorld(t, func(steps []lifecycle.Step) []lifecycle.Step {
		return slices.Insert(steps, 5, lifecycle.Step(added))
	})
	w.run(t, "s1")
	require.True(t, added.labelled["s1"])
	view := w.view(t, "s1")
	require.Equal(t, states.Ready, view.State)
	require.Equal(t, states.State("Labelled"), view.Transitions[5].To)
	require.Equal(t, lifecycle.StepDone, view.Step("label_pod").Status)
	require.EqualValues(t, 1, gathered(t, w.meters, "step_duration_seconds")["do ok label_pod"])
	census := w.engine.Census()
	require.Contains(t, census.States, states.State("Labelled"))
	require.Contains(t, census.Pending, states.Event("label_pod"))

	require.NoError(t, w.Shutdown(inCRI(t), "s1"))
	require.Empty(t, added.labelled)
}

// A step that is taken out leaves a path, as long as none of the others needs it.
func TestListOfStepsMakesATable(t *testing.T) {
	for i, step := range Steps() {
		without := slices.Delete(Steps(), i, i+1)
		_, err := states.NewTable(without)
		require.Equal(t, step.State == states.Ready, err != nil, "%s: %v", step.Name, err)
	}
}
