package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// rollback undoes a creation that failed because of cause. It returns what is owed afterwards.
func (s *sandbox) rollback(ctx context.Context, cause error) (err error) {
	ctx, span := tracing.Start(ctx, tracing.SpanRollback, s.req.Attributes...)
	defer func() { tracing.End(span, err) }()

	if err := s.enter(ctx, states.RollBack, states.RollingBack, cause); err != nil {
		return err
	}
	if cause != nil {
		s.mu.Lock()
		s.failure = cause
		s.mu.Unlock()
	}
	return s.settle(ctx, states.RolledBack, func() error {
		if err := s.unwind(ctx, everyStep); err != nil {
			return err
		}
		return s.forget(ctx, states.FinishRollback)
	})
}

// enter moves to state by event, unless a daemon before this one did.
func (s *sandbox) enter(ctx context.Context, event states.Event, state states.State, cause error) error {
	if s.state() == state {
		return nil
	}
	return s.move(ctx, event, cause)
}

// rollsBack says that a rollback is what ends the sandbox: it has never come to Ready.
func (s *sandbox) rollsBack() bool { return s.machine.Creating() || s.state() == states.RollingBack }

// halt ends the sandbox's process.
func (s *sandbox) halt(ctx context.Context) error {
	switch state := s.state(); {
	case state == states.Stopping:
	case state == states.CleanupOwed, !s.machine.Can(states.Stop):
		return nil // there is no process, or it goes with the rollback
	default:
		if err := s.move(ctx, states.Stop, nil); err != nil {
			return err
		}
	}
	return s.settle(ctx, states.Stopped, func() error { return s.end(ctx) })
}

// stop ends the process and undoes what a stopped sandbox must not have.
func (s *sandbox) stop(ctx context.Context) error {
	switch s.state() {
	case states.Stopped, states.Removing, states.RolledBack, states.Removed:
		return nil
	case states.CleanupOwed, states.Stopping:
		if s.goal == states.RolledBack || s.goal == states.Removed {
			return s.pay(ctx)
		}
	case states.Ready, states.NotReady:
	case states.Quarantined:
		return s.detach(ctx) // it stays what it is, but the kubelet removes no sandbox that it can't stop
	default:
		if s.rollsBack() {
			return s.rollback(ctx, errEnded)
		}
	}
	return s.stopFor(ctx, states.Stopped)
}

// stopFor stops the sandbox on the way to goal, which is what is owed if that fails, also after a kill.
func (s *sandbox) stopFor(ctx context.Context, goal states.State) error {
	s.setGoal(goal)
	if err := s.enter(ctx, states.Stop, states.Stopping, nil); err != nil {
		return err
	}
	return s.settle(ctx, goal, func() error {
		if err := s.detach(ctx); err != nil {
			return err
		}
		return s.move(ctx, states.FinishStop, nil)
	})
}

// detach ends the process and undoes what a stopped sandbox must not have.
func (s *sandbox) detach(ctx context.Context) error {
	if err := s.end(ctx); err != nil {
		return err
	}
	return s.unwind(ctx, func(d Declaration) bool { return d.AtStop })
}

// remove undoes everything and forgets the sandbox.
func (s *sandbox) remove(ctx context.Context) error {
	switch s.state() {
	case states.Ready, states.NotReady, states.Stopping:
		if err := s.stopFor(ctx, states.Removed); err != nil {
			return err
		}
	case states.CleanupOwed:
		if s.goal == states.RolledBack {
			return s.pay(ctx)
		}
	case states.Stopped, states.Quarantined, states.Removing:
	case states.RolledBack, states.Removed:
		return nil
	default:
		if s.rollsBack() {
			return s.rollback(ctx, errEnded)
		}
		if err := s.stopFor(ctx, states.Removed); err != nil {
			return err
		}
	}
	if err := s.enter(ctx, states.Remove, states.Removing, nil); err != nil {
		return err
	}
	return s.settle(ctx, states.Removed, func() error {
		if err := s.end(ctx); err != nil {
			return err
		}
		if err := s.unwind(ctx, everyStep); err != nil {
			return err
		}
		if s.alone {
			s.engine.paid(ctx, s.key)
		}
		return s.forget(ctx, states.FinishRemove)
	})
}

