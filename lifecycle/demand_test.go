package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// demand demands the shim of the test's sandbox.
func (w *world) demand(t *testing.T) error {
	return w.Demand(t.Context(), testKey, startShim)
}

func (w *world) view(t *testing.T) View {
	t.Helper()
	view, err := w.Get(testKey)
	require.NoError(t, err)
	return view
}

// requireReady requires that the sandbox is ready with all steps of the creation path. It returns
// its other steps.
func (w *world) requireReady(t *testing.T, more ...states.Event) {
	t.Helper()
	require.Equal(t, states.Ready, w.state(t))
	require.ElementsMatch(t, append(creationPath(), more...), w.left())
}

// requireStops requires that a stop leaves nothing of a step on demand, and that a removal leaves
// nothing.
func (w *world) requireStops(t *testing.T) {
	t.Helper()
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NotContains(t, w.left(), startShim)
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
}

// since returns the lines of the ledger after those of before.
func (b *book) since(before []string) []string { return b.read()[len(before):] }

func TestDemand(t *testing.T) {
	w := readyWorld(t)
	before := w.view(t)
	require.Len(t, before.Steps, len(creationPath()), "the shim was not demanded")
	require.Len(t, w.replayed(t).Steps, len(creationPath()))
	lines := w.book.read()

	require.NoError(t, w.demand(t))
	w.requireReady(t, startShim)
	view := w.view(t)
	require.Equal(t, before.Transitions, view.Transitions, "a step on demand makes no transition")
	require.Equal(t, startShim, view.Steps[len(view.Steps)-1].Name)
	require.Equal(t, StepDone, view.Step(startShim).Status)
	require.Equal(t, &testResult{startShim}, view.Step(startShim).Result)
	require.Equal(t, view.Steps, w.replayed(t).Steps)
	require.Equal(t, []string{"intent start_shim", "done start_shim"}, w.book.since(lines))
	require.Contains(t, w.meter.acted(), "do start_shim: ok")

	lines = w.book.read()
	require.NoError(t, w.demand(t))
	acts := w.acted()
	require.Equal(t, []string{"do start_shim", "do start_shim"}, acts[len(acts)-2:], "a done step is done again")
	require.Empty(t, w.book.since(lines), "the intent is on record already")
	require.Equal(t, view, w.view(t))

	require.NoError(t, w.Stop(t.Context(), testKey))
	require.Equal(t, []string{
		"moved stop Stopped", "exited",
		"undo-intent start_shim", "undone start_shim",
		"undo-intent attach_network", "undone attach_network",
		"undo-intent capture_netns", "undone capture_netns",
		"moved finish_stop Stopped",
	}, w.book.since(lines))
	require.Equal(t, StepUndone, w.view(t).Step(startShim).Status)
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
	require.Equal(t, 1, count(w.acted(), "undo start_shim"))
}

