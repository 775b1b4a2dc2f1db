package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// testMeter keeps all counts.
type testMeter struct {
	mu         sync.Mutex
	acts       []string
	times      []Try
	recoveries []Recovery
}

func (m *testMeter) Tried(act Try, outcome Outcome) {
	m.mu.Lock()
	defer m.mu.Unlock()
	text := fmt.Sprintf("%s %s: %s", act.Operation, act.Step, outcome)
	if (act.Err != nil) != (outcome == OutcomeError || outcome == OutcomeCanceled) || act.Ended.Before(act.Started) || act.Started.IsZero() {
		text += fmt.Sprintf(" %+v", act)
	}
	m.acts, m.times = append(m.acts, text), append(m.times, act)
}

func (m *testMeter) Recovered(recovery Recovery, _ time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.recoveries = append(m.recoveries, recovery)
}

func (m *testMeter) acted() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.acts)
}

func (m *testMeter) recovered() []Recovery {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.recoveries)
}

func TestEachTryIsMetered(t *testing.T) {
	w := newWorld(t)
	undos := 0
	w.do[attachNetwork] = func(context.Context) error { return errNoLuck }
	w.undo[captureNetNS] = func() error {
		if undos++; undos < 3 {
			return errNoLuck
		}
		return nil
	}
	require.Error(t, w.run(t))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Equal(t, []string{
		"do allocate_ids: ok", "do remap_snapshot: ok", "do start_pause: ok", "do capture_netns: ok", "do attach_network: error",
		"undo attach_network: ok", "undo capture_netns: error", "undo start_pause: ok", "undo remap_snapshot: ok", "undo allocate_ids: ok",
		"undo capture_netns: error", "undo capture_netns: ok",
	}, w.meter.acted())
}

func TestCensus(t *testing.T) {
	w := newWorld(t)
	reached, release := make(chan struct{}), make(chan struct{})
	w.do[attachNetwork] = func(context.Context) error {
		close(reached)
		<-release
		return errNoLuck
	}
	w.undo[attachNetwork] = func() error { return errNoLuck }
	w.engineWaits()
	w.create(t)
	require.Equal(t, map[states.State]int{states.New: 1}, counted(w.Census()))
	done := make(chan error, 1)
	go func() { done <- w.Start(context.Background(), testKey) }()
	<-reached

	census := w.Census()
	require.Equal(t, map[states.State]int{netNSCaptured: 1}, counted(census))
	require.Equal(t, []StepOperation{{attachNetwork, OperationDo}}, underWay(census))
	since, ok := census.UnderWay[StepOperation{attachNetwork, OperationDo}]
	require.True(t, ok)
	require.WithinDuration(t, time.Now(), since, time.Minute)
	require.Zero(t, census.Pending[attachNetwork])

	close(release)
	require.Error(t, <-done)
	census = w.Census()
	require.Equal(t, map[states.State]int{states.CleanupOwed: 1}, counted(census))
	require.Empty(t, underWay(census))
	require.Equal(t, 1, census.Pending[attachNetwork].Count)
	require.Equal(t, 1, census.Pending[captureNetNS].Count, "it waits for the other")
	require.WithinDuration(t, time.Now(), census.Pending[attachNetwork].Since, time.Minute)
}

// An empty census has all states and steps of this release.
func TestCensusOfNothing(t *testing.T) {
	census := newWorld(t).Census()
	require.Len(t, census.States, len(testTable.States())-2, "all but the two ends")
	require.Len(t, census.UnderWay, 2*len(stepNames())+1)
	require.Len(t, census.Pending, len(stepNames()))
	require.Len(t, census.Recovering, 3)
	require.Empty(t, counted(census))
	require.Empty(t, underWay(census))
}

// counted returns the states with sandboxes.
func counted(c Census) map[states.State]int {
	maps.DeleteFunc(c.States, func(_ states.State, count int) bool { return count == 0 })
	return c.States
}

