package lifecycle

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Meter counts what the engine does. Many goroutines call its methods, which must not block.
type Meter interface {
	// Tried is called after each try of a step, an undo or a check, and of the end of pause.
	Tried(try Try, outcome Outcome)
	// Recovered is called with the outcome of a sandbox's recovery after a restart. took doesn't
	// include the wait before the recovery.
	Recovered(recovery Recovery, took time.Duration)
}

// Outcome is the outcome of a try.
type Outcome string

const (
	OutcomeOK       Outcome = "ok"
	OutcomeSkipped  Outcome = "skipped" // this sandbox doesn't need the step
	OutcomeError    Outcome = "error"
	OutcomeCanceled Outcome = "canceled" // pause exited, or a request ended the creation, before the step ended
)

// outcomeOf returns the outcome of a try that ended with err.
func outcomeOf(err error) Outcome {
	if err != nil {
		return OutcomeError
	}
	return OutcomeOK
}

// Recovery is the outcome of a sandbox's recovery after a restart.
type Recovery string

const (
	RecoveryAdopted    Recovery = "adopted"     // ready, and its process runs
	RecoveryLostPause  Recovery = "lost_pause"  // its process exited while the daemon was down
	RecoveryKept       Recovery = "kept"        // left as it was, stopped or quarantined
	RecoveryStopped    Recovery = "stopped"     // what was left of it was undone; listed until it is removed
	RecoveryRolledBack Recovery = "rolled_back" // its creation was interrupted
	RecoveryRemoved    Recovery = "removed"     // its removal was interrupted, or no caller knows the sandbox

	RecoveryPendingCleanup Recovery = "pending_cleanup" // an undo failed, will retry
	RecoveryUnknown        Recovery = "unknown"         // cannot determine whether its process runs, will retry

	// RecoveryWaiting is not an outcome: the recovery has not begun.
	RecoveryWaiting Recovery = "waiting"
)

// Recoveries are all outcomes.
func Recoveries() []Recovery {
	return []Recovery{RecoveryAdopted, RecoveryLostPause, RecoveryKept, RecoveryStopped, RecoveryRolledBack, RecoveryRemoved, RecoveryPendingCleanup, RecoveryUnknown}
}

// unmetered is a Meter that counts nothing.
type unmetered struct{}

func (unmetered) Tried(Try, Outcome) {}

func (unmetered) Recovered(Recovery, time.Duration) {}

// tried counts and logs a try. ctx is in the try's trace.
func (s *sandbox) tried(ctx context.Context, try Try, outcome Outcome) {
	s.logPanics(func() { s.engine.meter.Tried(try, outcome) })
	s.logPanics(func() { s.logTry(ctx, try, outcome) })
}

func (s *sandbox) logTry(ctx context.Context, try Try, outcome Outcome) {
	entry := s.log(ctx).WithFields(log.Fields{
		tracing.LogStep: try.Step, tracing.LogOperation: try.Operation, tracing.LogOutcome: outcome, tracing.LogSeconds: try.Ended.Sub(try.Started).Seconds(),
	})
	if try.Err != nil {
		entry = entry.WithError(try.Err).WithField(tracing.LogErrorType, tracing.Class(try.Err))
	}
	switch {
	case outcome != OutcomeError:
		entry.Debug("step ended")
	case try.Operation == OperationCheck:
		entry.Warn("CNI CHECK failed, sandbox left running")
	default:
		entry.Warn("step failed")
	}
}

// Census counts all sandboxes at one moment. It costs about a microsecond per sandbox, and reads
// nothing from the host. Its maps always have the states and steps of this release, also with a
// count of zero. They have those of another release only if a sandbox has them.
type Census struct {
	// States counts the sandboxes in each state that is not terminal.
	States map[states.State]int
	// UnderWay has the start of the oldest try under way, per step and operation; zero for none.
	UnderWay map[StepOperation]time.Time
	// Pending has the pending cleanups per step.
	Pending map[states.Event]PendingCleanups
	// Recovering counts the restored sandboxes whose recovery is not complete, by what the recovery
	// waits for.
	Recovering map[Recovery]int
}

// StepOperation is an operation on a step.
type StepOperation struct {
	Step      states.Event
	Operation Operation
}

// PendingCleanups has the number of sandboxes with a pending cleanup of a step, and the time of the
// earliest failure.
type PendingCleanups struct {
	Count int
	Since time.Time
}

// Census counts the sandboxes.
func (e *Engine) Census() Census {
	c := e.emptyCensus()
	for _, s := range e.all() {
		s.count(c)
	}
	return c
}

func (e *Engine) emptyCensus() Census {
	c := Census{
		States: map[states.State]int{}, UnderWay: map[StepOperation]time.Time{}, Pending: map[states.Event]PendingCleanups{},
		Recovering: map[Recovery]int{RecoveryWaiting: 0, RecoveryPendingCleanup: 0, RecoveryUnknown: 0},
	}
	for _, state := range e.table.States() {
		if !state.Terminal() {
			c.States[state] = 0
		}
	}
	for _, step := range e.table.Steps() {
		c.UnderWay[StepOperation{step, OperationDo}], c.UnderWay[StepOperation{step, OperationUndo}] = time.Time{}, time.Time{}
		c.Pending[step] = PendingCleanups{}
	}
	c.UnderWay[StepOperation{e.process.Declaration().Name, OperationStop}] = time.Time{}
	return c
}

func (s *sandbox) count(c Census) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if state := s.state(); !state.Terminal() {
		c.States[state]++
	}
	for name, rec := range s.steps {
		if key := (StepOperation{name, rec.operation}); rec.operation != "" && earlier(rec.operationSince, c.UnderWay[key]) {
			c.UnderWay[key] = rec.operationSince
		}
		if rec.status == StepCleanupPending {
			pending := c.Pending[name]
			pending.Count++
			if earlier(rec.pendingSince, pending.Since) {
				pending.Since = rec.pendingSince
			}
			c.Pending[name] = pending
		}
	}
	if s.recovering() {
		c.Recovering[s.recovery]++
	}
}

// recovering says whether the sandbox's recovery is not complete. The recovery is complete once its
// pending cleanup is. The caller holds s.mu.
func (s *sandbox) recovering() bool {
	switch s.recovery {
	case RecoveryWaiting, RecoveryUnknown:
		return true
	case RecoveryPendingCleanup:
		return s.state() == states.CleanupOwed || slices.ContainsFunc(slices.Collect(maps.Values(s.steps)), func(rec *stepState) bool { return rec.status == StepCleanupPending })
	default:
		return false
	}
}

// earlier says whether at is before other. A zero other counts as later.
func earlier(at, other time.Time) bool { return other.IsZero() || at.Before(other) }

// expected says whether the cause of a transition needs no warning: no failure caused it, or the
// log has the failure already.
func expected(cause error) bool {
	var failed *StepError
	return cause == nil || errors.As(cause, &failed) || errors.Is(cause, errEnded) || errors.Is(cause, errInterrupted)
}
