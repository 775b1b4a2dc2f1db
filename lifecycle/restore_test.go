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

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
)

// What a restart knows besides the records of a sandbox.
var (
	kept     = Outside{Listed: true, Started: true}                 // somebody will ask for it
	begun    = Outside{Listed: true}                                // it wasn't ready
	nobodys  = Outside{Served: true}                                // containerd's service doesn't know it
	rebooted = Outside{Listed: true, Started: true, Rebooted: true} // it was ready
)

// outsideOf is the same of each sandbox.
func outsideOf(known Outside) func(journal.Sandbox) Outside {
	return func(journal.Sandbox) Outside { return known }
}

// restart makes a new engine, with what there is of the old one's world, from the records of the old one.
func (w *world) restart(t *testing.T, known Outside) *world {
	w.Close(context.Background())
	next := newWorld(t)
	next.node.exists, next.node.exited = w.left(), w.node.exited
	next.Restore(t.Context(), w.book.saved(), func(_ journal.Key, spec any) Request {
		if spec == nil {
			return Request{Pod: "ns/unknown", Spec: &testSpec{}}
		}
		return Request{Pod: "ns/" + spec.(*testSpec).Name, Spec: spec}
	}, outsideOf(known))
	return next
}

// restartOn is as restart, and the next daemon writes to the same ledger. Its engine is calm.
func (w *world) restartOn(t *testing.T, known Outside) (next *world, told *writeOffs) {
	w.Close(context.Background())
	next = newWorldOn(t, w.book, newNode())
	next.book, next.node.exists, next.node.exited = w.book, w.left(), w.node.exited
	told = next.calm()
	next.Restore(t.Context(), w.book.saved(), func(_ journal.Key, spec any) Request { return Request{Pod: "ns/pod", Spec: spec} }, outsideOf(known))
	return next, told
}

