package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/states"
)

// Every sequence of events is fired at a sandbox, legal or not: what its records say is what the live machine says.
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
			require.Len(t, w.book.read(), before, "what is refused is on no record: %v %s", events, event)
		}
	}
	walk(nil)
	for _, row := range testTable.Transitions() {
		require.True(t, seen[row], "%v", row)
	}
}

// fired is a sandbox at which events were fired, all of them legal.
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

// fireOne has the engine's own code record an event and move the sandbox.
func fireOne(s *sandbox, event states.Event) error {
	ctx := context.Background()
	if step, ok := s.engine.step(event); ok {
		if !s.machine.Can(event) {
			return errors.New("it is not this step's turn")
		}
		s.setRunning(step)
		s.record(ctx, s.engine.intent(step.Declaration()), nil)
		out := stepResult{ctx: ctx, touched: true, started: time.Now()}
		if err := s.conclude(step, &out); err != nil {
			return err
		}
		s.keepResult(step, out, false)
		return s.fire(ctx, event, out.ended, nil)
	}
	if event == states.OweCleanup {
		if !s.machine.Can(event) {
			return errors.New("nothing is owed")
		}
		s.owe(ctx, states.Removed, errors.New("no luck"))
		s.stopTimer()
		return nil
	}
	return s.move(ctx, event, nil)
}

// quiet is a test whose many worlds are not closed at its end: they have nothing running.
type quiet struct{ *testing.T }

func (quiet) Cleanup(func()) {}

// deed is what can happen to a sandbox.
type deed struct {
	name string
	do   func(t *testing.T, w *world)
}

// deeds are requests, results and faults, as far as they lead to different records.
var deeds = []deed{
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
			<-s.ask(func(reply func(error)) { s.retry(); reply(nil) })
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

// Whatever happens to a sandbox in whatever order, a reader of its records sees what the engine shows.
func TestReplayOfEachSequenceOfDeeds(t *testing.T) {
	const longest = 4
	var walk func(done []deed)
	walk = func(done []deed) {
		if len(done) > 0 && !after(t, done) {
			return
		}
		if len(done) == longest {
			return
		}
		for _, next := range deeds {
			walk(append(slices.Clone(done), next))
		}
	}
	walk(nil)
}

// after does deeds and compares. It returns false once the sandbox is gone.
func after(t *testing.T, done []deed) bool {
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
	require.NoError(t, w.Settle(t.Context(), testKey))
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

// moves are a view's state and how it came there.
func moves(v View) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s goal=%q halfmade=%t exit=%v unread=%v\n", v.State, v.Goal, v.HalfMade, v.Exit != nil, v.Unread)
	for _, t := range v.Transitions {
		fmt.Fprintf(&b, "%d %s -%s-> %s step=%q err=%v class=%q\n", t.Seq, t.From, t.Event, t.To, t.Step, t.Err, t.Class)
	}
	return b.String()
}

// steps are where a view's steps stand. Which of them wait for the undo of another at a stop isn't on record.
func steps(v View) string {
	var b strings.Builder
	for _, step := range v.Steps {
		status := step.Status
		if v.Goal == states.Stopped && status == StepOwed && strings.HasPrefix(fmt.Sprint(step.Err), "waits") {
			status = StepDone
		}
		fmt.Fprintf(&b, "%s %s unknown=%t release=%s\n", step.Name, status, step.Unknown, step.Release)
	}
	return b.String()
}
