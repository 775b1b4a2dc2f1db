package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// What recovery knows besides the records of a sandbox.
var (
	kept     = Outside{Listed: true, Started: true}                 // containerd's service has it
	begun    = Outside{Listed: true}                                // it wasn't ready
	unlisted = Outside{Served: true}                                // containerd's service doesn't have it
	rebooted = Outside{Listed: true, Started: true, Rebooted: true} // it was ready
)

// outsideOf returns the same for each sandbox.
func outsideOf(known Outside) func(ledger.Sandbox) Outside {
	return func(ledger.Sandbox) Outside { return known }
}

// restart makes a new engine with the node and the records of the old one.
func (w *world) restart(t *testing.T, known Outside) *world {
	w.Close(context.Background())
	next := newWorld(t)
	next.node.exists, next.node.exited = w.left(), w.node.exited
	next.Restore(t.Context(), w.book.saved(), func(_ ledger.Key, spec any) Request {
		if spec == nil {
			return Request{Pod: "ns/unknown", Spec: &testSpec{}}
		}
		return Request{Pod: "ns/" + spec.(*testSpec).Name, Spec: spec}
	}, outsideOf(known))
	return next
}

// restartOn is restart on the same ledger, with an engine that doesn't retry by itself.
func (w *world) restartOn(t *testing.T, known Outside) (next *world, told *writeOffs) {
	w.Close(context.Background())
	next = newWorldOn(t, w.book, newNode())
	next.book, next.node.exists, next.node.exited = w.book, w.left(), w.node.exited
	told = next.calm()
	next.Restore(t.Context(), w.book.saved(), func(_ ledger.Key, spec any) Request { return Request{Pod: "ns/pod", Spec: spec} }, outsideOf(known))
	return next, told
}

// interrupted returns a world after a kill during a step.
func interrupted(t *testing.T, during states.Event) *world {
	w := newWorld(t)
	reached, killed := make(chan struct{}), make(chan struct{})
	w.do[during] = func(context.Context) error {
		close(reached)
		<-killed
		return errors.New("killed")
	}
	w.create(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.Start(context.Background(), testKey)
	}()
	<-reached
	saved, left := w.book.saved(), w.left()
	close(killed)
	<-done
	w.book.records = saved[0].Records
	w.node.exists = left
	return w
}

func TestRestartDuringEachStepRollsBack(t *testing.T) {
	for _, during := range creationPath() {
		t.Run(string(during), func(t *testing.T) {
			w := interrupted(t, during).restart(t, begun)
			require.Contains(t, w.left(), during)
			require.NoError(t, w.Resume(t.Context(), testKey))
			require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
			require.Empty(t, w.left())
			require.Equal(t, states.RolledBack, w.state(t))
		})
	}
}

