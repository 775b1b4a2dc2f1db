package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

func TestMain(m *testing.M) {
	// The tests' ledgers sync thousands of times, which is free in memory.
	if err := os.Setenv("TMPDIR", "/dev/shm"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

type testSpec struct{ Name string }

type testResult struct{ Step states.Event }

func init() {
	typeurl.Register(&testSpec{}, "podfsm.test", "testSpec")
	typeurl.Register(&testResult{}, "podfsm.test", "testResult")
}

// book is a ledger in memory that refuses records on request.
type book struct {
	mu      sync.Mutex
	lines   []string
	records []ledger.Record // of the test's sandbox, until it is forgotten
	all     []ledger.Record
	refuse  func(r *ledger.Record) error
	forgets func() error
}

func (b *book) Append(_ context.Context, r *ledger.Record) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refuse != nil {
		if err := b.refuse(r); err != nil {
			return err
		}
	}
	line, event := string(r.Kind), ""
	if r.Kind == ledger.Moved {
		event = r.Event
	}
	for _, part := range []string{r.Step, event, r.Goal} {
		if part != "" {
			line += " " + part
		}
	}
	b.lines = append(b.lines, line)
	b.records, b.all = append(b.records, *r), append(b.all, *r)
	return nil
}

func (b *book) Forget(context.Context, ledger.Key) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.forgets != nil {
		if err := b.forgets(); err != nil {
			return err
		}
	}
	b.lines = append(b.lines, "forgotten")
	b.records = nil
	return nil
}

// saved returns the sandboxes as a ledger gives them to a daemon at its start.
func (b *book) saved() []ledger.Sandbox {
	b.mu.Lock()
	defer b.mu.Unlock()
	return []ledger.Sandbox{{Key: testKey, Records: slices.Clone(b.records)}}
}

// of returns the records of one sandbox.
func (b *book) of(key ledger.Key) []ledger.Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(b.records), func(r ledger.Record) bool { return r.Key != key })
}

func (b *book) read() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

// node is what the steps of a test act on.
type node struct {
	mu      sync.Mutex
	exists  []states.Event // what has been made and not undone, in the order of making
	acts    []string
	exited  *Exit
	unknown error        // of Exited, which can't determine whether the process runs
	still   states.Event // what is there though it was undone
	do      map[states.Event]func(ctx context.Context) error
	undo    map[states.Event]func() error
	plans   map[states.Event]any // set before anything runs
	stop    error
	hidden  func(states.Event) error // why the host doesn't show what a step made; nil for nothing
}

func newNode() *node {
	return &node{do: map[states.Event]func(context.Context) error{}, undo: map[states.Event]func() error{}}
}

func (n *node) act(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.acts = append(n.acts, fmt.Sprintf(format, args...))
}

func (n *node) acted() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.acts)
}

func (n *node) left() []states.Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.exists)
}

type fakeStep struct {
	declared Declaration
	node     *node
}

func (s *fakeStep) Declaration() Declaration { return s.declared }

func (s *fakeStep) Reserve(context.Context, *Run) (any, error) {
	return s.node.plans[s.declared.Name], nil
}

// Do makes the resource before it fails: a failed step may have acted.
func (s *fakeStep) Do(ctx context.Context, _ *Run) (any, error) {
	s.node.mu.Lock()
	if !slices.Contains(s.node.exists, s.declared.Name) {
		s.node.exists = append(s.node.exists, s.declared.Name)
	}
	hook := s.node.do[s.declared.Name]
	s.node.mu.Unlock()
	s.node.act("do %s", s.declared.Name)
	if hook != nil {
		if err := hook(ctx); err != nil {
			return nil, err
		}
	}
	return &testResult{s.declared.Name}, nil
}

func (s *fakeStep) Undo(context.Context, *Run) error {
	s.node.mu.Lock()
	hook := s.node.undo[s.declared.Name]
	s.node.mu.Unlock()
	s.node.act("undo %s", s.declared.Name)
	if hook != nil {
		if err := hook(); err != nil {
			return err
		}
	}
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	s.node.exists = slices.DeleteFunc(s.node.exists, func(e states.Event) bool { return e == s.declared.Name })
	return nil
}

// Find finds the resource if it exists.
func (s *fakeStep) Find(context.Context, *Run) (any, error) {
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	if s.node.hidden != nil {
		if err := s.node.hidden(s.declared.Name); err != nil {
			return nil, err
		}
	}
	if !slices.Contains(s.node.exists, s.declared.Name) {
		return nil, errdefs.ErrNotFound
	}
	return &testResult{s.declared.Name}, nil
}

func (s *fakeStep) Probe(context.Context, *Run) (bool, error) {
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	return s.node.still == s.declared.Name, nil
}

type fakeEnder struct{ fakeStep }

