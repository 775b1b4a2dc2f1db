package lifecycle

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// logLost is what the next daemon knows about a ready sandbox if the log in the state directory is
// lost.
var logLost = Outside{Served: true, Listed: true, Started: true, Damaged: true}

// withoutLog returns a ready sandbox with a shim, and only the records of the durable log.
func withoutLog(t *testing.T) (w *world, was View) {
	w = newWorld(t)
	w.plans = map[states.Event]any{attachNetwork: &testResult{"plan"}}
	require.NoError(t, w.run(t))
	require.NoError(t, w.Demand(t.Context(), testKey, startShim))
	was, err := w.Get(testKey)
	require.NoError(t, err)
	w.book.records = slices.DeleteFunc(w.book.records, func(r ledger.Record) bool { return !r.Durable })
	require.Len(t, w.book.records, 3, "begun, and the intent and the end of the network")
	return w, was
}

// restartHiding restarts on a host that hides the results of some steps.
func (w *world) restartHiding(t *testing.T, ctx context.Context, hidden func(states.Event) error) *world {
	w.Close(context.Background())
	next := newWorld(t)
	next.node.exists, next.node.hidden = w.left(), hidden
	next.book.records = slices.Clone(w.book.records)
	next.Restore(ctx, w.book.saved(), func(_ ledger.Key, spec any) Request { return Request{Pod: "ns/pod", Spec: spec} }, outsideOf(logLost))
	return next
}

func requireAsBefore(t *testing.T, w *world, was View) {
	t.Helper()
	require.NoError(t, w.Resume(t.Context(), testKey))
	now, err := w.Get(testKey)
	require.NoError(t, err)
	require.Equal(t, states.Ready, now.State)
	require.Nil(t, now.Exit)
	require.True(t, was.Created.Equal(now.Created))
	require.Len(t, now.Steps, len(was.Steps))
	for _, step := range was.Steps {
		require.Equal(t, step.Status, now.Step(step.Name).Status)
		require.Equal(t, step.Plan, now.Step(step.Name).Plan)
		require.Equal(t, step.Result, now.Step(step.Name).Result)
	}
	require.Empty(t, w.acted())
}

func TestReadyWithoutTheLog(t *testing.T) {
	old, was := withoutLog(t)
	lasting := len(old.book.records)
	w := old.restartHiding(t, t.Context(), nil)
	requireAsBefore(t, w, was)
	require.Equal(t, was.Step(attachNetwork).Started.UTC(), w.viewOf(t).Step(attachNetwork).Started.UTC(), "what is on record stays")
	rebuilt := slices.Clone(w.book.records)
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
	require.Equal(t, []string{
		"stop start_pause", "undo start_shim", "undo attach_network", "undo capture_netns",
		"undo declare_ready", "undo start_pause", "undo remap_snapshot", "undo allocate_ids",
	}, w.acted())

	for records := lasting; records <= len(rebuilt); records++ { // the daemon was killed when it had written so many
		old.book.records = rebuilt[:records]
		again := newWorld(t)
		again.node.exists, again.book.records = old.left(), slices.Clone(old.book.records)
		known := logLost
		known.Damaged = false // the daemon that was killed has made a new log
		known.Served = records < lasting+2
		again.Restore(t.Context(), old.book.saved(), func(_ ledger.Key, spec any) Request { return Request{Pod: "ns/pod", Spec: spec} }, outsideOf(known))
		requireAsBefore(t, again, was)
		again.Close(context.Background())
	}
	whole, _ := joined(ledger.Sandbox{Records: rebuilt})
	require.True(t, whole, "the next daemon doesn't examine the host")
}

func (w *world) viewOf(t *testing.T) View {
	view, err := w.Get(testKey)
	require.NoError(t, err)
	return view
}

// Data of a later release doesn't prevent the sandbox from being found, and is recorded again
// unchanged.
func TestReadyWithoutTheLogOfALaterRelease(t *testing.T) {
	old, _ := withoutLog(t)
	later := &ledger.Data{TypeURL: "of a later release", Value: []byte(`{"a":1}`)}
	for i := range old.book.records[1:] {
		r := &old.book.records[i+1]
		r.Data, r.Release = later, "v9"
	}
	w := old.restartHiding(t, t.Context(), nil)
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Equal(t, states.Ready, w.state(t))
	require.ErrorContains(t, w.Stop(t.Context(), testKey), `podfsm v9 recorded the step, and podfsm v1 can't read its data of type "of a later release"`)
	w.Close(t.Context()) // no retry writes a record now
	again := slices.DeleteFunc(slices.Clone(w.book.records[3:]), func(r ledger.Record) bool { return r.Data == nil || r.Data.TypeURL != later.TypeURL })
	require.Len(t, again, 2)
	for _, r := range again {
		require.Equal(t, later, r.Data)
		require.Equal(t, "v9", r.Release)
	}
}

func TestNotFoundWithoutTheLog(t *testing.T) {
	for _, hidden := range creationPath() {
		if hidden == attachNetwork {
			continue // which is on record
		}
		t.Run(string(hidden), func(t *testing.T) {
			old, _ := withoutLog(t)
			w := old.restartHiding(t, t.Context(), func(name states.Event) error {
				if name == hidden {
					return errdefs.ErrNotFound
				}
				return nil
			})
			require.Equal(t, states.NotReady, w.state(t))
			require.NoError(t, w.Resume(t.Context(), testKey))
			require.Eventually(t, func() bool { return w.state(t) == states.Stopped }, 10*time.Second, time.Millisecond)
			require.NoError(t, w.Remove(t.Context(), testKey))
			require.Empty(t, w.left())
		})
	}
}

// A search without an answer is repeated until its timeout.
func TestLooksWithoutAnAnswer(t *testing.T) {
	t.Run("an answer comes", func(t *testing.T) {
		old, was := withoutLog(t)
		looks := 0
		w := old.restartHiding(t, t.Context(), func(name states.Event) error {
			if name == startPause {
				if looks++; looks == 1 {
					return errors.New("no answer")
				}
			}
			return nil
		})
		requireAsBefore(t, w, was)
	})
	t.Run("none comes", func(t *testing.T) {
		old, _ := withoutLog(t)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		w := old.restartHiding(t, ctx, func(states.Event) error { return errors.New("no answer") })
		require.Equal(t, states.Quarantined, w.state(t))
		require.ErrorContains(t, w.view(t).Err, "no answer")
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Empty(t, w.acted(), "a sandbox that may run is not undone")
		require.NoError(t, w.Remove(t.Context(), testKey))
	})
	t.Run("a panic", func(t *testing.T) {
		old, was := withoutLog(t)
		looks := 0
		w := old.restartHiding(t, t.Context(), func(states.Event) error {
			if looks++; looks == 1 {
				panic("a bug")
			}
			return nil
		})
		requireAsBefore(t, w, was)
	})
}

// A sandbox that was undone, or is being undone, isn't found.
func TestEndedWithoutTheLog(t *testing.T) {
	old, _ := withoutLog(t)
	old.book.records = append(old.book.records, ledger.Record{Key: testKey, Kind: ledger.Undone, Step: string(attachNetwork), Durable: true, At: time.Now()})
	w := old.restartHiding(t, t.Context(), nil)
	require.Equal(t, states.NotReady, w.state(t))
}
