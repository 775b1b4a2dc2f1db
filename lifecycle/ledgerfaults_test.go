package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// failure is a way in which a write to the ledger fails.
type failure struct {
	name    string
	written bool // the record is there, though the write has failed
	lasting bool // all writes after it fail, too
	panics  bool
}

var failures = []failure{
	{name: "fails"},
	{name: "fails, but is written", written: true},
	{name: "fails, as all later writes do", lasting: true},
	{name: "all fail, but are written", written: true, lasting: true},
	{name: "panics", panics: true},
	{name: "is written, and panics", written: true, panics: true},
	{name: "all panic", lasting: true, panics: true},
}

// faultyLedger fails the write numbered at, from 1.
type faultyLedger struct {
	*ledger.Ledger
	failure
	at int

	mu    sync.Mutex
	count int
}

func (l *faultyLedger) write(do func() error) error {
	l.mu.Lock()
	l.count++
	fails := l.count == l.at || l.lasting && l.count > l.at
	l.mu.Unlock()
	if !fails {
		return do()
	}
	if l.written {
		if err := do(); err != nil {
			return err
		}
	}
	if l.panics {
		panic("a bug")
	}
	return fmt.Errorf("disk full: %w", errdefs.ErrResourceExhausted)
}

func (l *faultyLedger) Append(ctx context.Context, r *ledger.Record) error {
	return l.write(func() error { return l.Ledger.Append(ctx, r) })
}

func (l *faultyLedger) Forget(ctx context.Context, k ledger.Key) error {
	return l.write(func() error { return l.Ledger.Forget(ctx, k) })
}

// Each write of a sandbox's life fails once, in each way. Then containerd is killed and starts
// again.
func TestEachWriteFails(t *testing.T) {
	for name, act := range map[string]func(t *testing.T, w *world) (ready bool){
		"create, stop, remove": func(t *testing.T, w *world) bool {
			ready := create(t, w) == nil
			// The kubelet would retry, but here the restart comes first.
			_ = w.Stop(t.Context(), testKey)
			_ = w.Remove(t.Context(), testKey)
			return ready
		},
		"a step on demand": func(t *testing.T, w *world) bool {
			if create(t, w) != nil {
				return false
			}
			for range 2 {
				_ = w.Demand(t.Context(), testKey, startShim)
			}
			return true
		},
		"a step on demand that fails": func(t *testing.T, w *world) bool {
			if create(t, w) != nil {
				return false
			}
			w.do[startShim] = func(context.Context) error { return errors.New("no shim") }
			w.undo[startShim] = func() error { return errors.New("no luck") }
			for range 2 {
				require.Error(t, w.Demand(t.Context(), testKey, startShim))
			}
			return true
		},
		"a creation that is rolled back": func(t *testing.T, w *world) bool {
			w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
			require.Error(t, create(t, w))
			return false
		},
		"an undo that is pending": func(t *testing.T, w *world) bool {
			w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
			w.undo[attachNetwork] = func() error { return errors.New("no luck") }
			require.Error(t, create(t, w))
			return false
		},
	} {
		for _, how := range failures {
			t.Run(name+"/"+how.name, func(t *testing.T) {
				for at := 1; failsAt(t, how, at, act); at++ {
				}
			})
		}
	}
}

func create(t *testing.T, w *world) error {
	if err := w.Create(t.Context(), testKey, Request{Pod: "ns/pod", Spec: &testSpec{"pod"}}); err != nil {
		return err
	}
	return w.Start(t.Context(), testKey)
}

// failsAt runs act with a failing write, kills containerd and restarts it. It returns false if act
// has fewer writes.
func failsAt(t *testing.T, how failure, at int, act func(t *testing.T, w *world) (ready bool)) bool {
	t.Helper()
	root, state := t.TempDir(), t.TempDir()
	open := func() *ledger.Ledger {
		log, err := ledger.Open(root, state)
		require.NoError(t, err)
		require.Empty(t, log.Damage())
		return log
	}

	log := &faultyLedger{Ledger: open(), failure: how, at: at}
	w := newWorldOn(t, log, newNode())
	ready := act(t, w)
	w.Close(context.Background())
	require.NoError(t, log.Close())
	if log.count < at {
		return false
	}

	again := open()
	defer func() { require.NoError(t, again.Close()) }()
	requireTrue(t, again.Sandboxes(), w, at)
	next := newWorldOn(t, again, w.node)
	next.do, next.undo = nil, nil
	known := kept
	if !ready {
		known = unlisted // containerd's service has forgotten the sandbox that it couldn't start
	}
	next.Restore(t.Context(), again.Sandboxes(), func(_ ledger.Key, spec any) Request {
		return Request{Pod: "ns/pod", Spec: spec}
	}, outsideOf(known))
	if len(again.Sandboxes()) > 0 {
		require.NoError(t, next.Resume(t.Context(), testKey))
		if view, err := next.Get(testKey); err == nil && view.State == states.Ready {
			require.Subset(t, next.left(), creationPath(), "write %d: it is ready, and something of it is missing", at)
		}
	}
	if ready {
		require.NoError(t, ignoreGone(next.Stop(t.Context(), testKey)))
		require.NoError(t, next.Remove(t.Context(), testKey))
	}
	require.Eventually(t, next.gone, 10*time.Second, time.Millisecond, "write %d", at)
	require.Empty(t, next.left(), "write %d", at)
	require.Empty(t, again.Sandboxes(), "write %d", at)
	next.Close(context.Background())
	return true
}