func (s *fakeEnder) End(context.Context, *Run) (Exit, error) {
	s.node.act("stop %s", s.declared.Name)
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	if s.node.stop != nil {
		return Exit{}, s.node.stop
	}
	s.node.exited = &Exit{Code: 137, At: time.Now()}
	return *s.node.exited, nil
}

func (s *fakeEnder) Exited(context.Context, *Run) (*Exit, error) {
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	return s.node.exited, s.node.unknown
}

var testKey = ledger.Key{Namespace: "k8s.io", ID: "s1"}

// world is an engine with a test's node and ledger.
type world struct {
	*Engine
	*node
	book *book

	toldMu sync.Mutex
	told   []View // by the engine, as to an observer
	meter  testMeter
}

func (w *world) tell(v View) {
	w.toldMu.Lock()
	defer w.toldMu.Unlock()
	w.told = append(w.told, v)
}

// Find returns the sandbox as it is now, or its last view that was observed.
func (w *world) Find(key ledger.Key) (View, bool) {
	if view, err := w.Get(key); err == nil {
		return view, true
	}
	w.toldMu.Lock()
	defer w.toldMu.Unlock()
	for _, view := range slices.Backward(w.told) {
		if view.Key == key {
			return view, true
		}
	}
	return View{}, false
}

// history returns the observed transitions.
func (w *world) history() (told []Transition) {
	w.toldMu.Lock()
	defer w.toldMu.Unlock()
	for _, v := range w.told {
		told = append(told, v.Transitions[len(v.Transitions)-1])
	}
	return told
}

func newWorld(t *testing.T, change ...func(*Declaration)) *world {
	b := &book{}
	w := newWorldOn(t, b, newNode(), change...)
	w.book = b
	return w
}

// newWorldOn makes an engine with an existing ledger and node.
func newWorldOn(t testing.TB, ledger Ledger, n *node, change ...func(*Declaration)) *world {
	declared := testSteps()
	for i := range declared {
		for _, c := range change {
			c(&declared[i])
		}
	}
	return newRelease(t, "v1", declared, ledger, n)
}

// newRelease makes an engine of a release with its own steps.
func newRelease(t testing.TB, release string, declared []Declaration, ledger Ledger, n *node) *world {
	w := &world{node: n}
	var steps []Step
	for _, d := range declared {
		if d.Name == startPause {
			steps = append(steps, &fakeEnder{fakeStep{d, w.node}})
		} else {
			steps = append(steps, &fakeStep{d, w.node})
		}
	}
	engine, err := New(Config{
		Steps: steps, Process: startPause, Ledger: ledger, Backoff: func(int) time.Duration { return time.Millisecond },
		Release: release, Observe: w.tell, Meter: &w.meter,
	})
	require.NoError(t, err)
	w.Engine = engine
	t.Cleanup(func() { engine.Close(context.Background()) })
	return w
}

func (w *world) create(t *testing.T) {
	require.NoError(t, w.Create(t.Context(), testKey, Request{Pod: "ns/pod", Spec: &testSpec{"pod"}}))
}

func (w *world) run(t *testing.T) error {
	w.create(t)
	return w.Start(t.Context(), testKey)
}

func (w *world) state(t *testing.T) states.State {
	view, ok := w.Find(testKey)
	require.True(t, ok)
	return view.State
}

// transitions returns the states of the sandbox, in order.
func (w *world) transitions(t *testing.T) []states.State {
	view, ok := w.Find(testKey)
	require.True(t, ok)
	return destinations(view.Transitions)
}

func (w *world) gone() bool {
	_, err := w.Get(testKey)
	return errdefs.IsNotFound(err)
}

func TestSandboxGoesThroughAllStates(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.Equal(t, states.Ready, w.state(t))
	require.Equal(t, []ledger.Key{testKey}, w.Keys())
	require.NoError(t, w.Halt(t.Context(), testKey))
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NoError(t, w.Stop(t.Context(), testKey), "stop is idempotent")
	require.Equal(t, states.Stopped, w.state(t))
	require.Equal(t, []states.Event{allocateIDs, remapSnapshot, startPause, declareReady}, w.left())
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.NoError(t, w.Remove(t.Context(), testKey), "remove is idempotent")

	require.True(t, w.gone())
	require.Empty(t, w.Keys())
	require.Empty(t, w.left())
	require.Equal(t, []states.State{
		idsAllocated, snapshotRemapped, pauseStarted, netNSCaptured, networkReady, states.Ready,
		states.Stopping, states.Stopped, states.Removing, states.Removed,
	}, w.transitions(t))
	require.Equal(t, []string{
		"begun",
		"intent allocate_ids", "done allocate_ids",
		"intent remap_snapshot", "done remap_snapshot",
		"intent start_pause", "done start_pause",
		"intent capture_netns", "done capture_netns",
		"intent attach_network", "done attach_network",
		"intent declare_ready", "done declare_ready",
		"moved stop", "exited",
		"undo-intent attach_network", "undone attach_network",
		"undo-intent capture_netns", "undone capture_netns",
		"moved finish_stop Stopped",
		"moved remove",
		"undo-intent declare_ready", "undone declare_ready",
		"undo-intent start_pause", "undone start_pause",
		"undo-intent remap_snapshot", "undone remap_snapshot",
		"undo-intent allocate_ids", "undone allocate_ids",
		"forgotten",
	}, w.book.read())
}

