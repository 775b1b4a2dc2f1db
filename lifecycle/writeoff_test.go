package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

var errNever = errors.New("the plugin was uninstalled")

func never() error { return errNever }

// partedStep is a step with two parts. Its undo fails until both are written off.
type partedStep struct{ fakeStep }

type partNote struct{ Name, Reason string }

func init() { typeurl.Register(&partNote{}, "podfsm.test", "partNote") }

func (s *partedStep) Undo(ctx context.Context, r *Run) error {
	var failed []error
	for _, part := range s.pending(r) {
		failed = append(failed, fmt.Errorf("%s: %w", part, errNever))
	}
	if err := errors.Join(failed...); err != nil {
		return err
	}
	return s.fakeStep.Undo(ctx, r)
}

func (s *partedStep) pending(r *Run) []string {
	return slices.DeleteFunc([]string{"net/bridge", "net/sbr"}, func(part string) bool {
		return slices.ContainsFunc(r.Notes(), func(note any) bool { return note.(*partNote).Name == part })
	})
}

func (s *partedStep) WriteOff(ctx context.Context, r *Run, name, reason string) ([]string, error) {
	if !slices.Contains(s.pending(r), name) {
		return nil, fmt.Errorf("only %q: %w", s.pending(r), errdefs.ErrNotFound)
	}
	if err := r.Announce(ctx, &partNote{name, reason}); err != nil {
		return nil, err
	}
	return []string{name}, nil
}

// withPendingCleanup returns a world whose sandbox has a pending cleanup with a goal, because the
// undo of a step always fails. The engine doesn't retry by itself. told keeps the write-offs.
func withPendingCleanup(t *testing.T, step states.Event, goal states.State, change ...func(*world)) (w *world, told *writeOffs) {
	w = newWorld(t)
	w.undo[step] = never
	told = w.calm()
	for _, c := range change {
		c(w)
	}
	var err error
	switch goal {
	case states.RolledBack:
		w.do[declareReady] = func(context.Context) error { return errors.New("no luck") }
		err = w.run(t)
	case states.Stopped:
		require.NoError(t, w.run(t))
		err = w.Stop(t.Context(), testKey)
	case states.Removed:
		require.NoError(t, w.run(t))
		err = w.Remove(t.Context(), testKey)
	}
	require.ErrorContains(t, err, "; `podfsm cleanups` on the node shows what is pending, retries it now or writes it off")
	view := w.view(t)
	require.Equal(t, states.CleanupOwed, view.State)
	require.Equal(t, goal, view.Goal)
	return w, told
}

// writeOffs keeps the reported write-offs.
type writeOffs struct {
	mu  sync.Mutex
	all []WriteOff
}

func (o *writeOffs) add(_ View, off WriteOff) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all = append(o.all, off)
}

func (o *writeOffs) read() []WriteOff {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.all)
}

// calm stops the engine's own retries, and keeps its write-offs.
func (w *world) calm() *writeOffs {
	told := &writeOffs{}
	w.Engine.backoff = func(int) time.Duration { return time.Hour }
	w.Engine.writtenOff = told.add
	return told
}

// ends requires that a sandbox has reached its goal, and that only what was written off is left.
func (w *world) ends(t *testing.T, goal states.State, left ...states.Event) {
	t.Helper()
	require.Equal(t, goal, w.state(t))
	if goal == states.Stopped {
		w.undo[remapSnapshot] = nil
		require.NoError(t, w.Remove(t.Context(), testKey))
	}
	require.True(t, w.gone())
	require.ElementsMatch(t, left, w.left())
}

func TestRetry(t *testing.T) {
	for _, goal := range []states.State{states.RolledBack, states.Stopped, states.Removed} {
		t.Run(string(goal), func(t *testing.T) {
			w, told := withPendingCleanup(t, attachNetwork, goal)
			err := w.Retry(t.Context(), testKey)
			require.ErrorIs(t, err, errNever)
			require.Equal(t, 2, w.view(t).Step(attachNetwork).FailedTries)

			completed := 0
			w.WhenRemovalCompletes(func(context.Context, ledger.Key) { completed++ })
			w.undo[attachNetwork] = nil
			require.NoError(t, w.Retry(t.Context(), testKey))
			require.Equal(t, goal == states.Removed, completed == 1, "the completion of a failed removal is reported")
			w.ends(t, goal)
			require.Empty(t, told.read())
		})
	}
}

