package lifecycle

import (
	"context"

	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// This file has the four ways in which a sandbox ends. Recovery calls those that [decide] names.
//
//	function  caller                       undoes                          ends in
//	rollBack  Engine.Start, if it fails    every step, so the process too  RolledBack, forgotten
//	halt      Engine.Halt                  no step, but ends the process   Stopping
//	stop      Engine.Stop                  the process, and steps AtStop   Stopped
//	remove    Engine.Remove                the process, then every step    Removed, forgotten
//
// If a sandbox was never ready, stop and remove roll it back. If an undo fails, the sandbox becomes
// CleanupOwed, and [sandbox.completeCleanup] goes on towards the same end.

// rollBack undoes a creation that failed because of cause. If an undo fails, the cleanup is
// pending, and rollBack returns its error.
func (s *sandbox) rollBack(ctx context.Context, cause error) (err error) {
	ctx, span := tracing.Start(ctx, tracing.SpanRollback, s.req.Attributes...)
	defer func() { tracing.End(span, err) }()

	if err := s.moveOnce(ctx, states.RollBack, states.RollingBack, cause); err != nil {
		return err
	}
	if cause != nil {
		s.mu.Lock()
		s.failure = cause
		s.mu.Unlock()
	}
	return s.finishOrLeavePending(ctx, states.RolledBack, func() error {
		if err := s.undoSteps(ctx, everyStep); err != nil {
			return err
		}
		return s.forget(ctx, states.FinishRollback)
	})
}

// moveOnce moves to state by event, unless an earlier daemon did.
func (s *sandbox) moveOnce(ctx context.Context, event states.Event, state states.State, cause error) error {
	if s.state() == state {
		return nil
	}
	return s.move(ctx, event, cause)
}

// neverReady says that the sandbox was never ready. Its end is a rollback.
func (s *sandbox) neverReady() bool { return s.machine.Creating() || s.state() == states.RollingBack }

// halt ends the sandbox's process.
func (s *sandbox) halt(ctx context.Context) error {
	switch state := s.state(); {
	case state == states.Stopping:
	case state == states.CleanupOwed, !s.machine.Can(states.Stop):
		return nil // there is no process, or the rollback ends it
	default:
		if err := s.move(ctx, states.Stop, nil); err != nil {
			return err
		}
	}
	return s.finishOrLeavePending(ctx, states.Stopped, func() error { return s.endProcess(ctx) })
}

// stop ends the process and undoes what a stopped sandbox must not have.
func (s *sandbox) stop(ctx context.Context) error {
	switch s.state() {
	case states.Stopped, states.Removing, states.RolledBack, states.Removed:
		return nil
	case states.CleanupOwed, states.Stopping:
		if s.goal == states.RolledBack || s.goal == states.Removed {
			return s.completeCleanup(ctx)
		}
	case states.Ready, states.NotReady:
	case states.Quarantined:
		return s.undoForStop(ctx) // it stays quarantined, but the kubelet removes only a sandbox that it could stop
	default:
		if s.neverReady() {
			return s.rollBack(ctx, errEnded)
		}
	}
	return s.stopTowards(ctx, states.Stopped)
}

// stopTowards stops the sandbox on the way to goal. If the stop fails, goal is the goal of the
// pending cleanup, also after a kill.
func (s *sandbox) stopTowards(ctx context.Context, goal states.State) error {
	s.setGoal(goal)
	if err := s.moveOnce(ctx, states.Stop, states.Stopping, nil); err != nil {
		return err
	}
	return s.finishOrLeavePending(ctx, goal, func() error {
		if err := s.undoForStop(ctx); err != nil {
			return err
		}
		return s.move(ctx, states.FinishStop, nil)
	})
}

// undoForStop ends the process and undoes what a stopped sandbox must not have.
func (s *sandbox) undoForStop(ctx context.Context) error {
	if err := s.endProcess(ctx); err != nil {
		return err
	}
	return s.undoSteps(ctx, func(d Declaration) bool { return d.AtStop })
}

// remove undoes everything and forgets the sandbox.
func (s *sandbox) remove(ctx context.Context) error {
	switch s.state() {
	case states.Ready, states.NotReady, states.Stopping:
		if err := s.stopTowards(ctx, states.Removed); err != nil {
			return err
		}
	case states.CleanupOwed:
		if s.goal == states.RolledBack {
			return s.completeCleanup(ctx)
		}
	case states.Stopped, states.Quarantined, states.Removing:
	case states.RolledBack, states.Removed:
		return nil
	default:
		if s.neverReady() {
			return s.rollBack(ctx, errEnded)
		}
		if err := s.stopTowards(ctx, states.Removed); err != nil {
			return err
		}
	}
	if err := s.moveOnce(ctx, states.Remove, states.Removing, nil); err != nil {
		return err
	}
	return s.finishOrLeavePending(ctx, states.Removed, func() error {
		if err := s.endProcess(ctx); err != nil {
			return err
		}
		if err := s.undoSteps(ctx, everyStep); err != nil {
			return err
		}
		if s.unattended {
			s.engine.removalCompleted(ctx, s.key)
		}
		return s.forget(ctx, states.FinishRemove)
	})
}