func TestFailureOfEachStepUndoesItAndAllBefore(t *testing.T) {
	path := creationPath()
	for i, failing := range path {
		t.Run(string(failing), func(t *testing.T) {
			w := newWorld(t)
			w.do[failing] = func(context.Context) error { return fmt.Errorf("no luck: %w", errdefs.ErrUnavailable) }
			err := w.run(t)

			var stepErr *StepError
			require.ErrorAs(t, err, &stepErr)
			require.Equal(t, failing, stepErr.Step)
			require.True(t, errdefs.IsUnavailable(err))
			require.Equal(t, fmt.Sprintf(`step %s of pod "ns/pod" failed: no luck: unavailable`, failing), err.Error())
			require.True(t, w.gone())
			require.Empty(t, w.left())
			require.Equal(t, states.RolledBack, w.state(t))

			var want []string
			for _, name := range path[:i+1] {
				want = append(want, "do "+string(name))
			}
			for _, name := range slices.Backward(path[:i+1]) {
				want = append(want, "undo "+string(name))
			}
			require.Equal(t, want, w.acted())
		})
	}
}

func TestRetryOfEachUndo(t *testing.T) {
	for _, failing := range creationPath() {
		t.Run(string(failing), func(t *testing.T) {
			w := newWorld(t)
			release := make(chan struct{})
			first := true
			w.undo[failing] = func() error {
				if first {
					first = false
					return errors.New("no luck")
				}
				<-release
				return nil
			}
			w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
			err := w.run(t)
			require.ErrorContains(t, err, "step declare_ready")
			require.ErrorContains(t, err, "undo of step "+string(failing))
			require.Contains(t, w.book.read(), "owed RolledBack")
			close(release)
			require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
			require.Empty(t, w.left())
			require.Equal(t, states.RolledBack, w.state(t))
		})
	}
}

func TestFailedUndoHoldsWhatItUses(t *testing.T) {
	w := newWorld(t)
	failed := errors.New("the process won't die")
	w.undo[startPause] = func() error { return failed }
	w.do[attachNetwork] = func(context.Context) error { return errors.New("no network") }
	err := w.run(t)
	require.ErrorIs(t, err, failed)
	require.Equal(t, []states.Event{allocateIDs, remapSnapshot, startPause}, w.left(),
		"what a process may use must stay; the network and its namespace go all the same")

	view, err := w.Get(testKey)
	require.NoError(t, err)
	require.Equal(t, states.RolledBack, view.Goal)
	require.Equal(t, StepCleanupPending, view.Step(allocateIDs).Status)
	require.EqualError(t, view.Step(allocateIDs).Err, "waits for the undo of start_pause")
	require.False(t, view.Step(allocateIDs).PendingSince.IsZero())
	require.ErrorIs(t, view.Step(startPause).Err, failed)
	require.Equal(t, StepUndone, view.Step(attachNetwork).Status)
	require.Error(t, w.Remove(t.Context(), testKey), "a sandbox with a pending cleanup stays")
	w.node.mu.Lock()
	delete(w.undo, startPause)
	w.node.mu.Unlock()
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
}

func TestFailedStopIsPendingUntilRetried(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	tries, release := 0, make(chan struct{})
	w.undo[attachNetwork] = func() error {
		if tries++; tries == 1 {
			return errors.New("no luck")
		}
		<-release
		return nil
	}
	require.ErrorContains(t, w.Stop(t.Context(), testKey), "attach_network")
	close(release)
	require.Eventually(t, func() bool { return w.state(t) == states.Stopped }, 10*time.Second, time.Millisecond)
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
}