func TestWriteOff(t *testing.T) {
	for _, goal := range []states.State{states.RolledBack, states.Stopped, states.Removed} {
		for _, step := range []states.Event{attachNetwork, captureNetNS} {
			t.Run(fmt.Sprintf("%s %s", goal, step), func(t *testing.T) {
				w, told := withPendingCleanup(t, step, goal)
				require.NoError(t, w.WriteOff(t.Context(), testKey, "", "the plugin is gone for good"))
				require.Len(t, told.read(), 1)
				off := told.read()[0]
				require.ErrorIs(t, off.Err, errNever)
				require.NotZero(t, off.At)
				require.Equal(t, WriteOff{Step: step, By: ByOperator, Reason: "the plugin is gone for good", Err: off.Err, At: off.At}, off)

				view, ok := w.Find(testKey)
				require.True(t, ok)
				require.Equal(t, StepUndone, view.Step(step).Status)
				act := view.Tries[slices.IndexFunc(view.Tries, func(a Try) bool { return a.Operation == OperationWriteOff })]
				require.Equal(t, step, act.Step)
				require.Equal(t, "the plugin is gone for good", act.Reason)
				require.ErrorIs(t, act.Err, errNever)
				w.ends(t, goal, step)
			})
		}
	}
}

// A write-off outlives a kill at any moment. An older release, which doesn't know the field,
// doesn't retry either.
func TestWriteOffLasts(t *testing.T) {
	for name, forget := range map[string]func(*ledger.Record){
		"this release":     func(*ledger.Record) {},
		"an older release": func(r *ledger.Record) { r.WrittenOff = "" },
	} {
		t.Run(name, func(t *testing.T) {
			w, _ := withPendingCleanup(t, attachNetwork, states.Stopped)
			before := w.book.saved()
			require.NoError(t, w.WriteOff(t.Context(), testKey, "", "gone"))
			after := w.book.saved()[0].Records
			at := slices.IndexFunc(after, func(r ledger.Record) bool { return r.WrittenOff != "" })
			require.Equal(t, ledger.Undone, after[at].Kind)
			require.True(t, after[at].Durable)
			require.Equal(t, "undo of step attach_network of pod \"ns/pod\" failed: the plugin was uninstalled", after[at].Error)
			for n := len(before[0].Records); n <= len(after); n++ {
				w.book.records = slices.Clone(after[:n])
				for i := range w.book.records {
					forget(&w.book.records[i])
				}
				next := w.restart(t, rebooted)
				next.calm()
				next.undo[attachNetwork] = never
				require.NoError(t, next.Resume(t.Context(), testKey))
				if n <= at {
					require.Eventually(t, func() bool { return next.view(t).Step(attachNetwork).Status == StepCleanupPending }, 10*time.Second, time.Millisecond)
					continue
				}
				require.Eventually(t, func() bool { return next.state(t) == states.Stopped }, 10*time.Second, time.Millisecond)
				require.Eventually(t, func() bool { return next.view(t).Err == nil }, 10*time.Second, time.Millisecond, "as without the restart")
				require.NoError(t, next.Remove(t.Context(), testKey))
				require.NotContains(t, next.acted(), "undo attach_network")
				w.book.records = after
			}
		})
	}
}

func TestWriteOffOfAPart(t *testing.T) {
	parted := func(w *world) {
		at := slices.IndexFunc(w.steps, func(s Step) bool { return s.Declaration().Name == attachNetwork })
		w.steps[at] = &partedStep{*w.steps[at].(*fakeStep)}
	}
	w, told := withPendingCleanup(t, attachNetwork, states.Stopped, parted, func(w *world) { w.undo[attachNetwork] = nil })
	err := w.WriteOff(t.Context(), testKey, "net/vrf", "gone")
	require.True(t, errdefs.IsNotFound(err))
	require.ErrorContains(t, err, `["net/bridge" "net/sbr"]`)

	w.book.refuse = func(r *ledger.Record) error {
		if r.Kind == ledger.Noted {
			return errors.New("disk full")
		}
		return nil
	}
	require.ErrorContains(t, w.WriteOff(t.Context(), testKey, "net/sbr", "gone"), "disk full")
	require.Empty(t, told.read())
	w.book.refuse = nil

	err = w.WriteOff(t.Context(), testKey, "net/sbr", "gone")
	require.ErrorContains(t, err, "net/bridge: the plugin was uninstalled", "the others are retried, and pending")
	require.NotContains(t, err.Error(), "net/sbr")
	require.NoError(t, w.WriteOff(t.Context(), testKey, "net/bridge", "gone, too"))
	require.Equal(t, states.Stopped, w.state(t))
	for i, part := range []string{"net/sbr", "net/bridge"} {
		require.Equal(t, part, told.read()[i].Part)
		require.Equal(t, attachNetwork, told.read()[i].Step)
		require.ErrorIs(t, told.read()[i].Err, errNever)
	}
	notes := slices.DeleteFunc(w.book.saved()[0].Records, func(r ledger.Record) bool { return r.Kind != ledger.Noted })
	require.Len(t, notes, 2)
	for _, note := range notes {
		require.True(t, note.Durable && !note.CanWait)
	}
}

