package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// endProcess ends the sandbox's process, once, and keeps its exit.
func (s *sandbox) endProcess(ctx context.Context) error {
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
	err := s.try(ctx, process, OperationStop, func(ctx context.Context, r *Run) (err error) {
		if rec.unknown != "" {
			exit, err = s.endOfUnknown()
			return err
		}
		exit, err = process.End(ctx, r)
		return err
	})
	if err != nil {
		s.keepUndoPending(ctx, name, err)
		return err
	}
	s.markDoneAgain(name)
	s.recordExit(ctx, exit)
	s.announceExit()
	s.ended = true
	return nil
}

// endOfUnknown returns the exit of a process whose data this release can't read. It fails unless a
// record or a reboot shows that the process has ended.
func (s *sandbox) endOfUnknown() (Exit, error) {
	if s.exit != nil {
		return *s.exit, nil
	}
	return Exit{}, s.unknownTo(s.engine.process.Declaration().Name)
}

func everyStep(Declaration) bool { return true }

// undoSteps undoes the chosen steps on record, newest first. If an undo fails, the steps that it holds
// wait, and the undos of the others go on. It returns all errors, joined.
func (s *sandbox) undoSteps(ctx context.Context, chosen func(Declaration) bool) error {
	var failed []error
	held := map[states.Event]states.Event{} // each waiting step, and the failed one that it waits for
	for _, name := range slices.Backward(s.order()) {
		rec := s.steps[name]
		if !rec.touched || rec.status == StepUndone {
			continue
		}
		step := s.stepNamed(name)
		d := step.Declaration()
		if !chosen(d) {
			continue
		}
		holder, waits := held[d.Name]
		if waits {
			s.setWaiting(d.Name, holder)
		} else if err := s.undoStep(ctx, step); err != nil && !s.giveUp(ctx, d, err) {
			s.keepUndoPending(ctx, d.Name, err)
			failed, holder = append(failed, err), d.Name
		} else {
			continue
		}
		for _, name := range d.Holds {
			held[name] = holder
		}
	}
	return errors.Join(failed...)
}

// undoStep undoes one step and records that. It goes on if the record can't be written: after a restart
// the undo is only repeated, and finds nothing.
func (s *sandbox) undoStep(ctx context.Context, step Step) error {
	name := step.Declaration().Name
	s.setStatus(name, StepUndoing)
	intent := &ledger.Record{Kind: ledger.UndoIntent, Step: string(name), Interrupted: s.steps[name].interrupted}
	if err := s.steps[name].err; err != nil {
		intent.Error = err.Error()
	}
	s.appendOrLog(ctx, intent, nil)
	if err := s.try(ctx, step, OperationUndo, s.undoOf(step)); err != nil {
		return err
	}
	// A removal takes the sandbox off the ledger. But after a stop the sandbox stays, and a reboot
	// must not lose the record.
	lasts := step.Declaration().Lasting && step.Declaration().AtStop && s.steps[name].plan != nil
	s.appendOrLog(ctx, &ledger.Record{Kind: ledger.Undone, Step: string(name), Durable: lasts}, nil)
	s.setStatus(name, StepUndone)
	return nil
}

// undoOf returns the undo of a step. For a step of an earlier daemon, it probes the host after the
// undo, because the records may be incomplete.
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
			err = fmt.Errorf("something of the step is still on the host: %w", errdefs.ErrUnavailable) // a retry may succeed
		}
		return err
	}
}

// spanName returns the name of a try's span.
func spanName(step states.Event, operation Operation) string {
	if operation == OperationStop {
		return tracing.Stop(string(step))
	}
	return tracing.Undo(string(step))
}

// try calls f, which undoes the step or ends its process, with a deadline and a span, and keeps
// the result.
func (s *sandbox) try(ctx context.Context, step Step, operation Operation, f func(context.Context, *Run) error) error {
	declared := step.Declaration()
	ctx, cancel := within(ctx, declared.UndoDeadline)
	defer cancel()
	ctx, span := tracing.Start(ctx, spanName(declared.Name, operation), s.req.Attributes...)
	ctx = log.WithLogger(ctx, s.log(ctx).WithField(tracing.LogStep, declared.Name))
	r := s.newRun(step)
	// A full disk must not prevent an undo. After a restart the undo is only repeated.
	r.note = func(ctx context.Context, data any, canWait bool) error {
		s.appendOrLog(ctx, declared.noted(canWait), data)
		return nil
	}
	try := Try{Step: declared.Name, Operation: operation, Started: time.Now()}
	s.mu.Lock()
	s.tries.begin(try.Step, try.Operation, try.Started)
	s.steps[try.Step].operation, s.steps[try.Step].operationSince = try.Operation, try.Started
	s.mu.Unlock()
	err := Protect(func() error { return f(ctx, r) })
	if err != nil {
		err = late(ctx, err)
	}
	s.logPanics(func() { tracing.End(span, err) })
	try.Ended, try.Err = time.Now(), err
	s.mu.Lock()
	s.tries.end(try.Step, try.Operation, try.Started, try.Ended, try.Err)
	rec := s.steps[try.Step]
	rec.notes, rec.operation = r.Notes(), ""
	if err != nil {
		rec.failedTries++
	}
	s.mu.Unlock()
	s.tried(ctx, try, outcomeOf(err))
	if errdefs.IsNotFound(err) {
		err = notFound{err}
	}
	if err != nil {
		return &StepError{Step: try.Step, Undo: true, Pod: s.req.Pod, Err: err}
	}
	return nil
}

// notFound hides the class NotFound of an undo's error: the caller of a removal would take it for a
// sandbox that is gone.
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

// markDoneAgain marks a step as done again if the end of its process was pending. The step itself is
// undone later.
func (s *sandbox) markDoneAgain(name states.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec := s.steps[name]; rec.status == StepCleanupPending {
		rec.status, rec.undoErr = StepDone, nil
		if rec.skipped() {
			rec.status = StepSkipped
		}
	}
}

// keepUndoPending marks the undo of a step as pending, and records the failure, because not every
// failure is followed by a transition.
func (s *sandbox) keepUndoPending(ctx context.Context, name states.Event, reason error) {
	record := failedUndo(name, reason)
	s.appendOrLog(ctx, record, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].leavePending(record.At, reason)
}

// failedUndo returns the record of an undo that failed now.
func failedUndo(name states.Event, reason error) *ledger.Record {
	return &ledger.Record{Kind: ledger.UndoFailed, Step: string(name), Error: reason.Error(), At: time.Now()}
}

// setWaiting marks the undo of a step as pending, because it waits for the undo of holder.
func (s *sandbox) setWaiting(name, holder states.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].leavePending(time.Now(), waitsFor("the undo of "+holder))
}

// waitsFor is the reason of a pending undo that was not tried, because another undo comes first.
type waitsFor string

func (w waitsFor) Error() string { return "waits for " + string(w) }

// failedToUndo says that the undo of the step was tried and failed.
func (r *stepState) failedToUndo() bool {
	return r.status == StepCleanupPending && !errors.As(r.undoErr, new(waitsFor))
}

// leavePending marks the undo of the step as pending. The first call sets the time.
func (r *stepState) leavePending(at time.Time, reason error) {
	r.status, r.undoErr = StepCleanupPending, reason
	if r.pendingSince.IsZero() {
		r.pendingSince = at
	}
}