func underWay(c Census) (acts []StepOperation) {
	for act, since := range c.UnderWay {
		if !since.IsZero() {
			acts = append(acts, act)
		}
	}
	return acts
}

// engineWaits makes the engine leave pending cleanups to the test.
func (w *world) engineWaits() { w.backoff = func(int) time.Duration { return time.Hour } }

func TestRecoveriesAreMetered(t *testing.T) {
	for name, tc := range map[string]struct {
		leave func(t *testing.T) *world
		known Outside
		want  Recovery
	}{
		"ready":                          {leave: readyWorld, want: RecoveryAdopted},
		"ready, and pause ended":         {leave: func(t *testing.T) *world { w := readyWorld(t); w.exited = &Exit{Code: 1}; return w }, want: RecoveryLostPause},
		"ready, and its process unknown": {leave: func(t *testing.T) *world { w := readyWorld(t); w.unknown = errNoLuck; return w }, want: RecoveryUnknown},
		"being made":                     {leave: func(t *testing.T) *world { return interrupted(t, attachNetwork) }, want: RecoveryRolledBack},
		"not listed":                     {leave: readyWorld, known: unlisted, want: RecoveryRemoved},
		"from before a reboot":           {leave: readyWorld, known: rebooted, want: RecoveryStopped},
		"stopped": {leave: func(t *testing.T) *world {
			w := readyWorld(t)
			require.NoError(t, w.Stop(t.Context(), testKey))
			return w
		}, want: RecoveryKept},
		"an undo that fails": {leave: func(t *testing.T) *world {
			w := interrupted(t, attachNetwork)
			w.undo[allocateIDs] = func() error { return errNoLuck }
			return w
		}, want: RecoveryPendingCleanup},
	} {
		t.Run(name, func(t *testing.T) {
			old := tc.leave(t)
			if tc.known == (Outside{}) {
				tc.known = kept
			}
			w := old.restart(t, tc.known)
			w.undo, w.unknown = old.undo, old.unknown
			w.engineWaits()
			_ = w.Resume(t.Context(), testKey)
			require.Eventually(t, func() bool { return len(w.meter.recovered()) > 0 }, 10*time.Second, time.Millisecond)
			require.Equal(t, []Recovery{tc.want}, w.meter.recovered())
			pending := map[Recovery]int{RecoveryWaiting: 0, RecoveryPendingCleanup: 0, RecoveryUnknown: 0}
			if _, stays := pending[tc.want]; stays {
				pending[tc.want] = 1
			}
			require.Equal(t, pending, w.Census().Recovering)
		})
	}
}

// A recovery is pending from the restart until its cleanup is completed, by a retry or by a
// request.
func TestRecoveryIsPendingUntilItsEnd(t *testing.T) {
	old := interrupted(t, attachNetwork)
	old.undo[allocateIDs] = func() error { return errNoLuck }
	w := old.restart(t, kept)
	w.undo = old.undo
	w.engineWaits()
	require.Equal(t, 1, w.Census().Recovering[RecoveryWaiting])
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, func() bool { return w.Census().Recovering[RecoveryPendingCleanup] == 1 }, 10*time.Second, time.Millisecond)
	require.Zero(t, w.Census().Recovering[RecoveryWaiting])
	delete(w.undo, allocateIDs)
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Zero(t, w.Census().Recovering[RecoveryPendingCleanup])
}

func readyWorld(t *testing.T) *world {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	return w
}

func BenchmarkCensus(b *testing.B) {
	for _, count := range []int{10, 1000} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			process := &fakeEnder{fakeStep{declared: testSteps()[2]}}
			e := &Engine{table: testTable, process: process, sandboxes: map[ledger.Key]*sandbox{}, meter: unmetered{}}
			for i := range count {
				key := ledger.Key{Namespace: "ns", ID: fmt.Sprint(i)}
				e.sandboxes[key] = newSandbox(e, key, Request{})
			}
			for b.Loop() {
				e.Census()
			}
		})
	}
}

var errNoLuck = errors.New("no luck")