func TestWriteOffIsRefused(t *testing.T) {
	t.Run("nothing is pending", func(t *testing.T) {
		w := newWorld(t)
		require.True(t, errdefs.IsNotFound(w.Retry(t.Context(), testKey)))
		require.True(t, errdefs.IsNotFound(w.WriteOff(t.Context(), testKey, "", "gone")))
		running, end := make(chan struct{}), make(chan struct{})
		w.do[startPause] = func(context.Context) error { close(running); <-end; return nil }
		w.create(t)
		done := make(chan error)
		go func() { done <- w.Start(context.Background(), testKey) }()
		<-running
		require.True(t, errdefs.IsFailedPrecondition(w.WriteOff(t.Context(), testKey, "", "gone")))
		close(end)
		require.NoError(t, <-done, "a creation goes on")
		require.True(t, errdefs.IsFailedPrecondition(w.Retry(t.Context(), testKey)))
		require.Equal(t, states.Ready, w.state(t))
	})
	t.Run("no reason", func(t *testing.T) {
		w, _ := withPendingCleanup(t, attachNetwork, states.Stopped)
		require.True(t, errdefs.IsInvalidArgument(w.WriteOff(t.Context(), testKey, "", "")))
	})
	t.Run("a step without parts", func(t *testing.T) {
		w, _ := withPendingCleanup(t, attachNetwork, states.Stopped)
		require.True(t, errdefs.IsNotFound(w.WriteOff(t.Context(), testKey, "net/sbr", "gone")))
	})
	t.Run("the ledger takes no record of it", func(t *testing.T) {
		w, told := withPendingCleanup(t, attachNetwork, states.Stopped)
		w.book.refuse = func(r *ledger.Record) error {
			if r.WrittenOff != "" {
				return errors.New("disk full")
			}
			return nil
		}
		require.ErrorIs(t, w.WriteOff(t.Context(), testKey, "", "gone"), errNever)
		require.Equal(t, StepCleanupPending, w.view(t).Step(attachNetwork).Status)
		require.Empty(t, told.read())
		w.book.refuse = nil
		require.NoError(t, w.WriteOff(t.Context(), testKey, "", "gone"))
	})
	t.Run("a process that can't be ended", func(t *testing.T) {
		w := newWorld(t)
		told := w.calm()
		require.NoError(t, w.run(t))
		w.stop = errors.New("it hangs in the kernel")
		require.Error(t, w.Remove(t.Context(), testKey))
		require.ErrorContains(t, w.WriteOff(t.Context(), testKey, "", "gone"), "it hangs in the kernel")
		require.Empty(t, told.read())
		require.Equal(t, creationPath(), w.left(), "nothing that it may use is freed")
	})
}

// A write-off never frees ids that a process, a mount or a snapshot may use.
func TestWriteOffFreesNothingInUse(t *testing.T) {
	for step, undo := range map[states.Event]func() error{
		startShim:     never,
		startPause:    never,
		remapSnapshot: never,
		attachNetwork: func() error { return StillInUse(errNever) },
	} {
		t.Run(string(step), func(t *testing.T) {
			w := newWorld(t)
			told := w.calm()
			require.NoError(t, w.run(t))
			require.NoError(t, w.Demand(t.Context(), testKey, startShim))
			w.undo[step] = undo
			require.ErrorIs(t, w.Remove(t.Context(), testKey), errNever)
			err := w.WriteOff(t.Context(), testKey, "", "gone")
			require.ErrorIs(t, err, errNever)
			require.ErrorContains(t, err, fmt.Sprintf("the undo of [%q] can't be written off", step))
			require.Empty(t, told.read())
			declared, _ := w.step(step)
			require.Subset(t, w.left(), declared.Declaration().Holds)
		})
	}
}