// end ends the sandbox's process, once, and keeps how it ended.
func (s *sandbox) end(ctx context.Context) error {
	if s.ended {
		return nil
	}
	process := s.engine.process
	name := process.Declaration().Name
	rec := s.steps[name]
	if !rec.touched {
		s.ended = true
		return nil
	}
	var exit Exit
	err := s.attempt(ctx, process, ActStop, func(ctx context.Context, r *Run) (err error) {
		if rec.unknown != "" {
			exit, err = s.endOfUnknown()
			return err
		}
		exit, err = process.Stop(ctx, r)
		return err
	})
	if err != nil {
		s.setOwed(ctx, name, err)
		return err
	}
	s.settleStep(name)
	s.recordExit(ctx, exit)
	s.announceExit()
	s.ended = true
	return nil
}

// endOfUnknown is how a process has ended whose data this release can't read. It fails unless a record, or a reboot, shows that it has.
func (s *sandbox) endOfUnknown() (Exit, error) {
	if s.exit != nil {
		return *s.exit, nil
	}
	return Exit{}, s.unknownTo(s.engine.process.Declaration().Name)
}

func everyStep(Declaration) bool { return true }

// unwind undoes the chosen steps on record, newest first. A step whose undo fails keeps the steps it holds from being undone; the others
// go on. All errors are returned, joined.
func (s *sandbox) unwind(ctx context.Context, chosen func(Declaration) bool) error {
	var failed []error
	held := map[states.Event]states.Event{} // by what
	for _, name := range slices.Backward(s.order()) {
		rec := s.steps[name]
		if !rec.touched || rec.status == StepUndone {
			continue
		}
		step := s.stepNamed(name)
		f := step.Declaration()
		if !chosen(f) {
			continue
		}
		holder, waits := held[f.Name]
		if waits {
			s.setWaiting(f.Name, holder)
		} else if err := s.undo(ctx, step); err != nil && !s.giveUp(ctx, f, err) {
			s.setOwed(ctx, f.Name, err)
			failed, holder = append(failed, err), f.Name
		} else {
			continue
		}
		for _, name := range f.Holds {
			held[name] = holder
		}
	}
	return errors.Join(failed...)
}

// undo takes one step back and records it. The ledger's refusal doesn't keep it from being undone: after a restart the undo
// is only made again, and finds nothing.
func (s *sandbox) undo(ctx context.Context, step Step) error {
	name := step.Declaration().Name
	s.setStatus(name, StepUndoing)
	intent := &journal.Record{Kind: journal.UndoIntent, Step: string(name), Interrupted: s.steps[name].interrupted}
	if err := s.steps[name].err; err != nil {
		intent.Error = err.Error()
	}
	s.record(ctx, intent, nil)
	if err := s.attempt(ctx, step, ActUndo, s.undoOf(step)); err != nil {
		return err
	}
	// What only a removal undoes leaves the ledger with the sandbox; of what a stop undoes, a reboot must not lose that it is gone.
	lasts := step.Declaration().Lasting && step.Declaration().AtStop && s.steps[name].plan != nil
	s.record(ctx, &journal.Record{Kind: journal.Undone, Step: string(name), Durable: lasts}, nil)
	s.setStatus(name, StepUndone)
	return nil
}

// undoOf is step's undo. What an earlier daemon has made is also looked for afterwards: its records may not say all that it did.
func (s *sandbox) undoOf(step Step) func(context.Context, *Run) error {
	if !s.restored {
		return step.Undo
	}
	return func(ctx context.Context, r *Run) error {
		if err := step.Undo(ctx, r); err != nil {
			if s.steps[step.Declaration().Name].interrupted {
				err = fmt.Errorf("%w; an earlier try was interrupted by a restart of containerd, and may have succeeded", err)
			}
			return err
		}
		there, err := step.Probe(ctx, r)
		if err == nil && there {
			err = fmt.Errorf("something of it is still there: %w", errdefs.ErrUnavailable) // it may go yet
		}
		return err
	}
}