// A failed step is undone, and the sandbox stays ready.
func TestDemandFails(t *testing.T) {
	refuse := func(kind ledger.Kind) func(*world) {
		return func(w *world) {
			w.book.refuse = func(r *ledger.Record) error {
				if r.Kind == kind {
					return errNoLuck
				}
				return nil
			}
		}
	}
	do := func(f func(context.Context) error) func(*world) {
		return func(w *world) { w.do[startShim] = f }
	}
	for name, tc := range map[string]struct {
		spoil func(*world)
		class error // of what the caller gets
		tried []string
		lines []string
	}{
		"it fails": {
			do(func(context.Context) error { return errdefs.ErrUnavailable }), errdefs.ErrUnavailable,
			[]string{"do start_shim", "undo start_shim"}, []string{"intent start_shim", "undo-intent start_shim", "undone start_shim"},
		},
		"it panics": {
			do(func(context.Context) error { panic("a bug") }), errdefs.ErrInternal,
			[]string{"do start_shim", "undo start_shim"}, []string{"intent start_shim", "undo-intent start_shim", "undone start_shim"},
		},
		"it hangs": {
			do(func(ctx context.Context) error { <-ctx.Done(); return errdefs.ErrUnknown }), context.DeadlineExceeded,
			[]string{"do start_shim", "undo start_shim"}, []string{"intent start_shim", "undo-intent start_shim", "undone start_shim"},
		},
		"its intent is not on record": {refuse(ledger.Intent), errNoLuck, nil, []string{}},
		"its result is not on record": {
			refuse(ledger.Done), errNoLuck,
			[]string{"do start_shim", "undo start_shim"}, []string{"intent start_shim", "undo-intent start_shim", "undone start_shim"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(f *Declaration) {
				if f.Name == startShim {
					f.Deadline = 50 * time.Millisecond
				}
			})
			require.NoError(t, w.run(t))
			lines, acts := w.book.read(), w.acted()
			tc.spoil(w)
			err := w.demand(t)
			require.ErrorIs(t, err, tc.class)
			var failed *StepError
			require.ErrorAs(t, err, &failed)
			require.Equal(t, startShim, failed.Step)
			require.False(t, failed.Undo)
			require.Equal(t, tc.tried, append([]string(nil), w.acted()[len(acts):]...))
			require.Equal(t, tc.lines, w.book.since(lines))
			w.requireReady(t)
			view := w.view(t)
			require.ErrorIs(t, view.Step(startShim).Err, tc.class)
			require.NoError(t, view.Err, "only the caller gets the error")
			_, waits := view.Current()
			require.False(t, waits)
			require.Contains(t, w.meter.acted(), "do start_shim: error")

			w.mend()
			w.book.refuse = nil
			w.do[startShim] = func(context.Context) error {
				step := w.view(t).Step(startShim)
				require.Equal(t, StepRunning, step.Status)
				require.NoError(t, step.Err, "of the first try")
				require.Zero(t, step.Duration)
				return nil
			}
			require.NoError(t, w.demand(t))
			w.requireReady(t, startShim)
			step := w.view(t).Step(startShim)
			require.NoError(t, step.Err)
			require.Equal(t, StepDone, step.Status)
			w.requireStops(t)
		})
	}
}

// A done step may be in use, so only the stop of the sandbox undoes it.
func TestDemandAgainFails(t *testing.T) {
	for name, tc := range map[string]struct {
		do    func(context.Context) error
		class error
	}{
		"it fails":  {func(context.Context) error { return errNoLuck }, errNoLuck},
		"it panics": {func(context.Context) error { panic("a bug") }, errdefs.ErrInternal},
		"it hangs":  {func(ctx context.Context) error { <-ctx.Done(); return errdefs.ErrUnknown }, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(f *Declaration) {
				if f.Name == startShim {
					f.Deadline = 50 * time.Millisecond
				}
			})
			require.NoError(t, w.run(t))
			require.NoError(t, w.demand(t))
			view := w.view(t)
			w.do[startShim] = tc.do
			w.book.refuse = func(*ledger.Record) error { return errors.New("disk full") }
			err := w.demand(t)
			require.ErrorIs(t, err, tc.class)
			var failed *StepError
			require.ErrorAs(t, err, &failed)
			require.Equal(t, startShim, failed.Step)
			require.Equal(t, view, w.view(t))
			require.NotContains(t, w.acted(), "undo start_shim")
			require.Contains(t, w.meter.acted(), "do start_shim: error")
			require.Empty(t, underWay(w.Census()))

			w.book.refuse = nil
			w.requireStops(t)
		})
	}
}

// The stop of the sandbox retries a failed undo. If that fails, too, the cleanup is pending.
func TestDemandWhoseUndoFails(t *testing.T) {
	for name, undo := range map[string]func() error{
		"it fails":  func() error { return errNoLuck },
		"it panics": func() error { panic("a bug") },
	} {
		t.Run(name, func(t *testing.T) {
			w := readyWorld(t)
			w.engineWaits()
			w.do[startShim] = func(context.Context) error { return errors.New("no shim") }
			w.undo[startShim] = undo
			err := w.demand(t)
			require.EqualError(t, err, `step start_shim of pod "ns/pod" failed: no shim`)
			w.requireReady(t, startShim)
			view := w.view(t)
			require.Equal(t, StepFailed, view.Step(startShim).Status)
			require.EqualError(t, view.Step(startShim).Err, "no shim")
			require.Equal(t, 1, view.Step(startShim).FailedTries)
			require.Empty(t, pendingSteps(view))
			_, waits := view.Current()
			require.False(t, waits)

			require.ErrorContains(t, w.Stop(t.Context(), testKey), "undo of step start_shim")
			view = w.view(t)
			require.Equal(t, states.CleanupOwed, view.State)
			require.Equal(t, states.Stopped, view.Goal)
			require.Equal(t, []states.Event{captureNetNS, startShim}, pendingSteps(view), "the namespace stays as long as the shim")
			require.NotContains(t, w.left(), attachNetwork)
			require.True(t, errdefs.IsFailedPrecondition(w.demand(t)))

			w.mend()
			w.requireStops(t)
		})
	}
}

func TestDemandIsRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		leave func(t *testing.T) *world
		step  states.Event
		want  error
	}{
		"unknown": {func(t *testing.T) *world { return newWorld(t) }, startShim, errdefs.ErrNotFound},
		"new":     {func(t *testing.T) *world { w := newWorld(t); w.create(t); return w }, startShim, errdefs.ErrFailedPrecondition},
		"not ready": {func(t *testing.T) *world {
			w := readyWorld(t)
			w.PauseExited(testKey, Exit{Code: 1})
			return w
		}, startShim, errdefs.ErrFailedPrecondition},
		"stopped": {func(t *testing.T) *world {
			w := readyWorld(t)
			require.NoError(t, w.Stop(t.Context(), testKey))
			return w
		}, startShim, errdefs.ErrFailedPrecondition},
		"removed": {func(t *testing.T) *world {
			w := readyWorld(t)
			require.NoError(t, w.Remove(t.Context(), testKey))
			return w
		}, startShim, errdefs.ErrNotFound},
		"quarantined": {func(t *testing.T) *world {
			w := readyWorld(t)
			w.book.records[3].Step = ""
			return w.restart(t, kept)
		}, startShim, errdefs.ErrFailedPrecondition},
		"closed":             {func(t *testing.T) *world { w := readyWorld(t); w.Close(t.Context()); return w }, startShim, errdefs.ErrUnavailable},
		"a step of the path": {readyWorld, attachNetwork, errdefs.ErrInvalidArgument},
		"an unknown step":    {readyWorld, "dance", errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			w := tc.leave(t)
			acts := w.acted()
			require.ErrorIs(t, w.Demand(t.Context(), testKey, tc.step), tc.want)
			require.Equal(t, acts, w.acted())
		})
	}
	t.Run("being made", func(t *testing.T) {
		w := newWorld(t)
		w.do[declareReady] = func(context.Context) error {
			require.ErrorIs(t, w.demand(t), errdefs.ErrFailedPrecondition)
			return nil
		}
		require.NoError(t, w.run(t))
		require.NoError(t, w.demand(t))
	})
}

// queued waits until n requests wait in the queue of the test's sandbox.
func (w *world) queued(t *testing.T, n int) {
	t.Helper()
	s, err := w.lookup(testKey)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		s.queue.mu.Lock()
		defer s.queue.mu.Unlock()
		return len(s.queue.events) == n
	}, 10*time.Second, time.Millisecond)
}