// A removal is also pending if all steps are undone and only the ledger fails to forget the
// sandbox.
func TestRetryOfTheEnd(t *testing.T) {
	w := newWorld(t)
	w.calm()
	require.NoError(t, w.run(t))
	w.book.forgets = func() error { return errors.New("disk full") }
	require.ErrorContains(t, w.Remove(t.Context(), testKey), "disk full")
	view := w.view(t)
	require.Empty(t, w.left())
	require.True(t, view.Pending())
	require.ErrorContains(t, view.Err, "disk full")
	w.book.forgets = nil
	require.NoError(t, w.Retry(t.Context(), testKey))
	require.True(t, w.gone())
}

// A write-off that waits for another request is not begun once its caller has gone.
func TestWriteOffWithoutItsCaller(t *testing.T) {
	w, told := withPendingCleanup(t, attachNetwork, states.Stopped)
	running, end := make(chan struct{}, 8), make(chan struct{})
	w.undo[attachNetwork] = func() error { running <- struct{}{}; <-end; return errNever }
	done := make(chan error, 1)
	go func() { done <- w.Stop(context.Background(), testKey) }()
	<-running
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := w.WriteOff(ctx, testKey, "", "gone")
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorContains(t, err, "the request was not begun")
	close(end)
	require.ErrorIs(t, <-done, errNever)
	require.NoError(t, w.WaitQueued(t.Context(), testKey))
	require.Equal(t, states.CleanupOwed, w.state(t))
	require.Empty(t, told.read())

	ctx, cancel = context.WithCancel(t.Context())
	w.undo[attachNetwork] = func() error { cancel(); return errNever }
	err = w.WriteOff(ctx, testKey, "", "gone")
	if err != nil { // both may come first
		require.ErrorContains(t, err, "continues after its caller's deadline")
	}
	require.NoError(t, w.WaitQueued(t.Context(), testKey))
	require.Equal(t, states.Stopped, w.state(t))
	require.Len(t, told.read(), 1)
}

// An undo that fails for the first time during a write-off stays pending: the operator has not
// decided about it.
func TestWriteOffOfWhatHadFailed(t *testing.T) {
	w, told := withPendingCleanup(t, attachNetwork, states.Removed)
	w.undo[captureNetNS] = never
	err := w.WriteOff(t.Context(), testKey, "", "gone")
	require.ErrorIs(t, err, errNever)
	require.Len(t, told.read(), 1)
	require.Equal(t, attachNetwork, told.read()[0].Step)
	require.Equal(t, StepCleanupPending, w.view(t).Step(captureNetNS).Status)

	next := w.restart(t, kept)
	told = next.calm()
	next.undo[captureNetNS] = never
	require.NoError(t, next.WriteOff(t.Context(), testKey, "", "gone, too"), "the failure is on record")
	require.Len(t, told.read(), 1)
	require.Equal(t, captureNetNS, told.read()[0].Step)
}

// The pending removal of a sandbox that was quarantined since is retried as a removal. It is never
// reported as completed while a cleanup is pending.
func TestRetryOfARemovalInQuarantine(t *testing.T) {
	w, _ := withPendingCleanup(t, remapSnapshot, states.Removed)
	w.book.records = append(w.book.records, ledger.Record{Seq: 1 << 20, Key: testKey, Kind: ledger.Unreadable, Error: "damaged"})
	next := w.restart(t, kept)
	next.calm()
	next.undo[remapSnapshot] = never
	require.Equal(t, states.Quarantined, next.state(t))
	require.ErrorIs(t, next.WriteOff(t.Context(), testKey, "", "gone"), errNever)
	require.Equal(t, StepCleanupPending, next.view(t).Step(remapSnapshot).Status)
	next.undo[remapSnapshot] = nil
	require.NoError(t, next.Retry(t.Context(), testKey))
	require.True(t, next.gone())
}