// Whatever part of a removal fails, the pending cleanup is a removal, also if the stop of a ready
// sandbox fails.
func TestFailedRemovalStaysARemoval(t *testing.T) {
	for name, fail := range map[string]func(w *world, luck error){
		"pause can't be ended":         func(w *world, luck error) { w.stop = luck },
		"what a stop undoes":           func(w *world, luck error) { w.undo[attachNetwork] = func() error { return luck } },
		"what only a removal undoes":   func(w *world, luck error) { w.undo[remapSnapshot] = func() error { return luck } },
		"the undo of a step on demand": func(w *world, luck error) { w.undo[startShim] = func() error { return luck } },
	} {
		for restart, resume := range map[string]func(t *testing.T, w *world) *world{
			"the same daemon": func(_ *testing.T, w *world) *world { return w },
			"the next daemon": func(t *testing.T, w *world) *world {
				next := w.restart(t, kept)
				require.NoError(t, next.Resume(t.Context(), testKey))
				return next
			},
		} {
			t.Run(name+", then "+restart, func(t *testing.T) {
				w := newWorld(t)
				require.NoError(t, w.run(t))
				require.NoError(t, w.demand(t))
				w.backoff = func(int) time.Duration { return 50 * time.Millisecond }
				luck := errors.New("no luck")
				fail(w, luck)
				require.ErrorIs(t, w.Remove(t.Context(), testKey), luck)
				view, err := w.Get(testKey)
				require.NoError(t, err)
				require.Equal(t, states.Removed, view.Goal)
				for _, step := range view.Steps {
					require.Contains(t, []StepStatus{StepCleanupPending, StepUndone}, step.Status, "the undo of %s is neither done nor pending", step.Name)
				}
				w.mend()

				w = resume(t, w)
				require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
				require.Empty(t, w.left())
			})
		}
	}
}

// A failed undo never has the class NotFound, because containerd's service takes that for a sandbox
// that is gone. It keeps every other class.
func TestUndoThatDoesntFindSomething(t *testing.T) {
	missing := fmt.Errorf("no such device: %w", errdefs.ErrNotFound)
	busy := fmt.Errorf("busy: %w", errdefs.ErrUnavailable)
	for name, luck := range map[string]error{"alone": missing, "beside another error": errors.Join(missing, busy)} {
		for ending, end := range map[string]func(w *world) error{
			"a halt": func(w *world) error {
				w.stop = luck
				return w.Halt(t.Context(), testKey)
			},
			"a stop": func(w *world) error {
				w.undo[attachNetwork] = func() error { return luck }
				return w.Stop(t.Context(), testKey)
			},
			"a removal": func(w *world) error {
				w.undo[remapSnapshot] = func() error { return luck }
				return w.Remove(t.Context(), testKey)
			},
		} {
			t.Run(ending+", "+name, func(t *testing.T) {
				w := newWorld(t)
				w.engineWaits()
				require.NoError(t, w.run(t))
				err := end(w)
				require.ErrorContains(t, err, "no such device")
				require.False(t, errdefs.IsNotFound(err))
				require.NotEqual(t, errdefs.ErrNotFound, errdefs.Resolve(err))
				require.Equal(t, errors.Is(luck, busy), errdefs.IsUnavailable(err))
				require.Equal(t, states.CleanupOwed, w.state(t))
			})
		}
	}
}

// A failed removal frees the name of the sandbox: the pod's next sandbox of the same attempt can be
// created, also after a restart.
func TestNameOfARemovalThatFailsIsFree(t *testing.T) {
	w := newWorld(t)
	req := Request{Name: "pod", Pod: "ns/pod", Spec: &testSpec{"pod"}}
	require.NoError(t, w.Create(t.Context(), testKey, req))
	require.NoError(t, w.Start(t.Context(), testKey))
	w.backoff = func(int) time.Duration { return time.Hour }
	w.undo[attachNetwork] = func() error { return errors.New("no luck") }
	require.Error(t, w.Remove(t.Context(), testKey))
	next := ledger.Key{Namespace: "k8s.io", ID: "s2"}
	require.NoError(t, w.Create(t.Context(), next, req))

	again := newWorld(t)
	again.Restore(t.Context(), []ledger.Sandbox{{Key: testKey, Records: w.book.of(testKey)}}, func(_ ledger.Key, spec any) Request {
		return Request{Name: "pod", Pod: "ns/pod", Spec: spec}
	}, outsideOf(kept))
	require.Equal(t, states.CleanupOwed, again.state(t))
	require.NoError(t, again.Create(t.Context(), next, req))
}

// A kill while a removal stops the sandbox leaves a removal.
func TestRestartWhileARemovalStops(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	var saved []ledger.Sandbox
	w.undo[attachNetwork] = func() error {
		saved = w.book.saved()
		return nil
	}
	require.NoError(t, w.Remove(t.Context(), testKey))
	w.book.records, w.node.exists = saved[0].Records, creationPath()
	w = w.restart(t, kept)
	require.Equal(t, states.Stopping, w.state(t))
	require.NoError(t, w.Resume(t.Context(), testKey))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Empty(t, w.left())
}

