package lifecycle

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
)

// monotonic says whether durations since a time are measured by the monotonic clock.
func monotonic(at time.Time) bool { return at != at.Round(0) }

// A step of the wall clock, such as NTP's after a boot, doesn't change measured durations.
func TestDurationsAreMonotonic(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.demand(t))
	require.NoError(t, w.demand(t))
	require.NoError(t, w.Check(t.Context(), testKey))
	fails := true
	w.undo[attachNetwork] = func() error {
		if fails {
			fails = false
			return errors.New("no luck")
		}
		view, census := w.view(t), w.Census()
		require.True(t, monotonic(view.Since))
		require.True(t, monotonic(view.Step(attachNetwork).PendingSince))
		require.True(t, monotonic(census.Pending[captureNetNS].Since))
		require.True(t, monotonic(census.UnderWay[StepOperation{attachNetwork, OperationUndo}]))
		return nil
	}
	require.Error(t, w.Remove(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	w.Close(context.Background())
	require.NotEmpty(t, w.meter.times)
	for _, act := range w.meter.times {
		require.True(t, monotonic(act.Started) && monotonic(act.Ended), "%s %s", act.Operation, act.Step)
	}
}

// A restart changes no time that a sandbox shows, down to the nanosecond.
func TestDurationsOverARestart(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	var slewed time.Duration // the wall clock, meanwhile
	for i := range w.book.records {
		if w.book.records[i].Kind == ledger.Intent {
			slewed += time.Minute
		}
		w.book.records[i].At = w.book.records[i].At.Add(slewed).Round(0) // as it comes back from the ledger
	}
	before, after := w.view(t), w.replayed(t)
	for i, step := range before.Steps {
		require.NotZero(t, step.Duration)
		require.Equal(t, step.Duration, after.Steps[i].Duration, step.Name)
		require.True(t, step.Started.Add(time.Duration(i+1)*time.Minute).Equal(after.Steps[i].Started), "by the wall clock")
	}
	for i, transition := range before.Transitions {
		require.NotZero(t, transition.After)
		require.Equal(t, transition.After, after.Transitions[i].After, transition.Event)
	}
}

// The wall clock may have been set back between two records of a step.
func TestReplayWithAClockThatWasSetBack(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.Stop(t.Context(), testKey))
	at := time.Now()
	for i := range w.book.records {
		at = at.Add(-time.Hour)
		w.book.records[i].At = at.Round(0)
	}
	view := w.replayed(t)
	for _, step := range view.Steps {
		require.Zero(t, step.Duration, step.Name)
	}
	for _, transition := range view.Transitions {
		require.NotZero(t, transition.After, "by the monotonic clock")
		require.False(t, transition.At.Before(view.Created), "shown times never go back")
	}
}

// The kubelet takes the sandbox with the latest creation time for the pod's own, so that must be
// the newest even if the clock was set back.
func TestNewSandboxIsNeverOlderThanItsPodsLast(t *testing.T) {
	w := newWorld(t)
	spec, err := ledger.Marshal(&testSpec{"pod"})
	require.NoError(t, err)
	ahead := time.Now().Add(time.Hour)
	begun := ledger.Record{Key: testKey, Kind: ledger.Begun, At: ahead, Data: spec}
	w.Restore(t.Context(), []ledger.Sandbox{{Key: testKey, Records: []ledger.Record{begun}}}, func(ledger.Key, any) Request {
		return Request{Pod: "ns/pod", Spec: &testSpec{}}
	}, outsideOf(kept))
	var created []time.Time
	for _, id := range []string{"s2", "s3"} {
		key := ledger.Key{Namespace: "k8s.io", ID: id}
		require.NoError(t, w.Create(t.Context(), key, Request{Pod: "ns/pod", Spec: &testSpec{}}))
		created = append(created, w.Created(key))
		require.True(t, w.book.of(key)[0].At.Equal(w.Created(key)), "a restart shows the same")
	}
	require.True(t, created[0].After(ahead))
	require.True(t, created[1].After(created[0]))

	other := ledger.Key{Namespace: "k8s.io", ID: "s4"}
	require.NoError(t, w.Create(t.Context(), other, Request{Pod: "ns/other", Spec: &testSpec{}}))
	require.True(t, w.Created(other).Before(ahead), "other pods are not affected")
}