// The kubelet can't remove a quarantined sandbox whose stop fails.
func TestWriteOffInQuarantine(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	w.book.records = append(w.book.records, ledger.Record{Seq: 1 << 20, Key: testKey, Kind: ledger.Unreadable, Error: "damaged"})
	w, _ = w.restartOn(t, kept)
	require.Equal(t, states.Quarantined, w.state(t))
	require.True(t, errdefs.IsFailedPrecondition(w.Retry(t.Context(), testKey)))
	w.undo[attachNetwork] = never
	require.ErrorContains(t, w.Stop(t.Context(), testKey), "`podfsm cleanups`")
	require.ErrorIs(t, w.Retry(t.Context(), testKey), errNever)

	w, told := w.restartOn(t, kept)
	w.undo[attachNetwork] = never
	require.True(t, w.view(t).Pending(), "the pending cleanup is on record")
	require.NoError(t, w.WriteOff(t.Context(), testKey, "", "gone"))
	require.Len(t, told.read(), 1)
	require.NoError(t, w.Stop(t.Context(), testKey))
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Equal(t, []states.Event{attachNetwork}, w.left())
}

// After a reboot, an undo that depends on another program is retried for an hour, counting the
// tries of all callers and all daemons. podfsm's own undos, and all undos of a sandbox of this
// boot, are retried forever.
func TestTriesAfterAReboot(t *testing.T) {
	for name, test := range map[string]struct {
		known    Outside
		step     states.Event
		asked    bool // the kubelet tries, too, more often than the timer
		restarts bool // every 20 minutes
		ends     bool
	}{
		"a plugin's":                {rebooted, attachNetwork, false, false, true},
		"a plugin's, asked for":     {rebooted, attachNetwork, true, false, true},
		"a plugin's, with restarts": {rebooted, attachNetwork, true, true, true},
		"podfsm's own":              {rebooted, captureNetNS, true, false, false},
		"a plugin's, no reboot":     {kept, attachNetwork, true, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, _ := withPendingCleanup(t, test.step, states.Stopped)
				time.Sleep(24 * time.Hour)
				booted := time.Now()
				var told *writeOffs
				start := func() {
					w, told = w.restartOn(t, test.known)
					w.undo[test.step] = never
					w.Engine.backoff, w.Engine.uptime = DefaultBackoff, func() time.Duration { return time.Since(booted) }
					require.NoError(t, w.Resume(t.Context(), testKey))
				}
				start()
				try := func(from, to int) {
					for minute := from; minute < to; minute++ {
						time.Sleep(time.Minute)
						synctest.Wait()
						if test.restarts && minute%20 == 19 {
							start()
						}
						if test.asked {
							_ = w.Stop(t.Context(), testKey)
						}
					}
				}
				try(0, 50)
				require.Equal(t, states.CleanupOwed, w.state(t))
				require.Empty(t, told.read())
				try(50, 75)
				defer w.Close(context.Background())
				if !test.ends {
					require.Equal(t, states.CleanupOwed, w.state(t))
					require.Empty(t, told.read())
					return
				}
				require.Equal(t, states.Stopped, w.state(t))
				require.Len(t, told.read(), 1)
				require.Equal(t, ByReboot, told.read()[0].By)
				require.Equal(t, "the node was rebooted, and the cleanup failed for more than 1h0m0s", told.read()[0].Reason)
			})
		})
	}
}

// After a kill between an undo and its record, the undo may have succeeded. If it fails from then
// on, the error says so.
func TestUndoThatWasInterrupted(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.Stop(t.Context(), testKey))
	undone := slices.IndexFunc(w.book.records, func(r ledger.Record) bool { return r.Kind == ledger.Undone && r.Step == string(attachNetwork) })
	w.book.records = w.book.records[:undone]
	const text = "an earlier try was interrupted by a restart of containerd, and may have succeeded"
	for range 2 { // a later restart doesn't forget it
		before := w.book.saved()[0].Records
		w = w.restart(t, kept)
		w.calm()
		w.undo[attachNetwork] = never
		err := w.Stop(t.Context(), testKey)
		require.ErrorIs(t, err, errNever)
		require.ErrorContains(t, err, text)
		require.ErrorContains(t, w.view(t).Step(attachNetwork).Err, text)
		w.undo[attachNetwork] = nil
		last := len(w.book.records) - 1
		require.Equal(t, ledger.CleanupPending, w.book.records[last].Kind)
		w.book.records = append(before, w.book.records[:last]...)
	}
	require.NoError(t, w.Stop(t.Context(), testKey))
}