// spanName is that of an attempt's span.
func spanName(step states.Event, kind ActKind) string {
	if kind == ActStop {
		return tracing.Stop(string(step))
	}
	return tracing.Undo(string(step))
}

// attempt makes one bounded and traced try at an undo, or at ending the process, and keeps how it ended.
func (s *sandbox) attempt(ctx context.Context, step Step, kind ActKind, f func(context.Context, *Run) error) error {
	declared := step.Declaration()
	ctx, cancel := within(ctx, declared.UndoDeadline)
	defer cancel()
	ctx, span := tracing.Start(ctx, spanName(declared.Name, kind), s.req.Attributes...)
	ctx = log.WithLogger(ctx, s.log(ctx).WithField(tracing.LogStep, declared.Name))
	r := s.run(step)
	// A full disk keeps nothing from being undone. After a restart the undo is only made again.
	r.note = func(ctx context.Context, data any, canWait bool) error {
		s.record(ctx, declared.noted(canWait), data)
		return nil
	}
	act := Act{Step: declared.Name, Kind: kind, Started: time.Now()}
	s.mu.Lock()
	s.acts.begin(act.Step, act.Kind, act.Started)
	s.steps[act.Step].acting, s.steps[act.Step].actingSince = act.Kind, act.Started
	s.mu.Unlock()
	err := Protect(func() error { return f(ctx, r) })
	if err != nil {
		err = late(ctx, err)
	}
	s.aside(func() { tracing.End(span, err) })
	act.Ended, act.Err = time.Now(), err
	s.mu.Lock()
	s.acts.end(act.Step, act.Kind, act.Started, act.Ended, act.Err)
	rec := s.steps[act.Step]
	rec.notes, rec.acting = r.Notes(), ""
	if err != nil {
		rec.attempts++
	}
	s.mu.Unlock()
	s.acted(ctx, act, outcomeOf(err))
	if errdefs.IsNotFound(err) {
		err = notFound{err}
	}
	if err != nil {
		return &StepError{Step: act.Step, Undo: true, Pod: s.req.Pod, Err: err}
	}
	return nil
}

// notFound is why an undo failed that didn't find something, without that class: whoever ends a sandbox takes it for a sandbox that is
// gone.
type notFound struct{ error }

func (e notFound) Is(target error) bool {
	return target != errdefs.ErrNotFound && errors.Is(e.error, target)
}

func (e notFound) As(target any) bool { return errors.As(e.error, target) }

func (s *sandbox) setStatus(name states.Event, status StepStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].status = status
}

// settleStep takes back that a step's process could not be ended; the step itself stands until it is undone.
func (s *sandbox) settleStep(name states.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec := s.steps[name]; rec.status == StepOwed {
		rec.status, rec.undoErr = StepDone, nil
		if rec.skipped() {
			rec.status = StepSkipped
		}
	}
}

// setOwed keeps why a step's undo is owed, and since when, also on record: not every failure is followed by a transition.
func (s *sandbox) setOwed(ctx context.Context, name states.Event, reason error) {
	record := failedUndo(name, reason)
	s.record(ctx, record, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].owedFrom(record.At, reason)
}

// failedUndo is the record that an undo has failed now.
func failedUndo(name states.Event, reason error) *journal.Record {
	return &journal.Record{Kind: journal.UndoFailed, Step: string(name), Error: reason.Error(), At: time.Now()}
}

// setWaiting keeps that a step's undo waits for another's.
func (s *sandbox) setWaiting(name, holder states.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].owedFrom(time.Now(), waitsFor("the undo of "+holder))
}

// waitsFor is why the undo of a step is owed that was not tried, because something else comes first.
type waitsFor string

func (w waitsFor) Error() string { return "waits for " + string(w) }

// failedToUndo says that the undo of the step was tried, and has failed.
func (r *stepRecord) failedToUndo() bool {
	return r.status == StepOwed && !errors.As(r.undoErr, new(waitsFor))
}

// owedFrom keeps why the step's undo is owed, and the first time as since when.
func (r *stepRecord) owedFrom(at time.Time, reason error) {
	r.status, r.undoErr = StepOwed, reason
	if r.owedSince.IsZero() {
		r.owedSince = at
	}
}
