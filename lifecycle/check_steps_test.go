package lifecycle

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/states"
)

// fakeChecker is a step with a check.
type fakeChecker struct {
	fakeStep
	check func(context.Context) error
}

func (s *fakeChecker) Check(ctx context.Context, _ *Run) error {
	s.node.act("check %s", s.declared.Name)
	return s.check(ctx)
}

// checked is a world whose step attach_network has a check.
func checked(t *testing.T, check func(context.Context) error) *world {
	w := newWorld(t)
	for i, step := range w.Engine.steps {
		if f := step.Declaration(); f.Name == attachNetwork {
			w.Engine.steps[i] = &fakeChecker{*step.(*fakeStep), check}
		}
	}
	return w
}

// A failed check is shown, and changes nothing else.
func TestCheckFails(t *testing.T) {
	broken := errors.New("its route is gone")
	var answer error
	w := checked(t, func(context.Context) error { return answer })
	require.True(t, errdefs.IsNotFound(w.Check(t.Context(), testKey)))
	require.NoError(t, w.run(t))
	written := w.book.read()

	answer = broken
	err := w.Check(t.Context(), testKey)
	require.EqualError(t, err, `check of step attach_network of pod "ns/pod" failed: its route is gone`)
	view, err := w.Get(testKey)
	require.NoError(t, err)
	require.ErrorIs(t, view.Err, broken)
	require.ErrorIs(t, view.Step(attachNetwork).Err, broken)
	require.Equal(t, StepDone, view.Step(attachNetwork).Status)
	require.Equal(t, states.Ready, view.State)
	require.Equal(t, written, w.book.read())

	answer = nil
	require.NoError(t, w.Check(t.Context(), testKey))
	view, err = w.Get(testKey)
	require.NoError(t, err)
	require.NoError(t, view.Err)
	require.NoError(t, view.Step(attachNetwork).Err)

	answer = broken
	require.Error(t, w.Check(t.Context(), testKey))
	require.NoError(t, w.Stop(t.Context(), testKey))
	view, err = w.Get(testKey)
	require.NoError(t, err)
	require.NoError(t, view.Err, "the error of the check went with the network")
	require.NoError(t, view.Step(attachNetwork).Err)
	asked := len(w.acted())
	require.NoError(t, w.Check(t.Context(), testKey))
	require.Len(t, w.acted(), asked, "only a ready sandbox is checked")
}

// A check of named steps checks no others.
func TestCheckOfNamedSteps(t *testing.T) {
	w := checked(t, func(context.Context) error { return errors.New("its route is gone") })
	require.NoError(t, w.run(t))
	require.NoError(t, w.Check(t.Context(), testKey, startPause))
	require.Error(t, w.Check(t.Context(), testKey, startPause, attachNetwork))
}

func TestCheckPanics(t *testing.T) {
	w := checked(t, func(context.Context) error { panic("a bug") })
	require.NoError(t, w.run(t))
	require.True(t, errdefs.IsInternal(w.Check(t.Context(), testKey)))
	require.NoError(t, w.Remove(t.Context(), testKey))
}

// Any other event interrupts a check, and begins after the check has ended.
func TestCheckGivesWay(t *testing.T) {
	for name, event := range map[string]func(t *testing.T, w *world){
		"a stop":            func(t *testing.T, w *world) { require.NoError(t, w.Stop(t.Context(), testKey)) },
		"the exit of pause": func(_ *testing.T, w *world) { w.PauseExited(testKey, Exit{At: time.Now()}) },
		"the engine's end":  func(_ *testing.T, w *world) { w.Close(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			reached := make(chan struct{})
			var w *world
			w = checked(t, func(ctx context.Context) error {
				close(reached)
				<-ctx.Done()
				w.act("check ended")
				return context.Cause(ctx)
			})
			require.NoError(t, w.run(t))
			done := make(chan error, 1)
			go func() { done <- w.Check(t.Context(), testKey) }()
			<-reached
			event(t, w)
			require.ErrorIs(t, <-done, context.Canceled)
			acts := w.acted()
			require.Equal(t, []string{"check attach_network", "check ended"}, acts[len(creationPath()):][:2])
			if view, err := w.Get(testKey); err == nil {
				require.NoError(t, view.Step(attachNetwork).Err, "an interrupted check says nothing about the network")
			}
		})
	}
}