// The queue handles one event after the other. A step on demand waits for earlier events, and later
// events wait for the step.
func TestDemandIsQueued(t *testing.T) {
	ask := func(f func() error) <-chan error {
		answer := make(chan error, 1)
		go func() { answer <- f() }()
		return answer
	}
	hang := func() (reached chan struct{}, release chan struct{}, f func() error) {
		reached, release = make(chan struct{}), make(chan struct{})
		return reached, release, func() error {
			select {
			case <-reached:
			default:
				close(reached)
			}
			<-release
			return nil
		}
	}
	t.Run("before a stop and after it", func(t *testing.T) {
		w := readyWorld(t)
		reached, release, f := hang()
		w.do[startShim] = func(context.Context) error { return f() }
		first := ask(func() error { return w.demand(t) })
		<-reached
		current, _ := w.view(t).Current()
		require.Equal(t, startShim, current.Name)
		require.Contains(t, w.Census().UnderWay, StepOperation{startShim, OperationDo})
		second := ask(func() error { return w.demand(t) })
		w.queued(t, 1)
		stop := ask(func() error { return w.Stop(t.Context(), testKey) })
		w.queued(t, 2)
		third := ask(func() error { return w.demand(t) })
		w.queued(t, 3)
		require.NotContains(t, w.acted(), "stop start_pause")
		close(release)
		require.NoError(t, <-first)
		require.NoError(t, <-second)
		require.NoError(t, <-stop)
		require.ErrorIs(t, <-third, errdefs.ErrFailedPrecondition)
		require.Equal(t, []string{
			"do start_shim", "do start_shim", "stop start_pause", "undo start_shim", "undo attach_network", "undo capture_netns",
		}, w.acted()[len(creationPath()):])
	})
	t.Run("behind a check, which is interrupted", func(t *testing.T) {
		reached := make(chan struct{})
		w := checked(t, func(ctx context.Context) error { close(reached); <-ctx.Done(); return context.Cause(ctx) })
		require.NoError(t, w.run(t))
		check := ask(func() error { return w.Check(t.Context(), testKey) })
		<-reached
		require.NoError(t, w.demand(t))
		require.ErrorIs(t, <-check, context.Canceled)
		w.requireReady(t, startShim)
	})
	t.Run("before the exit of pause", func(t *testing.T) {
		w := readyWorld(t)
		reached, release, f := hang()
		w.do[startShim] = func(context.Context) error { return f() }
		first := ask(func() error { return w.demand(t) })
		<-reached
		w.PauseExited(testKey, Exit{Code: 1})
		close(release)
		require.NoError(t, <-first)
		_, err := w.Wait(t.Context(), testKey)
		require.NoError(t, err)
		require.Equal(t, states.NotReady, w.state(t))
		require.Equal(t, StepDone, w.view(t).Step(startShim).Status)
		w.requireStops(t)
	})
	t.Run("before the engine's end", func(t *testing.T) {
		w := readyWorld(t)
		reached, release, f := hang()
		w.do[startShim] = func(context.Context) error { return f() }
		first := ask(func() error { return w.demand(t) })
		<-reached
		closed := ask(func() error { w.Close(context.Background()); return nil })
		require.Eventually(t, func() bool {
			return errdefs.IsUnavailable(w.Create(t.Context(), ledger.Key{ID: "s2"}, Request{Spec: &testSpec{}}))
		},
			10*time.Second, time.Millisecond)
		close(release)
		require.NoError(t, <-first)
		<-closed
		require.Contains(t, w.book.read(), "done start_shim")
	})
	t.Run("without its caller", func(t *testing.T) {
		w := readyWorld(t)
		reached, release, f := hang()
		w.do[startShim] = func(ctx context.Context) error { return errors.Join(f(), ctx.Err()) }
		ctx, cancel := context.WithCancel(t.Context())
		first := ask(func() error { return w.Demand(ctx, testKey, startShim) })
		<-reached
		cancel()
		err := <-first
		require.ErrorIs(t, err, context.Canceled)
		require.EqualError(t, err, `step start_shim of sandbox "s1" continues after its caller's deadline: context canceled`)
		close(release)
		require.NoError(t, w.demand(t))
		w.requireReady(t, startShim)
		require.Equal(t, 1, count(w.book.read(), "done start_shim"))
		require.NotContains(t, w.acted(), "undo start_shim")
	})
}

// killed returns a world after a kill during the Do or the undo of the shim.
func killed(t *testing.T, during Operation) *world {
	w := readyWorld(t)
	var saved []ledger.Sandbox
	w.do[startShim] = func(context.Context) error {
		if during == OperationDo {
			saved = w.book.saved()
		}
		return errors.New("killed")
	}
	w.undo[startShim] = func() error {
		if during == OperationUndo {
			saved = w.book.saved()
		}
		return errors.New("killed")
	}
	require.Error(t, w.demand(t))
	w.book.records = saved[0].Records
	return w
}

