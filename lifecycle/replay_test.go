package lifecycle

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// pendingSteps returns the steps whose cleanup is pending.
func pendingSteps(view View) (pending []states.Event) {
	for _, step := range view.Steps {
		if step.Status == StepCleanupPending {
			pending = append(pending, step.Name)
		}
	}
	return pending
}

// replayed returns the sandbox by the world's ledger, without an engine.
func (w *world) replayed(t *testing.T) View {
	t.Helper()
	views, err := Replay(testTable, w.book.saved(), func(_ ledger.Key, spec any) Request {
		return Request{Pod: "ns/pod", Spec: spec}
	})
	require.NoError(t, err)
	require.Len(t, views, 1)
	return views[0]
}

// The engine and a reader of its ledger show the same pending cleanups.
func TestReplayShowsPendingCleanups(t *testing.T) {
	fail := func() error { return errors.New("no luck") }
	for _, tc := range []struct {
		name string
		act  func(t *testing.T, w *world) error
		goal states.State
		// pending, with the failing one first
		pending []states.Event
	}{
		{"a rollback", func(t *testing.T, w *world) error {
			w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
			w.undo[startPause] = fail
			return w.run(t)
		}, states.RolledBack, []states.Event{startPause, allocateIDs, remapSnapshot}},
		{"a stop", func(t *testing.T, w *world) error {
			require.NoError(t, w.run(t))
			w.undo[attachNetwork] = fail
			return w.Stop(t.Context(), testKey)
		}, states.Stopped, []states.Event{attachNetwork, captureNetNS}},
		{"a stop, of a step on demand", func(t *testing.T, w *world) error {
			require.NoError(t, w.run(t))
			require.NoError(t, w.Demand(t.Context(), testKey, startShim))
			w.undo[startShim] = fail
			return w.Stop(t.Context(), testKey)
		}, states.Stopped, []states.Event{startShim, captureNetNS}},
		{"a process that can't be ended", func(t *testing.T, w *world) error {
			require.NoError(t, w.run(t))
			w.stop = errors.New("no luck")
			return w.Stop(t.Context(), testKey)
		}, states.Stopped, []states.Event{startPause}},
		{"a removal", func(t *testing.T, w *world) error {
			require.NoError(t, w.run(t))
			require.NoError(t, w.Stop(t.Context(), testKey))
			w.undo[allocateIDs] = fail
			return w.Remove(t.Context(), testKey)
		}, states.Removed, []states.Event{allocateIDs}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.backoff = func(int) time.Duration { return time.Hour }
			require.ErrorContains(t, tc.act(t, w), "no luck")
			live, err := w.Get(testKey)
			require.NoError(t, err)
			read := w.replayed(t)
			require.ElementsMatch(t, tc.pending, pendingSteps(live))
			failed := live.Step(tc.pending[0])
			require.ErrorContains(t, failed.Err, "no luck")

			require.Equal(t, states.CleanupOwed, read.State)
			require.Equal(t, tc.goal, read.Goal)
			require.Equal(t, live.Transitions[len(live.Transitions)-1].At, read.Since)
			require.Subset(t, pendingSteps(read), tc.pending[:1])
			if tc.goal != states.Stopped { // which steps wait for others at a stop isn't on record
				require.Subset(t, pendingSteps(read), tc.pending)
			}
			require.ErrorContains(t, read.Step(tc.pending[0]).Err, "no luck")
			require.WithinDuration(t, failed.PendingSince, read.Step(tc.pending[0]).PendingSince, time.Second)

			w.mend()
			if tc.goal == states.Stopped {
				require.NoError(t, w.Stop(t.Context(), testKey))
				live, err = w.Get(testKey)
				require.NoError(t, err)
				require.Empty(t, pendingSteps(live))
				require.Empty(t, pendingSteps(w.replayed(t)))
			}
			require.NoError(t, w.Remove(t.Context(), testKey))
			require.Empty(t, w.left())
		})
	}
}

// mend removes all faults from the node.
func (n *node) mend() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.do)
	clear(n.undo)
	n.stop = nil
}

func TestReplayWritesNothing(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	w.book.records[3].Step = ""
	before := len(w.book.all)
	require.Equal(t, states.Quarantined, w.replayed(t).State)
	require.Len(t, w.book.all, before)
	require.Equal(t, states.Ready, w.state(t))
}