func TestRestartOfAReadySandbox(t *testing.T) {
	ready := func(t *testing.T) *world {
		w := newWorld(t)
		require.NoError(t, w.run(t))
		return w
	}
	onlyLasting := func(w *world) *world {
		atOnce := func(r ledger.Record) bool { return r.Durable && !r.CanWait }
		for len(w.book.records) > 0 && !atOnce(w.book.records[len(w.book.records)-1]) {
			w.book.records = w.book.records[:len(w.book.records)-1]
		}
		w.book.records = slices.DeleteFunc(w.book.records, func(r ledger.Record) bool { return !r.Durable })
		return w
	}
	t.Run("whose process runs is adopted", func(t *testing.T) {
		before := ready(t)
		old, err := before.Get(testKey)
		require.NoError(t, err)
		w := before.restart(t, kept)
		require.NoError(t, w.Resume(t.Context(), testKey))
		view, err := w.Get(testKey)
		require.NoError(t, err)
		require.Equal(t, states.Ready, view.State)
		require.Equal(t, old.Pod, view.Pod)
		require.Equal(t, old.Spec, view.Spec)
		require.Len(t, view.Transitions, len(old.Transitions))
		for i, step := range view.Steps {
			require.Equal(t, old.Steps[i].Status, step.Status)
			require.Equal(t, old.Steps[i].Result, step.Result)
		}
		require.Empty(t, w.acted())
		require.NoError(t, w.Remove(t.Context(), testKey))
		require.Empty(t, w.left())
	})
	t.Run("whose process has ended is not ready", func(t *testing.T) {
		before := ready(t)
		before.node.exited = &Exit{Code: 7}
		w := before.restart(t, kept)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Equal(t, states.NotReady, w.state(t))
		exit, err := w.Wait(t.Context(), testKey)
		require.NoError(t, err)
		require.Equal(t, uint32(7), exit.Code)
	})
	t.Run("whose process is unknown is examined again", func(t *testing.T) {
		w := ready(t).restart(t, kept)
		w.node.unknown = errors.New("no answer")
		require.ErrorContains(t, w.Resume(t.Context(), testKey), "no answer")
		require.Equal(t, states.Ready, w.state(t))
		w.node.mu.Lock()
		w.node.unknown, w.node.exited = nil, &Exit{Code: 7}
		w.node.mu.Unlock()
		require.Eventually(t, func() bool { return w.state(t) == states.NotReady }, 10*time.Second, time.Millisecond)
	})
	t.Run("that was stopped keeps the exit of its process", func(t *testing.T) {
		before := ready(t)
		require.NoError(t, before.Stop(t.Context(), testKey))
		old, err := before.Get(testKey)
		require.NoError(t, err)
		w := before.restart(t, kept)
		view, err := w.Get(testKey)
		require.NoError(t, err)
		require.Equal(t, old.Exit.Code, view.Exit.Code)
		require.True(t, old.Exit.At.Equal(view.Exit.At))
	})
	t.Run("that containerd doesn't list is removed", func(t *testing.T) {
		w := ready(t).restart(t, unlisted)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
		require.Empty(t, w.left())
	})
	t.Run("after a reboot is stopped, without a network", func(t *testing.T) {
		w := onlyLasting(ready(t)).restart(t, rebooted)
		require.Equal(t, states.NotReady, w.state(t))
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, func() bool { return w.state(t) == states.Stopped }, 10*time.Second, time.Millisecond)
		require.NotContains(t, w.left(), attachNetwork)
		require.NoError(t, w.Remove(t.Context(), testKey))
		require.Empty(t, w.left())
	})
	t.Run("after a reboot, if it was never ready, is rolled back", func(t *testing.T) {
		w := onlyLasting(interrupted(t, attachNetwork)).restart(t, Outside{Listed: true, Rebooted: true})
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
		require.Empty(t, w.left())
	})
}

// Cleanups after a restart wait while the engine is held. Then only resumeParallel run at a time.
// Requests don't wait for them, even if all of them hang.
func TestRestartLimitsCleanups(t *testing.T) {
	const sandboxes = 3 * resumeParallel
	old := interrupted(t, attachNetwork)
	w := newWorld(t)
	saved := make([]ledger.Sandbox, sandboxes)
	for i := range saved {
		saved[i] = ledger.Sandbox{Key: ledger.Key{Namespace: "k8s.io", ID: fmt.Sprint("s", i)}, Records: old.book.saved()[0].Records}
	}
	begin := w.Hold()
	w.Restore(t.Context(), saved, func(_ ledger.Key, spec any) Request { return Request{Spec: spec} }, outsideOf(begun))
	release := make(chan struct{})
	var undoing, most, all atomic.Int32
	w.undo[attachNetwork] = func() error {
		all.Add(1)
		if now := undoing.Add(1); now > most.Load() {
			most.Store(now)
		}
		defer undoing.Add(-1)
		<-release
		return nil
	}
	for _, s := range saved {
		require.NoError(t, w.Resume(t.Context(), s.Key))
	}
	first := make(chan error)
	go func() { first <- w.Stop(t.Context(), saved[0].Key) }()
	require.Eventually(t, func() bool { return undoing.Load() == 1 }, 10*time.Second, time.Millisecond, "a request doesn't wait")
	require.EqualValues(t, 1, all.Load(), "all others wait")
	for range 2 { // the second does nothing
		begin()
	}
	require.Eventually(t, func() bool { return undoing.Load() >= resumeParallel }, 10*time.Second, time.Millisecond)
	require.Len(t, w.List(), sandboxes)

	asked := make(chan error)
	go func() { asked <- w.Stop(t.Context(), saved[sandboxes-1].Key) }()
	require.Eventually(t, func() bool { return undoing.Load() == resumeParallel+1 }, 10*time.Second, time.Millisecond, "a request doesn't wait for a slot")
	close(release)
	require.NoError(t, <-asked)
	require.NoError(t, <-first)
	require.Eventually(t, func() bool { return len(w.List()) == 0 }, 10*time.Second, time.Millisecond)
	require.EqualValues(t, resumeParallel+1, most.Load())
}

