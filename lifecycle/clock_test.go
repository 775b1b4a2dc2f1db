package lifecycle

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/journal"
)

// monotonic says whether the wall clock has no part in what is measured from a time on.
func monotonic(at time.Time) bool { return at != at.Round(0) }

// A step of the wall clock, as NTP makes one after a boot, neither lengthens nor shortens what is measured meanwhile.
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
		require.True(t, monotonic(view.Step(attachNetwork).OwedSince))
		require.True(t, monotonic(census.Debts[captureNetNS].Since))
		require.True(t, monotonic(census.Acts[StepAct{attachNetwork, ActUndo}]))
		return nil
	}
	require.Error(t, w.Remove(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	w.Close(context.Background())
	require.NotEmpty(t, w.meter.times)
	for _, act := range w.meter.times {
		require.True(t, monotonic(act.Started) && monotonic(act.Ended), "%s %s", act.Kind, act.Step)
	}
}

// A restart changes nothing that is shown of a sandbox, down to the nanosecond.
func TestDurationsOverARestart(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	var slewed time.Duration // the wall clock, meanwhile
	for i := range w.book.records {
		if w.book.records[i].Kind == journal.Intent {
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

// Between two records of a step the wall clock may have been set back.
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
		require.False(t, transition.At.Before(view.Created), "what is shown goes forward")
	}
}

// The kubelet takes the sandbox that was created last for the pod's own, whatever the clock said.
func TestNewSandboxIsNeverOlderThanItsPodsLast(t *testing.T) {
	w := newWorld(t)
	spec, err := journal.Marshal(&testSpec{"pod"})
	require.NoError(t, err)
	ahead := time.Now().Add(time.Hour)
	begun := journal.Record{Key: testKey, Kind: journal.Begun, At: ahead, Data: spec}
	w.Restore(t.Context(), []journal.Sandbox{{Key: testKey, Records: []journal.Record{begun}}}, func(journal.Key, any) Request {
		return Request{Pod: "ns/pod", Spec: &testSpec{}}
	}, outsideOf(kept))
	var created []time.Time
	for _, id := range []string{"s2", "s3"} {
		key := journal.Key{Namespace: "k8s.io", ID: id}
		require.NoError(t, w.Create(t.Context(), key, Request{Pod: "ns/pod", Spec: &testSpec{}}))
		created = append(created, w.Created(key))
		require.True(t, w.book.of(key)[0].At.Equal(w.Created(key)), "a restart shows the same")
	}
	require.True(t, created[0].After(ahead))
	require.True(t, created[1].After(created[0]))

	other := journal.Key{Namespace: "k8s.io", ID: "s4"}
	require.NoError(t, w.Create(t.Context(), other, Request{Pod: "ns/other", Spec: &testSpec{}}))
	require.True(t, w.Created(other).Before(ahead), "another pod has nothing to do with it")
}
