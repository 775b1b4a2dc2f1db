package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/podfsm/podfsm/states"
)

// tried returns the acts of a view as text, with a "!" for a failure.
func tried(v View) (words []string) {
	for _, act := range v.Tries {
		word := fmt.Sprintf("%s %s", act.Operation, act.Step)
		if act.Err != nil {
			word += "!"
		}
		words = append(words, word)
	}
	return words
}

func inTrace(ctx context.Context, id byte) context.Context {
	return trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{id}, SpanID: trace.SpanID{id}}))
}

func TestEachTransitionIsObservedOnceAndInOrder(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NoError(t, w.Remove(t.Context(), testKey))

	told := w.history()
	require.Equal(t, slices.Concat(creationPath(), []states.Event{states.Stop, states.FinishStop, states.Remove, states.FinishRemove}), events(told))
	for i, transition := range told {
		require.EqualValues(t, i+1, transition.Seq)
		if i < len(creationPath()) {
			require.Equal(t, transition.Event, transition.Step)
		} else {
			require.Empty(t, transition.Step)
		}
		require.Empty(t, transition.Class)
	}
	for i := 1; i < len(told); i++ {
		require.Equal(t, told[i].At.Sub(told[i-1].At), told[i].After)
		require.Equal(t, told[i-1].To, told[i].From)
	}
	last := w.told[len(w.told)-1]
	require.Equal(t, states.Removed, last.State)
}

func events(transitions []Transition) (events []states.Event) {
	for _, t := range transitions {
		events = append(events, t.Event)
	}
	return events
}

// The observer gets a transition only once its record is in the ledger.
func TestTransitionsAreObservedOnceRecorded(t *testing.T) {
	w := newWorld(t)
	w.create(t)
	for i, want := range []string{"done allocate_ids", "done remap_snapshot", "done start_pause", "done capture_netns", "done attach_network", "done declare_ready"} {
		step := creationPath()[i]
		w.do[step] = func(context.Context) error {
			require.Len(t, w.history(), i)
			require.NotContains(t, w.book.read(), want)
			return nil
		}
	}
	require.NoError(t, w.Start(t.Context(), testKey))
}

func TestHistoryOfAFailure(t *testing.T) {
	w := newWorld(t)
	w.do[captureNetNS] = func(context.Context) error { return fmt.Errorf("no luck: %w", errdefs.ErrUnavailable) }
	w.create(t)
	require.Error(t, w.Start(inTrace(t.Context(), 7), testKey))

	last := w.told[len(w.told)-1]
	require.Equal(t, states.RolledBack, last.State)
	require.ErrorContains(t, last.Err, "no luck")
	rollback := last.Transitions[3]
	require.Equal(t, states.RollBack, rollback.Event)
	require.Equal(t, captureNetNS, rollback.Step)
	require.Equal(t, "unavailable", rollback.Class)
	require.Equal(t, trace.TraceID{7}.String(), rollback.TraceID)
	require.Equal(t, []string{
		"do allocate_ids", "do remap_snapshot", "do start_pause", "do capture_netns!",
		"undo capture_netns", "undo start_pause", "undo remap_snapshot", "undo allocate_ids",
	}, tried(last))
	for _, act := range last.Tries {
		require.False(t, act.Ended.Before(act.Started))
		require.False(t, act.Ended.IsZero())
	}
}

// After a restart, the history is the same as before it.
func TestHistoryOverARestart(t *testing.T) {
	w := newWorld(t)
	w.do[attachNetwork] = func(context.Context) error { return fmt.Errorf("no luck: %w", errdefs.ErrUnavailable) }
	w.undo[startPause] = func() error { return errors.New("won't die") }
	w.create(t)
	require.Error(t, w.Start(inTrace(t.Context(), 7), testKey))
	require.Eventually(t, func() bool { return len(w.history()) > 20 }, 10*time.Second, time.Millisecond, "the cleanup is retried again and again")
	w.Close(context.Background())
	before, err := w.Get(testKey)
	require.NoError(t, err)

	after := w.replayed(t)
	require.Equal(t, events(before.Transitions), events(after.Transitions))
	for i, was := range before.Transitions {
		is := after.Transitions[i]
		require.Equal(t, was.Seq, is.Seq)
		require.Equal(t, was.Step, is.Step, "%s", was.Event)
		require.Equal(t, was.Class, is.Class)
		require.Equal(t, was.TraceID, is.TraceID)
		require.True(t, was.At.Equal(is.At))
		require.InDelta(t, was.After, is.After, float64(time.Millisecond), "by two clocks")
		require.Equal(t, fmt.Sprint(was.Err), fmt.Sprint(is.Err))
	}
	require.Equal(t, tried(before), tried(after))
	require.ErrorContains(t, after.Step(attachNetwork).Err, "no luck")

	// The numbers continue, even if the ledger has dropped records that say the same.
	records := w.book.records
	w.book.records = slices.Concat(records[:len(records)-8], records[len(records)-2:])
	w.node.mend()
	next := w.restart(t, kept)
	require.NoError(t, next.Resume(t.Context(), testKey))
	require.Eventually(t, next.gone, 10*time.Second, time.Millisecond)
	told := next.history()
	require.Greater(t, told[0].Seq, before.Transitions[len(before.Transitions)-1].Seq)
	require.ErrorContains(t, next.told[len(next.told)-1].Err, "no luck", "the cause of the rollback is kept")
}

func TestHistoryIsBounded(t *testing.T) {
	w := newWorld(t)
	w.do[attachNetwork] = func(context.Context) error { return errors.New("no luck") }
	w.undo[startPause] = func() error { return errors.New("won't die") }
	require.Error(t, w.run(t))
	require.Eventually(t, func() bool { return len(w.history()) > 2*keepTransitions }, 20*time.Second, time.Millisecond)
	view, ok := w.Find(testKey)
	require.True(t, ok)
	require.Len(t, view.Transitions, keepTransitions)
	require.Equal(t, states.RollBack, view.Transitions[4].Event)
	require.Equal(t, attachNetwork, view.Transitions[4].Step, "how it began stays")
	require.Greater(t, view.Transitions[keepTransitions-1].Seq, uint64(2*keepTransitions))
	require.LessOrEqual(t, len(view.Tries), 3*2*len(creationPath()))
	require.Equal(t, "do allocate_ids", tried(view)[0])
	w.node.mend()
	require.Eventually(t, w.gone, 10*time.Second, time.Millisecond)
}