func TestRecordThatFails(t *testing.T) {
	full := fmt.Errorf("disk full: %w", errdefs.ErrResourceExhausted)
	for _, tc := range []struct {
		record string
		acted  bool
	}{
		{"intent", false}, {"done", true},
	} {
		t.Run(tc.record, func(t *testing.T) {
			w := newWorld(t)
			w.book.refuse = func(r *ledger.Record) error {
				if string(r.Kind) == tc.record && r.Step == string(startPause) {
					return full
				}
				return nil
			}
			err := w.run(t)
			require.True(t, errdefs.IsResourceExhausted(err))
			require.ErrorContains(t, err, "step start_pause")
			require.Equal(t, tc.acted, slices.Contains(w.acted(), "do start_pause"))
			require.Equal(t, tc.acted, slices.Contains(w.acted(), "undo start_pause"), "a step without an intent isn't undone")
			require.True(t, w.gone())
			require.Empty(t, w.left())
		})
	}
	t.Run("intent with a plan", func(t *testing.T) {
		w := newWorld(t)
		w.plans = map[states.Event]any{allocateIDs: &testResult{allocateIDs}}
		w.book.refuse = func(r *ledger.Record) error {
			if r.Kind == ledger.Intent {
				return full
			}
			return nil
		}
		require.ErrorIs(t, w.run(t), full)
		require.Equal(t, []string{"undo allocate_ids"}, w.acted(), "the undo releases what the plan reserved")
		require.True(t, w.gone())
	})
	t.Run("begun", func(t *testing.T) {
		w := newWorld(t)
		w.book.refuse = func(*ledger.Record) error { return full }
		require.ErrorIs(t, w.Create(t.Context(), testKey, Request{Spec: &testSpec{}}), full)
		require.True(t, w.gone())
	})
	t.Run("forget", func(t *testing.T) {
		w := newWorld(t)
		tries := 0
		w.book.forgets = func() error {
			if tries++; tries < 3 {
				return full
			}
			return nil
		}
		require.NoError(t, w.run(t))
		require.ErrorIs(t, w.Remove(t.Context(), testKey), full)
		require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	})
}

func TestPauseExit(t *testing.T) {
	t.Run("when ready", func(t *testing.T) {
		w := newWorld(t)
		require.NoError(t, w.run(t))
		waited := make(chan Exit, 1)
		go func() {
			exit, err := w.Wait(context.Background(), testKey)
			if err == nil {
				waited <- exit
			}
			close(waited)
		}()
		w.PauseExited(testKey, Exit{Code: 9})
		w.PauseExited(testKey, Exit{Code: 10})
		require.Equal(t, uint32(9), (<-waited).Code)
		require.Equal(t, states.NotReady, w.state(t))
		require.NoError(t, w.Remove(t.Context(), testKey))
		require.Empty(t, w.left())
	})
	t.Run("before ready", func(t *testing.T) {
		w := newWorld(t)
		started := make(chan struct{})
		w.do[attachNetwork] = func(ctx context.Context) error {
			close(started)
			<-ctx.Done()
			return ctx.Err()
		}
		w.create(t)
		result := make(chan error, 1)
		go func() { result <- w.Start(context.Background(), testKey) }()
		<-started
		w.PauseExited(testKey, Exit{Code: 1})
		err := <-result
		require.ErrorContains(t, err, "pause exited with code 1")
		require.True(t, w.gone())
		require.Empty(t, w.left())
	})
	t.Run("after the rollback", func(t *testing.T) {
		// The exit of a pause that the rollback killed is reported once the sandbox is gone.
		w := newWorld(t)
		w.undo[allocateIDs] = func() error {
			w.PauseExited(testKey, Exit{Code: 137})
			return nil
		}
		w.do[declareReady] = func(context.Context) error { return errors.New("no luck") }
		require.Error(t, w.run(t))
		w.Close(context.Background())
		require.NotContains(t, w.book.read(), "exited")
	})
	t.Run("unknown sandbox", func(t *testing.T) {
		newWorld(t).PauseExited(testKey, Exit{})
	})
}

func TestCallerThatGoesFailsTheRunningStep(t *testing.T) {
	w := newWorld(t)
	w.create(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.do[startPause] = func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}
	err := w.Start(ctx, testKey)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorContains(t, err, "step start_pause")
	require.Empty(t, w.left())
}

func TestStepDeadline(t *testing.T) {
	w := newWorld(t, func(f *Declaration) { f.Deadline = time.Millisecond })
	w.do[remapSnapshot] = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	require.ErrorIs(t, w.run(t), context.DeadlineExceeded)
	require.Empty(t, w.left())
}

