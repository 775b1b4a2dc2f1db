package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/states"
)

// Each sequence of events, legal or not, is fired at a sandbox. Its records give the same state as
// the live machine.
func TestReplayOfEachSequenceOfEvents(t *testing.T) {
	const longest = 9 // passes every transition
	seen := map[states.Transition]bool{}
	var walk func(events []states.Event)
	walk = func(events []states.Event) {
		w, s := fired(t, events, seen)
		require.Equal(t, moves(s.view()), moves(w.replayed(t)), "%v", events)
		if len(events) == longest {
			return
		}
		for _, event := range testTable.Events() {
			if s.machine.Can(event) {
				walk(append(slices.Clone(events), event))
				continue
			}
			before := len(w.book.read())
			require.Error(t, fireOne(s, event), "%v %s", events, event)
			require.Len(t, w.book.read(), before, "a refused event is not recorded: %v %s", events, event)
		}
	}
	walk(nil)
	for _, row := range testTable.Transitions() {
		require.True(t, seen[row], "%v", row)
	}
}

// fired returns a sandbox after legal events.
func fired(t *testing.T, events []states.Event, seen map[states.Transition]bool) (*world, *sandbox) {
	b := &book{}
	w := newWorldOn(quiet{t}, b, newNode())
	w.book = b
	w.engineWaits()
	s := newSandbox(w.Engine, testKey, Request{Pod: "ns/pod", Spec: &testSpec{"pod"}})
	require.NoError(t, s.accept(t.Context()))
	for _, event := range events {
		from := s.state()
		require.NoError(t, fireOne(s, event), "%v", events)
		seen[states.Transition{From: from, Event: event, To: s.state()}] = true
	}
	return w, s
}

// fireOne records an event and moves the sandbox by the engine's own code.
func fireOne(s *sandbox, event states.Event) error {
	ctx := context.Background()
	if step, ok := s.engine.step(event); ok {
		if !s.machine.Can(event) {
			return errors.New("another step comes first")
		}
		s.setRunning(step)
		s.appendOrLog(ctx, s.engine.intent(step.Declaration()), nil)
		out := stepResult{ctx: ctx, touched: true, started: time.Now()}
		if err := s.conclude(step, &out); err != nil {
			return err
		}
		s.keepResult(step, out, false)
		return s.fire(ctx, event, out.ended, nil)
	}
	if event == states.LeaveCleanupPending {
		if !s.machine.Can(event) {
			return errors.New("no cleanup is pending")
		}
		s.leavePending(ctx, states.Removed, errors.New("no luck"))
		s.stopTimer()
		return nil
	}
	return s.move(ctx, event, nil)
}

// quiet is a test that doesn't close its many worlds at its end, because nothing runs in them.
type quiet struct{ *testing.T }

func (quiet) Cleanup(func()) {}

// input is a request, a result or a fault of a sandbox.
type input struct {
	name string
	do   func(t *testing.T, w *world)
}

// inputs are all inputs that lead to different records.
var inputs = []input{
	{"start", func(t *testing.T, w *world) { _ = w.Start(t.Context(), testKey) }},
	{"demand", func(t *testing.T, w *world) { _ = w.Demand(t.Context(), testKey, startShim) }},
	{"lose pause", func(_ *testing.T, w *world) {
		if slices.Contains(w.left(), startPause) {
			w.PauseExited(testKey, Exit{Code: 7, At: time.Now()})
		}
	}},
	{"halt", func(t *testing.T, w *world) { _ = w.Halt(t.Context(), testKey) }},
	{"stop", func(t *testing.T, w *world) { _ = w.Stop(t.Context(), testKey) }},
	{"remove", func(t *testing.T, w *world) { _ = w.Remove(t.Context(), testKey) }},
	{"retry", func(_ *testing.T, w *world) {
		if s, err := w.lookup(testKey); err == nil {
			<-s.ask(func(reply func(error)) {
				s.mu.Lock()
				s.nextTry = time.Time{} // it is due
				s.mu.Unlock()
				s.retry()
				reply(nil)
			})
		}
	}},
	{"break a step", func(_ *testing.T, w *world) {
		w.node.mu.Lock()
		defer w.node.mu.Unlock()
		w.do[attachNetwork] = func(context.Context) error { return errNoLuck }
		w.do[startShim] = w.do[attachNetwork]
	}},
	{"break an undo", func(_ *testing.T, w *world) {
		w.node.mu.Lock()
		defer w.node.mu.Unlock()
		w.undo[captureNetNS] = func() error { return errNoLuck }
		w.undo[startShim] = w.undo[captureNetNS]
	}},
	{"break the last undo", func(_ *testing.T, w *world) {
		w.node.mu.Lock()
		defer w.node.mu.Unlock()
		w.undo[allocateIDs] = func() error { return errNoLuck }
	}},
	{"break the process", func(_ *testing.T, w *world) {
		w.node.mu.Lock()
		defer w.node.mu.Unlock()
		w.node.stop = errNoLuck
	}},
	{"mend", func(_ *testing.T, w *world) { w.mend() }},
}

// After each sequence of inputs, a reader of the records sees what the engine shows. PODFSM_FULL=1
// tries longer sequences.
func TestReplayOfEachSequenceOfInputs(t *testing.T) {
	longest := 3
	if os.Getenv("PODFSM_FULL") != "" {
		longest = 4
	}
	var walk func(done []input)
	walk = func(done []input) {
		if len(done) > 0 && !after(t, done) {
			return
		}
		if len(done) == longest {
			return
		}
		for _, next := range inputs {
			walk(append(slices.Clone(done), next))
		}
	}
	walk(nil)
}

// after gives inputs and compares. It returns false once the sandbox is gone.
func after(t *testing.T, done []input) bool {
	b := &book{}
	w := newWorldOn(quiet{t}, b, newNode())
	w.book = b
	w.engineWaits()
	defer w.Close(context.Background())
	w.create(t)
	var names []string
	for _, d := range done {
		d.do(t, w)
		names = append(names, d.name)
	}
	require.NoError(t, w.WaitQueued(t.Context(), testKey))
	live, err := w.Get(testKey)
	if err != nil {
		require.Empty(t, w.book.saved()[0].Records, "%v", names)
		require.Empty(t, w.left(), "%v", names)
		return false
	}
	read := w.replayed(t)
	require.Equal(t, moves(live), moves(read), "%v", names)
	require.Equal(t, steps(live), steps(read), "%v", names)
	return true
}

// moves returns a view's state and its transitions as text.
func moves(v View) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s goal=%q halfmade=%t exit=%v unread=%v\n", v.State, v.Goal, v.HalfMade, v.Exit != nil, v.Unread)
	for _, t := range v.Transitions {
		fmt.Fprintf(&b, "%d %s -%s-> %s step=%q err=%v class=%q\n", t.Seq, t.From, t.Event, t.To, t.Step, t.Err, t.Class)
	}
	return b.String()
}

// steps returns the status of a view's steps. It leaves out which steps wait for another at a stop:
// that isn't recorded.
func steps(v View) string {
	var b strings.Builder
	for _, step := range v.Steps {
		status := step.Status
		if v.Goal == states.Stopped && status == StepCleanupPending && strings.HasPrefix(fmt.Sprint(step.Err), "waits") {
			status = StepDone
		}
		fmt.Fprintf(&b, "%s %s unknown=%t release=%s\n", step.Name, status, step.Unknown, step.Release)
	}
	return b.String()
}
