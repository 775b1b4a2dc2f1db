package lifecycle

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// settle does work that leads to goal. When it fails the sandbox owes its cleanup, with the goal kept, and tries again later.
func (s *sandbox) settle(ctx context.Context, goal states.State, work func() error) error {
	if err := Protect(work); err != nil {
		s.owe(ctx, goal, err)
		return err
	}
	if s.attempts > 0 {
		s.aside(func() {
			s.log(ctx).WithField(tracing.LogAttempts, s.attempts).Info("sandbox: pending cleanup completed")
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.goal, s.attempts, s.failing, s.nextTry, s.lastErr = "", 0, time.Time{}, time.Time{}, s.failure
	s.stopTimerLocked()
	return nil
}

// owe puts the debt on record and sets the time of the next try.
func (s *sandbox) owe(ctx context.Context, goal states.State, cause error) {
	record := &journal.Record{Kind: journal.Owed, Goal: string(goal), Durable: true}
	err := s.describe(record, states.OweCleanup, cause)
	if err == nil {
		s.record(ctx, record, nil)
		err = s.fire(ctx, states.OweCleanup, record.At, cause)
	}
	if err != nil {
		s.aside(func() { s.log(ctx).WithError(err).Error("sandbox: owes its cleanup") })
	}
	if goal != states.Stopped {
		s.engine.unname(s) // nobody may use it any more, and whoever was told that its creation failed tries again under the same name
	}
	now := time.Now()
	next := now.Add(s.engine.backoff(s.attempts + 1))
	s.mu.Lock()
	if s.nextTry.After(now) && s.nextTry.Before(next) {
		next = s.nextTry // a request doesn't put the timer's try off
	}
	s.goal = goal
	s.oweRest(goal, record.At)
	s.attempts++
	if s.failing.IsZero() {
		s.failing = now
	}
	s.nextTry = next
	s.stopTimerLocked()
	wait := next.Sub(now)
	s.timer = time.AfterFunc(wait, func() { s.inTurn(s.retry) })
	s.mu.Unlock()

	s.aside(func() {
		entry := s.log(ctx).WithError(cause).WithFields(log.Fields{
			tracing.LogGoal: goal, tracing.LogAttempts: s.attempts, tracing.LogRetryIn: wait.Seconds(), tracing.LogErrorType: tracing.Class(cause),
		})
		if s.attempts == 1 {
			entry.Warn("sandbox: cleanup failed, retrying")
		} else {
			entry.Debug("sandbox: cleanup failed, retrying")
		}
	})
}

// oweRest says of the steps that a pending cleanup hasn't come to yet that they wait: when nothing of the sandbox may stay, that is each
// which may have acted. The caller holds mu, or is alone.
func (s *sandbox) oweRest(goal states.State, at time.Time) {
	for _, rec := range s.steps {
		if goal != states.Stopped && rec.touched && rec.status != StepUndone && rec.status != StepOwed {
			rec.owedFrom(at, waitsFor("the others"))
		}
	}
}

func (s *sandbox) setGoal(goal states.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.goal = goal
}

// explained adds the way out to what a caller is told of a cleanup that has failed and is pending.
func (s *sandbox) explained(err error) error {
	if err == nil || !s.pending() {
		return err
	}
	return fmt.Errorf("%w; `podfsm cleanups` on the node shows what is pending, retries it now or writes it off", err)
}

// retry is the timer's event.
func (s *sandbox) retry() {
	if s.state() == states.CleanupOwed {
		_ = s.retryPending(nil) // what fails is logged, and tried again
	}
}

// retryPending makes one more try at what is owed, in a trace of its own that is linked to the sandbox's.
func (s *sandbox) retryPending(givingUp *givingUp) error {
	s.alone, s.givingUp = true, givingUp
	defer func() { s.alone, s.givingUp = false, nil }()
	ctx, span := tracing.StartLinked(s.background(), tracing.SpanCleanup, s.traceParent, s.req.Attributes...)
	err := s.pay(ctx)
	tracing.End(span, err)
	return err
}

// pay goes on towards the goal that the cleanup is owed for.
func (s *sandbox) pay(ctx context.Context) error {
	quarantined := s.state() == states.Quarantined
	switch {
	case s.goal == states.Removed || quarantined && s.goal == states.RolledBack: // which is not rolled back, only removed
		return s.remove(ctx)
	case quarantined: // as at a stop
		return s.detach(ctx)
	case s.goal == states.RolledBack:
		return s.rollback(ctx, nil)
	case s.goal == states.Stopped:
		return s.stop(ctx)
	default:
		return fmt.Errorf("another release of podfsm recorded a pending cleanup of sandbox %q with the goal %q, which this release doesn't know; stop or remove the pod, or install that release again: %w",
			s.key.ID, s.goal, errdefs.ErrFailedPrecondition)
	}
}

func (s *sandbox) stopTimer() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopTimerLocked()
}

func (s *sandbox) stopTimerLocked() {
	if s.timer != nil {
		s.timer.Stop()
	}
}