// A step's error may have lost the class of its deadline, as errors from a shim do, or have it
// already.
func TestStepDeadlineIsNamed(t *testing.T) {
	for name, tc := range map[string]struct {
		fails func(context.Context) error
		want  string
	}{
		"of another class": {
			func(context.Context) error { return fmt.Errorf("failed to create the task: %w", errdefs.ErrUnknown) },
			`step start_pause of pod "ns/pod" failed: no answer within 1ms: context deadline exceeded: failed to create the task: unknown`,
		},
		"said already": {
			func(ctx context.Context) error { return fmt.Errorf("killed: %w", context.Cause(ctx)) },
			`step start_pause of pod "ns/pod" failed: killed: no answer within 1ms: context deadline exceeded`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(f *Declaration) {
				if f.Name == startPause {
					f.Deadline = time.Millisecond
				}
			})
			w.do[startPause] = func(ctx context.Context) error { <-ctx.Done(); return tc.fails(ctx) }
			err := w.run(t)
			require.EqualError(t, err, tc.want)
			require.Equal(t, context.DeadlineExceeded, errdefs.Resolve(err))
			require.Empty(t, w.left())
		})
	}
}

func TestStepThatPanics(t *testing.T) {
	w := newWorld(t)
	w.do[startPause] = func(context.Context) error { panic("a bug") }
	w.undo[remapSnapshot] = func() error {
		delete(w.undo, remapSnapshot)
		panic("another")
	}
	require.True(t, errdefs.IsInternal(w.run(t)))
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
	require.Empty(t, w.left())
}

// A step that hangs is the sandbox's current step.
func TestStepThatHangsIsBlamed(t *testing.T) {
	w := newWorld(t, func(f *Declaration) {
		if f.Name == captureNetNS {
			f.Deadline = 100 * time.Millisecond
		}
	})
	w.do[captureNetNS] = func(ctx context.Context) error {
		view, err := w.Get(testKey)
		require.NoError(t, err)
		current, _ := view.Current()
		require.Equal(t, captureNetNS, current.Name)
		require.Equal(t, pauseStarted, view.State, "the state waits for the step")
		<-ctx.Done()
		return context.Cause(ctx)
	}
	require.EqualError(t, w.run(t), `step capture_netns of pod "ns/pod" failed: no answer within 100ms: context deadline exceeded`)
	require.Empty(t, w.left())
}

// The end of a creation cancels the running step. That doesn't count as a failure of the step. The
// step moves no state any more even if it succeeds: a sandbox that is about to be rolled back never
// becomes ready.
func TestCreationEndsWhileAStepRuns(t *testing.T) {
	path := creationPath()
	for name, tc := range map[string]struct {
		end  func(w *world) error // of the creation
		want string
	}{
		"a halt":            {func(w *world) error { return w.Halt(context.Background(), testKey) }, errEnded.Error()},
		"a stop":            {func(w *world) error { return w.Stop(context.Background(), testKey) }, errEnded.Error()},
		"a removal":         {func(w *world) error { return w.Remove(context.Background(), testKey) }, errEnded.Error()},
		"the exit of pause": {func(w *world) error { w.PauseExited(testKey, Exit{Code: 1}); return nil }, "pause exited with code 1: unavailable"},
	} {
		for outcome, result := range map[Outcome]func(context.Context) error{
			OutcomeCanceled: context.Cause,
			OutcomeOK:       func(context.Context) error { return nil },
		} {
			for _, during := range []states.Event{attachNetwork, declareReady} {
				t.Run(fmt.Sprintf("%s, %s %s", name, during, outcome), func(t *testing.T) {
					w := newWorld(t)
					running := make(chan struct{})
					w.do[during] = func(ctx context.Context) error {
						close(running)
						<-ctx.Done()
						return result(ctx)
					}
					var replayed, live []Transition
					w.undo[allocateIDs] = func() error {
						replayed, live = w.replayed(t).Transitions, w.view(t).Transitions
						return nil
					}
					req := Request{Name: "pod", Pod: "ns/pod", Spec: &testSpec{"pod"}}
					require.NoError(t, w.Create(t.Context(), testKey, req))
					started := make(chan error, 1)
					go func() { started <- w.Start(context.Background(), testKey) }()
					<-running
					require.NoError(t, tc.end(w))
					require.EqualError(t, <-started, tc.want)
					require.True(t, w.gone())
					require.Empty(t, w.left())
					require.Equal(t, "undo "+string(during), w.acted()[slices.Index(w.acted(), "do "+string(during))+1])
					require.Contains(t, w.meter.acted(), fmt.Sprintf("do %s: %s", during, outcome))
					require.NoError(t, w.Create(t.Context(), testKey, req), "a retry can create the sandbox")

					var passed []states.State
					for _, step := range path[:slices.Index(path, during)] {
						next, _ := testTable.Next(append([]states.State{states.New}, passed...)[len(passed)], step)
						passed = append(passed, next)
					}
					require.Equal(t, append(passed, states.RollingBack), destinations(live))
					require.Equal(t, destinations(live), destinations(replayed), "the ledger says the same")
				})
			}
		}
	}
}