func TestDemandOverARestart(t *testing.T) {
	failed := func(t *testing.T, undo func() error) *world {
		w := readyWorld(t)
		w.do[startShim] = func(context.Context) error { return errNoLuck }
		w.undo[startShim] = undo
		require.Error(t, w.demand(t))
		return w
	}
	for name, tc := range map[string]struct {
		leave  func(t *testing.T) *world
		killed bool // what is shown before says nothing of it
		status StepStatus
		err    string
		there  []states.Event // beside the creation path
	}{
		"done": {leave: func(t *testing.T) *world {
			w := readyWorld(t)
			require.NoError(t, w.demand(t))
			return w
		}, status: StepDone, there: []states.Event{startShim}},
		"done again, and that failed": {leave: func(t *testing.T) *world {
			w := readyWorld(t)
			require.NoError(t, w.demand(t))
			w.do[startShim] = func(context.Context) error { return errNoLuck }
			require.Error(t, w.demand(t))
			return w
		}, status: StepDone, there: []states.Event{startShim}},
		"failed":                  {leave: func(t *testing.T) *world { return failed(t, nil) }, status: StepUndone, err: "no luck"},
		"failed, and so its undo": {leave: func(t *testing.T) *world { return failed(t, func() error { return errNoLuck }) }, status: StepFailed, err: "no luck", there: []states.Event{startShim}},
		"failed, and then done": {leave: func(t *testing.T) *world {
			w := failed(t, func() error { return errNoLuck })
			w.mend()
			require.NoError(t, w.demand(t))
			return w
		}, status: StepDone, there: []states.Event{startShim}},
		"killed while it was made": {leave: func(t *testing.T) *world { return killed(t, OperationDo) }, killed: true,
			status: StepFailed, err: "containerd was restarted", there: []states.Event{startShim}},
		"killed while it was undone": {leave: func(t *testing.T) *world { return killed(t, OperationUndo) }, killed: true,
			status: StepFailed, err: "killed", there: []states.Event{startShim}},
	} {
		t.Run(name, func(t *testing.T) {
			old := tc.leave(t)
			was := old.view(t).Step(startShim)
			w := old.restart(t, kept)
			require.NoError(t, w.Resume(t.Context(), testKey))
			require.Equal(t, []Recovery{RecoveryAdopted}, w.meter.recovered())
			w.requireReady(t, tc.there...)
			view := w.view(t)
			require.NoError(t, view.Err)
			_, waits := view.Current()
			require.False(t, waits)
			is := view.Step(startShim)
			require.Equal(t, tc.status, is.Status)
			if tc.err == "" {
				require.NoError(t, is.Err)
			} else {
				require.ErrorContains(t, is.Err, tc.err)
			}
			if !tc.killed {
				require.Equal(t, was.Status, is.Status)
				require.Equal(t, fmt.Sprint(was.Err), fmt.Sprint(is.Err))
				require.Equal(t, was.Result, is.Result)
				require.Equal(t, was.Started, is.Started)
			}
			require.Empty(t, w.acted(), "a ready sandbox is not touched")
			w.requireStops(t)
			require.Equal(t, len(tc.there), count(w.acted(), "undo start_shim"))
		})
	}
	t.Run("demanded again after a kill", func(t *testing.T) {
		w := killed(t, OperationDo).restart(t, kept)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.NoError(t, w.demand(t))
		require.Equal(t, StepDone, w.view(t).Step(startShim).Status)
		require.Equal(t, []string{"do start_shim"}, w.acted())
		w.requireStops(t)
	})
	t.Run("never demanded", func(t *testing.T) {
		w := readyWorld(t).restart(t, kept)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Len(t, w.view(t).Steps, len(creationPath()))
		w.requireStops(t)
		require.NotContains(t, w.acted(), "undo start_shim")
	})
	t.Run("records lost", func(t *testing.T) {
		old := readyWorld(t)
		require.NoError(t, old.demand(t))
		old.book.records = slices.DeleteFunc(old.book.records, func(r ledger.Record) bool { return r.Step == string(startShim) })
		w := old.restart(t, rebooted)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, func() bool { return w.state(t) == states.Stopped }, 10*time.Second, time.Millisecond)
		w.requireStops(t)
	})
}

func count(words []string, word string) (n int) {
	for _, w := range words {
		if w == word {
			n++
		}
	}
	return n
}