// A failed undo is not reported as interrupted, whether its sandbox was ready, stopped or
// quarantined.
func TestUndoThatFailedWasNotInterrupted(t *testing.T) {
	w := newWorld(t)
	w.calm()
	require.NoError(t, w.run(t))
	w.do[startShim] = func(context.Context) error { return errors.New("no luck") }
	w.undo[startShim] = never
	require.Error(t, w.Demand(t.Context(), testKey, startShim))
	for range 3 {
		require.ErrorIs(t, w.Stop(t.Context(), testKey), errNever)
		w, _ = w.restartOn(t, kept)
		w.undo[startShim] = never
		err := w.Stop(t.Context(), testKey)
		require.ErrorIs(t, err, errNever)
		require.NotContains(t, err.Error(), "interrupted")
	}
}

// The ledger drops records that say the same, but still has the record of an interrupted undo.
func TestUndoThatWasInterruptedStaysOnRecord(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.run(t))
	require.NoError(t, w.Stop(t.Context(), testKey))
	undone := slices.IndexFunc(w.book.records, func(r ledger.Record) bool { return r.Kind == ledger.Undone && r.Step == string(attachNetwork) })
	root, state := t.TempDir(), t.TempDir()
	log, err := ledger.Open(root, state)
	require.NoError(t, err)
	for _, record := range w.book.records[:undone] {
		record.Seq = 0
		require.NoError(t, log.Append(t.Context(), &record))
	}
	for range 3 {
		next := newWorldOn(t, log, newNode())
		next.calm()
		next.node.exists, next.undo[attachNetwork] = w.left(), never
		next.Restore(t.Context(), log.Sandboxes(), func(_ ledger.Key, spec any) Request { return Request{Pod: "ns/pod", Spec: spec} }, outsideOf(kept))
		for range 3 {
			require.ErrorContains(t, next.Stop(t.Context(), testKey), "an earlier try was interrupted by a restart of containerd")
		}
		next.Close(context.Background())
		require.NoError(t, log.Close())
		log, err = ledger.Open(root, state)
		require.NoError(t, err)
	}
	require.NoError(t, log.Close())
}

// A reboot also ends a process whose data this release can't read. The rest of the step can then be
// written off.
func TestRebootEndsAnUnknownProcess(t *testing.T) {
	for known, ends := range map[Outside]bool{rebooted: true, kept: false} {
		w := newWorld(t)
		require.NoError(t, w.run(t))
		for i, record := range w.book.records {
			if record.Kind == ledger.Done && record.Step == string(startPause) {
				w.book.records[i].Data = &ledger.Data{TypeURL: "nobody's", Value: []byte("{}")}
			}
		}
		next := w.restart(t, known)
		told := next.calm()
		err := next.Stop(t.Context(), testKey)
		if !ends {
			require.ErrorContains(t, err, "can't read its data of type \"nobody's\"")
			continue
		}
		require.NoError(t, err)
		require.ErrorContains(t, next.Remove(t.Context(), testKey), "can't read its data of type")
		require.NoError(t, next.WriteOff(t.Context(), testKey, "", "rebooted"))
		require.Equal(t, startPause, told.read()[0].Step)
		require.True(t, next.gone())
	}
}

// Failing requests don't postpone the timer's retry.
func TestRequestsDontPutRetriesOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := withPendingCleanup(t, attachNetwork, states.Stopped, func(w *world) { w.Engine.backoff = func(int) time.Duration { return 4 * time.Minute } })
		due := w.view(t).NextTry
		for range 3 {
			time.Sleep(time.Minute)
			require.Error(t, w.Stop(t.Context(), testKey))
			require.Equal(t, due, w.view(t).NextTry)
		}
		tries := w.view(t).Step(attachNetwork).FailedTries
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		require.Equal(t, tries+1, w.view(t).Step(attachNetwork).FailedTries)
		require.True(t, w.view(t).NextTry.After(due))
		w.Close(context.Background())
	})
}

// A timer that fires during a failing try doesn't cause another try at once.
func TestTimerDuringATry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := withPendingCleanup(t, attachNetwork, states.Stopped, func(w *world) { w.Engine.backoff = func(int) time.Duration { return time.Minute } })
		tries := w.view(t).Step(attachNetwork).FailedTries
		w.undo[attachNetwork] = func() error {
			time.Sleep(2 * time.Minute)
			return errors.New("no luck")
		}
		require.Error(t, w.Stop(t.Context(), testKey))
		synctest.Wait()
		require.Equal(t, tries+1, w.view(t).Step(attachNetwork).FailedTries)
		require.Equal(t, states.CleanupOwed, w.state(t))
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, states.Stopping, w.state(t), "the timer of the last try")
		w.Close(context.Background())
	})
}