// interrupted leaves a world as a kill does that comes while a step acts.
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
		atOnce := func(r journal.Record) bool { return r.Durable && !r.CanWait }
		for len(w.book.records) > 0 && !atOnce(w.book.records[len(w.book.records)-1]) {
			w.book.records = w.book.records[:len(w.book.records)-1]
		}
		w.book.records = slices.DeleteFunc(w.book.records, func(r journal.Record) bool { return !r.Durable })
		return w
	}
	t.Run("adopts it", func(t *testing.T) {
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
	t.Run("sees that its process has ended", func(t *testing.T) {
		before := ready(t)
		before.node.exited = &Exit{Code: 7}
		w := before.restart(t, kept)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Equal(t, states.NotReady, w.state(t))
		exit, err := w.Wait(t.Context(), testKey)
		require.NoError(t, err)
		require.Equal(t, uint32(7), exit.Code)
	})
	t.Run("looks again when nobody knows whether its process has ended", func(t *testing.T) {
		w := ready(t).restart(t, kept)
		w.node.unknown = errors.New("no answer")
		require.ErrorContains(t, w.Resume(t.Context(), testKey), "no answer")
		require.Equal(t, states.Ready, w.state(t))
		w.node.mu.Lock()
		w.node.unknown, w.node.exited = nil, &Exit{Code: 7}
		w.node.mu.Unlock()
		require.Eventually(t, func() bool { return w.state(t) == states.NotReady }, 10*time.Second, time.Millisecond)
	})
	t.Run("knows how the process of a stopped one has ended", func(t *testing.T) {
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
	t.Run("removes one that nobody asks for", func(t *testing.T) {
		w := ready(t).restart(t, nobodys)
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
		require.Empty(t, w.left())
	})
	t.Run("after a reboot it stays, stopped, with nothing on the network", func(t *testing.T) {
		w := onlyLasting(ready(t)).restart(t, rebooted)
		require.Equal(t, states.NotReady, w.state(t))
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, func() bool { return w.state(t) == states.Stopped }, 10*time.Second, time.Millisecond)
		require.NotContains(t, w.left(), attachNetwork)
		require.NoError(t, w.Remove(t.Context(), testKey))
		require.Empty(t, w.left())
	})
	t.Run("after a reboot an unfinished one goes", func(t *testing.T) {
		w := onlyLasting(interrupted(t, attachNetwork)).restart(t, Outside{Listed: true, Rebooted: true})
		require.NoError(t, w.Resume(t.Context(), testKey))
		require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
		require.Empty(t, w.left())
	})
}

// What a restart has left undone waits while the engine is held, for nobody's request, and is then undone some sandboxes at a time. One
// whose undo hangs keeps nobody else from being stopped.
func TestRestartUndoesSomeAtATime(t *testing.T) {
	const sandboxes = 3 * resumeParallel
	old := interrupted(t, attachNetwork)
	w := newWorld(t)
	saved := make([]journal.Sandbox, sandboxes)
	for i := range saved {
		saved[i] = journal.Sandbox{Key: journal.Key{Namespace: "k8s.io", ID: fmt.Sprint("s", i)}, Records: old.book.saved()[0].Records}
	}
	begin := w.Hold()
	w.Restore(t.Context(), saved, func(_ journal.Key, spec any) Request { return Request{Spec: spec} }, outsideOf(begun))
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
	require.Eventually(t, func() bool { return undoing.Load() == resumeParallel+1 }, 10*time.Second, time.Millisecond, "a request doesn't wait for its turn")
	close(release)
	require.NoError(t, <-asked)
	require.NoError(t, <-first)
	require.Eventually(t, func() bool { return len(w.List()) == 0 }, 10*time.Second, time.Millisecond)
	require.EqualValues(t, resumeParallel+1, most.Load())
}

// However many cleanups are due, those that nobody waits for are tried again some at a time.
func TestRetriesSomeAtATime(t *testing.T) {
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
		key := journal.Key{Namespace: "k8s.io", ID: fmt.Sprint("s", i)}
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

func TestRestartGoesOnWithWhatWasBegun(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.Demand(t.Context(), testKey, startShim))
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NoError(t, w.Remove(t.Context(), testKey))
	full := w.book.all
	begun := slices.IndexFunc(full, func(r journal.Record) bool { return r.Event == string(states.Stop) })
	for cut := begun + 1; cut <= len(full); cut++ {
		last := full[cut-1]
		t.Run("after "+string(last.Kind)+" "+last.Step+last.Event, func(t *testing.T) {
			old := newWorld(t)
			for _, name := range stepNames() {
				undone := func(r journal.Record) bool { return r.Kind == journal.Undone && r.Step == string(name) }
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

func TestRestartPaysWhatIsOwed(t *testing.T) {
	w := newWorld(t)
	w.undo[startPause] = func() error { return errors.New("no luck") }
	w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
	require.Error(t, w.run(t))
	w = w.restart(t, kept)
	require.Equal(t, states.CleanupOwed, w.state(t))
	view, err := w.Get(testKey)
	require.NoError(t, err)
	require.False(t, view.Step(startPause).OwedSince.IsZero(), "since when is on record")
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Empty(t, w.left())
}

// What an earlier daemon made is looked for after its undo: an undo that only says that it succeeded isn't enough.
func TestRestartLooksForWhatItUndid(t *testing.T) {
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
	for name, spoil := range map[string]func([]journal.Record) []journal.Record{
		"damaged bytes": func(r []journal.Record) []journal.Record {
			r[3] = journal.Record{Seq: r[3].Seq, Key: testKey, Kind: journal.Unreadable, Error: "checksum mismatch"}
			return r
		},
		"damaged data":     func(r []journal.Record) []journal.Record { r[2].Data.Value = []byte("{"); return r },
		"no specification": func(r []journal.Record) []journal.Record { return r[1:] },
		"a step without a name": func(r []journal.Record) []journal.Record {
			r[3].Step = ""
			return r
		},
		"a move to nowhere": func(r []journal.Record) []journal.Record { return append(r, journal.Record{Kind: journal.Moved}) },
		"a transition without an event": func(r []journal.Record) []journal.Record {
			return append(r, journal.Record{Kind: journal.Moved, From: "Ready", State: "NotReady"})
		},
		"an illegal transition": func(r []journal.Record) []journal.Record {
			return append(r, journal.Record{Kind: journal.Moved, From: "Ready", Event: "stop", State: "Removed"})
		},
		"a step from a state that none begins in": func(r []journal.Record) []journal.Record { r[4].From = "Stopped"; return r },
		"a cleanup without a goal": func(r []journal.Record) []journal.Record {
			return append(r, journal.Record{Kind: journal.Owed, From: "Stopping", Event: "owe_cleanup", State: "CleanupOwed"})
		},
		"a move to a cleanup without a goal": func(r []journal.Record) []journal.Record {
			return append(r, journal.Record{Kind: journal.Moved, From: "Stopping", Event: "owe_cleanup", State: "CleanupOwed"})
		},
		"no exit":  func(r []journal.Record) []journal.Record { return append(r, journal.Record{Kind: journal.Exited}) },
		"no claim": func(r []journal.Record) []journal.Record { return append(r, journal.Record{Kind: journal.Claimed}) },
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

// Nobody will ever ask for one that containerd's service doesn't know.
func TestRestartRemovesWhatItCantReadAndNobodyKnows(t *testing.T) {
	old := newWorld(t)
	require.NoError(t, old.run(t))
	old.book.records[3].Step = ""
	w := old.restart(t, nobodys)
	require.Equal(t, states.Quarantined, w.state(t))
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Empty(t, w.left())
}

// A damaged ledger may bring back a sandbox that had gone, of a pod that has another one now.
func TestRestoreTakesTwoOfOneName(t *testing.T) {
	w := newWorld(t)
	var saved []journal.Sandbox
	for _, id := range []string{"gone", "lives"} {
		spec, err := journal.Marshal(&testSpec{"pod"})
		require.NoError(t, err)
		key := journal.Key{Namespace: "k8s.io", ID: id}
		saved = append(saved, journal.Sandbox{Key: key, Records: []journal.Record{{Key: key, Kind: journal.Begun, Data: spec}}})
	}
	w.Restore(t.Context(), saved, func(journal.Key, any) Request {
		return Request{Name: "ns/pod", Pod: "ns/pod", Spec: &testSpec{"pod"}}
	}, outsideOf(kept))
	require.Len(t, w.List(), 2)
	require.NoError(t, w.Remove(t.Context(), saved[0].Key))
	err := w.Create(t.Context(), testKey, Request{Name: "ns/pod", Spec: &testSpec{"pod"}})
	require.ErrorContains(t, err, `reserved for sandbox "lives"`)
}