// Only resumeParallel retries without a waiting caller run at a time.
func TestLimitOfRetries(t *testing.T) {
	const sandboxes = 5 * resumeParallel
	w := newWorld(t)
	w.backoff = func(int) time.Duration { return 50 * time.Millisecond }
	blocked := make(chan struct{})
	release := sync.OnceFunc(func() { close(blocked) })
	t.Cleanup(release) // a test that fails mustn't hang in the engine's end
	var mended atomic.Bool
	var undoing, most atomic.Int32
	w.undo[attachNetwork] = func() error {
		if !mended.Load() {
			return errors.New("no luck")
		}
		if now := undoing.Add(1); now > most.Load() {
			most.Store(now)
		}
		defer undoing.Add(-1)
		<-blocked
		return nil
	}
	for i := range sandboxes {
		key := ledger.Key{Namespace: "k8s.io", ID: fmt.Sprint("s", i)}
		require.NoError(t, w.Create(t.Context(), key, Request{Spec: &testSpec{}}))
		require.NoError(t, w.Start(t.Context(), key))
		require.Error(t, w.Remove(t.Context(), key))
	}
	mended.Store(true)
	due := func() bool {
		return !slices.ContainsFunc(w.List(), func(v View) bool { return v.NextTry.After(time.Now()) })
	}
	require.Eventually(t, func() bool { return due() && undoing.Load() >= resumeParallel }, time.Minute, time.Millisecond)
	release()
	require.Eventually(t, func() bool { return len(w.List()) == 0 }, time.Minute, time.Millisecond)
	require.LessOrEqual(t, most.Load(), int32(resumeParallel))
}

func TestRestartResumesAStopOrRemoval(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.Demand(t.Context(), testKey, startShim))
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NoError(t, w.Remove(t.Context(), testKey))
	full := w.book.all
	begun := slices.IndexFunc(full, func(r ledger.Record) bool { return r.Event == string(states.Stop) })
	for cut := begun + 1; cut <= len(full); cut++ {
		last := full[cut-1]
		t.Run("after "+string(last.Kind)+" "+last.Step+last.Event, func(t *testing.T) {
			old := newWorld(t)
			for _, name := range stepNames() {
				undone := func(r ledger.Record) bool { return r.Kind == ledger.Undone && r.Step == string(name) }
				if !slices.ContainsFunc(full[:cut], undone) {
					old.node.exists = append(old.node.exists, name)
				}
			}
			old.book.records = full[:cut]
			w := old.restart(t, kept)
			require.NoError(t, w.Resume(t.Context(), testKey))
			require.NoError(t, ignoreGone(w.Stop(t.Context(), testKey)))
			require.NoError(t, w.Remove(t.Context(), testKey))
			require.Empty(t, w.left())
		})
	}
}

func ignoreGone(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func TestRestartCompletesPendingCleanup(t *testing.T) {
	w := newWorld(t)
	w.undo[startPause] = func() error { return errors.New("no luck") }
	w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
	require.Error(t, w.run(t))
	w = w.restart(t, kept)
	require.Equal(t, states.CleanupOwed, w.state(t))
	view, err := w.Get(testKey)
	require.NoError(t, err)
	require.False(t, view.Step(startPause).PendingSince.IsZero(), "since when is on record")
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Empty(t, w.left())
}

// After the undo of an earlier daemon's step, the step is probed: the undo's success isn't enough.
func TestRestartProbesAfterUndo(t *testing.T) {
	w := interrupted(t, attachNetwork).restart(t, begun)
	w.node.still = captureNetNS
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, func() bool {
		view, err := w.Get(testKey)
		return err == nil && view.State == states.CleanupOwed
	}, 10*time.Second, time.Millisecond)
	w.node.mu.Lock()
	w.node.still = ""
	w.node.mu.Unlock()
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
}