// destinations returns the states to which transitions led.
func destinations(transitions []Transition) (passed []states.State) {
	for _, t := range transitions {
		passed = append(passed, t.To)
	}
	return passed
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	require.True(t, errdefs.IsNotFound(w.Start(t.Context(), testKey)))
	require.True(t, errdefs.IsNotFound(w.Stop(t.Context(), testKey)))
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.NoError(t, w.run(t))
	require.True(t, errdefs.IsAlreadyExists(w.Create(t.Context(), testKey, Request{Spec: &testSpec{}})))
	require.True(t, errdefs.IsFailedPrecondition(w.Start(t.Context(), testKey)))

	require.NoError(t, w.Create(t.Context(), ledger.Key{ID: "a"}, Request{Name: "pod", Spec: &testSpec{}}))
	require.True(t, errdefs.IsAlreadyExists(w.Create(t.Context(), ledger.Key{ID: "b"}, Request{Name: "pod", Spec: &testSpec{}})))
	require.NoError(t, w.Remove(t.Context(), ledger.Key{ID: "a"}))
	require.NoError(t, w.Create(t.Context(), ledger.Key{ID: "b"}, Request{Name: "pod", Spec: &testSpec{}}))
	w.Close(context.Background())
	require.True(t, errdefs.IsUnavailable(w.Stop(t.Context(), testKey)))
	require.True(t, errdefs.IsUnavailable(w.Create(t.Context(), ledger.Key{ID: "s2"}, Request{Spec: &testSpec{}})))
}

func TestNewRefusesStepsThatDontFit(t *testing.T) {
	good := func() []Step {
		var steps []Step
		for _, d := range testSteps() {
			if d.Name == startPause {
				steps = append(steps, &fakeEnder{fakeStep{d, newNode()}})
			} else {
				steps = append(steps, &fakeStep{d, newNode()})
			}
		}
		return steps
	}
	for name, spoil := range map[string]func([]Step) []Step{
		"no end":        func(s []Step) []Step { return s[:len(s)-2] },
		"one twice":     func(s []Step) []Step { return append(s, s[len(s)-1]) },
		"no process":    func(s []Step) []Step { return slices.Delete(s, 2, 3) },
		"wrong order":   func(s []Step) []Step { s[0], s[1] = s[1], s[0]; return s },
		"holds a later": func(s []Step) []Step { s[0].(*fakeStep).declared.Holds = []states.Event{declareReady}; return s },
		"holds itself": func(s []Step) []Step {
			s[1].(*fakeStep).declared.Holds = []states.Event{remapSnapshot}
			return s
		},
		"the path's on demand":       func(s []Step) []Step { s[1].(*fakeStep).declared.OnDemand = true; return s },
		"off the path, not demanded": func(s []Step) []Step { s[len(s)-1].(*fakeStep).declared.OnDemand = false; return s },
		"no deadline":                func(s []Step) []Step { s[1].(*fakeStep).declared.Deadline = 0; return s },
		"no deadline of its undo":    func(s []Step) []Step { s[1].(*fakeStep).declared.UndoDeadline = 0; return s },
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(Config{Steps: spoil(good()), Process: startPause, Ledger: &book{}, Backoff: DefaultBackoff})
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		})
	}
	_, err := New(Config{Steps: good(), Process: startPause, Ledger: &book{}, Backoff: DefaultBackoff})
	require.NoError(t, err)
}