// A sandbox that was not accepted leaves nothing in the ledger, whether or not its first record was
// written. Each retry of the caller has another id, so leftovers would pile up.
func TestCreateThatFailsLeavesNoRecord(t *testing.T) {
	for _, how := range failures {
		if how.lasting {
			continue // a ledger that takes nothing forgets nothing
		}
		t.Run(how.name, func(t *testing.T) {
			log, err := ledger.Open(t.TempDir(), t.TempDir())
			require.NoError(t, err)
			defer func() { require.NoError(t, log.Close()) }()
			w := newWorldOn(t, &faultyLedger{Ledger: log, failure: how, at: 1}, newNode())
			require.Error(t, w.Create(t.Context(), testKey, Request{Name: "pod", Spec: &testSpec{}}))
			require.Empty(t, log.Sandboxes())
			require.Empty(t, w.List())
			require.NoError(t, w.Create(t.Context(), ledger.Key{Namespace: "k8s.io", ID: "s2"}, Request{Name: "pod", Spec: &testSpec{}}))
		})
	}
}

// noting is a step whose undo notes what it has done, and depends on these notes.
type noting struct{ fakeStep }

func (s *noting) Undo(ctx context.Context, r *Run) error {
	if err := s.fakeStep.Undo(ctx, r); err != nil {
		return err
	}
	return r.Note(ctx, &testResult{s.declared.Name})
}

func (s *noting) Probe(_ context.Context, r *Run) (bool, error) { return len(r.Notes()) == 0, nil }

// A full disk doesn't prevent an undo. A note of the undo that can't be recorded still counts, also
// for Probe.
func TestUndoThatCantBeNoted(t *testing.T) {
	for name, past := range map[string]func(t *testing.T, w *world) *world{
		"the same daemon": func(_ *testing.T, w *world) *world { return w },
		"the next daemon": func(t *testing.T, w *world) *world { return w.restart(t, kept) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			require.NoError(t, w.run(t))
			w = past(t, w)
			for i, step := range w.Engine.steps {
				if declared := step.Declaration(); declared.Name == attachNetwork {
					w.Engine.steps[i] = &noting{fakeStep{declared, w.node}}
				}
			}
			w.book.mu.Lock()
			w.book.refuse = func(*ledger.Record) error { return errors.New("disk full") }
			w.book.mu.Unlock()
			require.NoError(t, w.Stop(t.Context(), testKey))
			require.Equal(t, states.Stopped, w.state(t))
			require.NoError(t, w.Remove(t.Context(), testKey))
			require.Empty(t, w.left())
		})
	}
}

// requireTrue compares the ledger with the node. Each existing resource is on record, and not as
// undone. Each step on record as done was done. A step that was undone may still be on record as
// done: it is then undone once more.
func requireTrue(t *testing.T, saved []ledger.Sandbox, w *world, at int) {
	t.Helper()
	newest := map[states.Event]ledger.Kind{}
	for _, s := range saved {
		for _, r := range s.Records {
			if r.Step != "" {
				newest[states.Event(r.Step)] = r.Kind
			}
		}
	}
	for _, step := range w.left() {
		require.Contains(t, newest, step, "write %d: it exists, and isn't on record", at)
		require.NotEqual(t, ledger.Undone, newest[step], "write %d: %s is on record as undone, and exists", at, step)
	}
	for step, kind := range newest {
		if kind == ledger.Done {
			require.Contains(t, w.acted(), "do "+string(step), "write %d: it is on record as done, and was never made", at)
		}
	}
}