func TestRestartQuarantinesWhatItCantRead(t *testing.T) {
	for name, spoil := range map[string]func([]ledger.Record) []ledger.Record{
		"damaged bytes": func(r []ledger.Record) []ledger.Record {
			r[3] = ledger.Record{Seq: r[3].Seq, Key: testKey, Kind: ledger.Unreadable, Error: "checksum mismatch"}
			return r
		},
		"damaged data":     func(r []ledger.Record) []ledger.Record { r[2].Data.Value = []byte("{"); return r },
		"no specification": func(r []ledger.Record) []ledger.Record { return r[1:] },
		"a step without a name": func(r []ledger.Record) []ledger.Record {
			r[3].Step = ""
			return r
		},
		"a move to nowhere": func(r []ledger.Record) []ledger.Record { return append(r, ledger.Record{Kind: ledger.Moved}) },
		"a transition without an event": func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.Moved, From: "Ready", State: "NotReady"})
		},
		"an illegal transition": func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.Moved, From: "Ready", Event: "stop", State: "Removed"})
		},
		"a step from a state that none begins in": func(r []ledger.Record) []ledger.Record { r[4].From = "Stopped"; return r },
		"a cleanup without a goal": func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.CleanupPending, From: "Stopping", Event: "leave_cleanup_pending", State: "CleanupOwed"})
		},
		"a move to a cleanup without a goal": func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.Moved, From: "Stopping", Event: "leave_cleanup_pending", State: "CleanupOwed"})
		},
		"no exit":  func(r []ledger.Record) []ledger.Record { return append(r, ledger.Record{Kind: ledger.Exited}) },
		"no claim": func(r []ledger.Record) []ledger.Record { return append(r, ledger.Record{Kind: ledger.Claimed}) },
	} {
		t.Run(name, func(t *testing.T) {
			old := newWorld(t)
			require.NoError(t, old.run(t))
			old.book.records = spoil(old.book.records)
			w := old.restart(t, kept)
			require.Equal(t, states.Quarantined, w.state(t))
			require.NoError(t, w.Resume(t.Context(), testKey))
			require.True(t, errdefs.IsFailedPrecondition(w.Start(t.Context(), testKey)))
			require.NoError(t, w.Stop(t.Context(), testKey))
			require.NoError(t, w.Remove(t.Context(), testKey))
			require.Empty(t, w.left())
		})
	}
}

// No caller asks for a sandbox that containerd's service doesn't list.
func TestRestartRemovesUnreadableUnlistedSandbox(t *testing.T) {
	old := newWorld(t)
	require.NoError(t, old.run(t))
	old.book.records[3].Step = ""
	w := old.restart(t, unlisted)
	require.Equal(t, states.Quarantined, w.state(t))
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Empty(t, w.left())
}

// A damaged ledger may bring back a removed sandbox of a pod that has another one now.
func TestRestoreTakesTwoOfOneName(t *testing.T) {
	w := newWorld(t)
	var saved []ledger.Sandbox
	for _, id := range []string{"gone", "lives"} {
		spec, err := ledger.Marshal(&testSpec{"pod"})
		require.NoError(t, err)
		key := ledger.Key{Namespace: "k8s.io", ID: id}
		saved = append(saved, ledger.Sandbox{Key: key, Records: []ledger.Record{{Key: key, Kind: ledger.Begun, Data: spec}}})
	}
	w.Restore(t.Context(), saved, func(ledger.Key, any) Request {
		return Request{Name: "ns/pod", Pod: "ns/pod", Spec: &testSpec{"pod"}}
	}, outsideOf(kept))
	require.Len(t, w.List(), 2)
	require.NoError(t, w.Remove(t.Context(), saved[0].Key))
	err := w.Create(t.Context(), testKey, Request{Name: "ns/pod", Spec: &testSpec{"pod"}})
	require.ErrorContains(t, err, `reserved for sandbox "lives"`)
}
