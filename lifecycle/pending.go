package lifecycle

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// finishOrLeavePending does work that leads to goal. If the work fails, the cleanup is pending: its goal is kept, and it is retried later.
func (s *sandbox) finishOrLeavePending(ctx context.Context, goal states.State, work func() error) error {
	if err := Protect(work); err != nil {
		s.leavePending(ctx, goal, err)
		return err
	}
	if s.failedTries > 0 {
		s.logPanics(func() {
			s.log(ctx).WithField(tracing.LogAttempt, s.failedTries).Info("pending cleanup completed")
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.goal, s.failedTries, s.failing, s.nextTry, s.lastErr = "", 0, time.Time{}, time.Time{}, s.failure
	s.stopTimerLocked()
	return nil
}

// leavePending puts the pending cleanup on record and sets the time of the next try.
func (s *sandbox) leavePending(ctx context.Context, goal states.State, cause error) {
	record := &ledger.Record{Kind: ledger.CleanupPending, Goal: string(goal), Durable: true}
	err := s.setTransition(record, states.LeaveCleanupPending, cause)
	if err == nil {
		s.appendOrLog(ctx, record, nil)
		err = s.fire(ctx, states.LeaveCleanupPending, record.At, cause)
	}
	if err != nil {
		s.logPanics(func() { s.log(ctx).WithError(err).Error("failed to record pending cleanup") })
	}
	if goal != states.Stopped {
		s.engine.unname(s) // the retry of the pod's creation needs the name
	}
	now := time.Now()
	next := now.Add(s.engine.backoff(s.failedTries + 1))
	s.mu.Lock()
	if s.nextTry.After(now) && s.nextTry.Before(next) {
		next = s.nextTry // a failed request doesn't postpone the timer's retry
	}
	s.goal = goal
	s.leaveRestPending(goal, record.At)
	s.failedTries++
	if s.failing.IsZero() {
		s.failing = now
	}
	s.nextTry = next
	s.stopTimerLocked()
	wait := next.Sub(now)
	s.setTimerLocked(wait, s.retry)
	s.mu.Unlock()

	s.logPanics(func() {
		entry := s.log(ctx).WithError(cause).WithFields(log.Fields{
			tracing.LogGoal: goal, tracing.LogAttempt: s.failedTries, tracing.LogRetryIn: wait.Seconds(), tracing.LogErrorType: tracing.Class(cause),
		})
		if s.failedTries == 1 {
			entry.Warn("cleanup failed, retrying")
		} else {
			entry.Debug("cleanup failed, retrying")
		}
	})
}

// leaveRestPending marks the steps that the cleanup has not reached as pending. The cleanup of a
// stop has no such steps: what stays until the removal isn't pending. The caller holds mu, or is
// alone.
func (s *sandbox) leaveRestPending(goal states.State, at time.Time) {
	for _, rec := range s.steps {
		if goal != states.Stopped && rec.touched && rec.status != StepUndone && rec.status != StepCleanupPending {
			rec.leavePending(at, waitsFor("the others"))
		}
	}
}

func (s *sandbox) setGoal(goal states.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.goal = goal
}

// explained adds the remedy to the error of a failed cleanup.
func (s *sandbox) explained(err error) error {
	if err == nil || !s.pending() {
		return err
	}
	return fmt.Errorf("%w; `podfsm cleanups` on the node shows what is pending, retries it now or writes it off", err)
}

// retry handles the timer's event. Another try may have failed and set the timer again since the
// timer fired.
func (s *sandbox) retry() {
	if s.state() == states.CleanupOwed && !time.Now().Before(s.nextTry) {
		_ = s.retryPending(nil) // leavePending logs the failure and sets the timer again
	}
}

// retryPending retries the pending cleanup, in a trace of its own that is linked to the sandbox's.
func (s *sandbox) retryPending(givingUp *givingUp) error {
	s.unattended, s.givingUp = true, givingUp
	defer func() { s.unattended, s.givingUp = false, nil }()
	ctx, span := tracing.StartLinked(s.background(), tracing.SpanCleanup, s.traceParent, s.req.Attributes...)
	err := s.completeCleanup(ctx)
	tracing.End(span, err)
	return err
}

// completeCleanup goes on towards the goal of the pending cleanup.
func (s *sandbox) completeCleanup(ctx context.Context) error {
	quarantined := s.state() == states.Quarantined
	switch {
	case s.goal == states.Removed || quarantined && s.goal == states.RolledBack: // a quarantined sandbox can only be removed
		return s.remove(ctx)
	case quarantined: // as stop does
		return s.undoForStop(ctx)
	case s.goal == states.RolledBack:
		return s.rollBack(ctx, nil)
	case s.goal == states.Stopped:
		return s.stop(ctx)
	default:
		return fmt.Errorf("another release of podfsm recorded a pending cleanup of sandbox %q with the goal %q, which this release doesn't know; stop or remove the pod, or install that release again: %w",
			s.key.ID, s.goal, errdefs.ErrFailedPrecondition)
	}
}

// setTimerLocked posts event after wait, unless the engine is closed: the timer would keep the closed
// engine in memory. [Engine.Close] stops a timer that is set before.
func (s *sandbox) setTimerLocked(wait time.Duration, event func()) {
	if s.engine.isClosed() {
		return
	}
	s.timer = time.AfterFunc(wait, func() { s.postLimited(event) })
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