func TestManySandboxesAtOnce(t *testing.T) {
	w := newWorld(t)
	var group sync.WaitGroup
	for i := range 50 {
		group.Go(func() {
			key := ledger.Key{Namespace: "k8s.io", ID: fmt.Sprint("s", i)}
			ctx := context.Background()
			if err := w.Create(ctx, key, Request{Pod: "ns/pod", Spec: &testSpec{}}); err != nil {
				t.Error(err)
			}
			if err := w.Start(ctx, key); err != nil {
				t.Error(err)
			}
			w.List()
			if err := w.Remove(ctx, key); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	require.Empty(t, w.List())
}

// The waits grow up to a bound, and cleanups that failed together are not retried together.
func TestDefaultBackoff(t *testing.T) {
	for failed, shortest := range map[int]time.Duration{1: time.Second, 3: 4 * time.Second, 1000: 4 * time.Minute} {
		waits := map[time.Duration]bool{}
		for range 100 {
			wait := DefaultBackoff(failed)
			require.GreaterOrEqual(t, wait, shortest)
			require.Less(t, wait, shortest+shortest/4)
			waits[wait] = true
		}
		require.Greater(t, len(waits), 50)
	}
}

// If a removal failed, its retry reports the completion before the sandbox is forgotten. A removal
// whose caller waits is not reported.
func TestWhenRemovalCompletes(t *testing.T) {
	for name, tc := range map[string]struct {
		fails     bool
		completed []ledger.Key
	}{
		"removed at once":    {},
		"removed by a timer": {fails: true, completed: []ledger.Key{testKey}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			var completed []ledger.Key
			w.WhenRemovalCompletes(func(_ context.Context, key ledger.Key) {
				require.NotContains(t, w.book.read(), "forgotten")
				completed = append(completed, key)
			})
			require.NoError(t, w.run(t))
			if tc.fails {
				failed := false
				w.undo[startPause] = func() error {
					if failed {
						return nil
					}
					failed = true
					return errors.New("no luck")
				}
			}
			require.Equal(t, tc.fails, w.Remove(t.Context(), testKey) != nil)
			require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
			w.Close(t.Context())
			require.Equal(t, tc.completed, completed)
		})
	}
}

// The announcements, the result and the undo at a stop of a lasting step are durable at once. Its
// other records can wait: nothing that outlives a reboot depends on them yet.
func TestWhatWaitsForTheDisk(t *testing.T) {
	w := newWorld(t, func(f *Declaration) { f.Lasting = f.Lasting || f.Name == allocateIDs })
	w.plans = map[states.Event]any{}
	for _, name := range creationPath() {
		w.plans[name] = &testResult{name}
	}
	require.NoError(t, w.run(t))
	s, err := w.lookup(testKey)
	require.NoError(t, err)
	for _, step := range w.Engine.steps {
		if name := step.Declaration().Name; name == attachNetwork || name == startPause {
			r := s.newRun(step)
			require.NoError(t, r.Announce(t.Context(), &testResult{"begins"}))
			require.NoError(t, r.Note(t.Context(), &testResult{"has ended"}))
		}
	}
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NoError(t, w.Remove(t.Context(), testKey))
	var lasting []string
	for _, r := range w.book.all {
		if r.Durable {
			how := "at once"
			if r.CanWait {
				how = "later"
			}
			lasting = append(lasting, strings.Join(strings.Fields(string(r.Kind)+" "+r.Step+" "+how), " "))
		}
	}
	require.Equal(t, []string{
		"begun at once", "intent allocate_ids later", "done allocate_ids at once", "intent attach_network later", "done attach_network at once",
		"noted attach_network at once", "noted attach_network later", "undone attach_network at once",
	}, lasting)
}

func TestNotesThatAreRepeatedAreKeptTwice(t *testing.T) {
	r := &Run{note: func(context.Context, any, bool) error { return nil }}
	for range 100 {
		for _, plugin := range []string{"bridge", "portmap"} {
			require.NoError(t, r.Note(t.Context(), &testResult{states.Event(plugin)}))
		}
	}
	require.Equal(t, []any{&testResult{"bridge"}, &testResult{"portmap"}, &testResult{"bridge"}, &testResult{"portmap"}}, r.Notes())
}

// A step that succeeds after its creation has failed has no result, because no result is on record.
func TestResultOfAStepThatCameTooLate(t *testing.T) {
	w := newWorld(t)
	reached := make(chan struct{})
	w.do[declareReady] = func(ctx context.Context) error {
		close(reached)
		<-ctx.Done()
		return nil
	}
	var result any
	w.undo[startPause] = func() error {
		result = w.view(t).Step(declareReady).Result
		return nil
	}
	w.create(t)
	ended := make(chan error, 1)
	go func() { ended <- w.Start(context.Background(), testKey) }()
	<-reached
	w.PauseExited(testKey, Exit{Code: 1})
	require.Error(t, <-ended)
	require.Nil(t, result)
}

// An event that fails while the engine closes sets no timer, which would keep the closed engine in
// memory.
func TestClosedEngineSetsNoTimer(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, fail := range map[string]func(t *testing.T, w *world, s *sandbox){
		"a failed cleanup": func(t *testing.T, w *world, _ *sandbox) {
			w.undo[attachNetwork] = func() error { w.Close(ended); return errNoLuck }
			require.ErrorIs(t, w.Stop(t.Context(), testKey), errNoLuck)
		},
		"pause that may run": func(t *testing.T, w *world, s *sandbox) {
			w.unknown = errNoLuck
			w.Close(ended)
			_, err := s.look(t.Context(), 1)
			require.ErrorIs(t, err, errNoLuck)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := readyWorld(t)
			s, err := w.lookup(testKey)
			require.NoError(t, err)
			fail(t, w, s)
			s.mu.Lock()
			defer s.mu.Unlock()
			require.Nil(t, s.timer)
		})
	}
}
