package lifecycle

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/log"

	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Meter is told how what the engine does goes, whether or not anybody traces it. It is called by many goroutines, and must return soon.
type Meter interface {
	// Acted is told of each try at doing, undoing or checking a step, and at ending its process.
	Acted(act Act, outcome Outcome)
	// Recovered is told what became of a sandbox that a restart has found, and how long it took once it was begun.
	Recovered(recovery Recovery, took time.Duration)
}

// Outcome is how an act went.
type Outcome string

const (
	OutcomeOK       Outcome = "ok"
	OutcomeSkipped  Outcome = "skipped" // there was nothing to do for this sandbox
	OutcomeError    Outcome = "error"
	OutcomeCanceled Outcome = "canceled" // the creation had failed before the step ended: pause had exited, or a request ended it
)

// outcomeOf is how an act went that has done something, or failed.
func outcomeOf(err error) Outcome {
	if err != nil {
		return OutcomeError
	}
	return OutcomeOK
}

// Recovery is what became of a sandbox that a restart has found.
type Recovery string

const (
	RecoveryAdopted    Recovery = "adopted"     // it is ready, and its process lives
	RecoveryLostPause  Recovery = "lost_pause"  // it was ready, and its process has ended meanwhile
	RecoveryKept       Recovery = "kept"        // there was nothing to do for it: it stays as it was, stopped or quarantined
	RecoveryStopped    Recovery = "stopped"     // what was left of it was undone, and it stays until it is removed
	RecoveryRolledBack Recovery = "rolled_back" // its creation had not come to an end
	RecoveryRemoved    Recovery = "removed"     // its removal had been begun, or nobody could know of it any more
	RecoveryOwed       Recovery = "owed"        // an undo failed, and is tried again
	RecoveryUnknown    Recovery = "unknown"     // nobody knows whether its process lives; it is looked at again
)

// Recoveries are all that there are.
func Recoveries() []Recovery {
	return []Recovery{RecoveryAdopted, RecoveryLostPause, RecoveryKept, RecoveryStopped, RecoveryRolledBack, RecoveryRemoved, RecoveryOwed, RecoveryUnknown}
}

// unmetered is a meter for who wants none.
type unmetered struct{}

func (unmetered) Acted(Act, Outcome) {}

func (unmetered) Recovered(Recovery, time.Duration) {}

// acted tells the meter how an act went, and the log. ctx is in the act's trace.
func (s *sandbox) acted(ctx context.Context, act Act, outcome Outcome) {
	s.aside(func() { s.engine.meter.Acted(act, outcome) })
	s.aside(func() { s.logAct(ctx, act, outcome) })
}

func (s *sandbox) logAct(ctx context.Context, act Act, outcome Outcome) {
	entry := s.log(ctx).WithFields(log.Fields{
		tracing.LogStep: act.Step, tracing.LogAct: act.Kind, tracing.LogOutcome: outcome, tracing.LogSeconds: act.Ended.Sub(act.Started).Seconds(),
	})
	if act.Err != nil {
		entry = entry.WithError(act.Err).WithField(tracing.LogErrorType, tracing.Class(act.Err))
	}
	switch {
	case outcome != OutcomeError:
		entry.Debug("sandbox: a step has ended")
	case act.Kind == ActCheck:
		entry.Warn("sandbox: is ready, but not as it should be")
	default:
		entry.Warn("sandbox: a step failed")
	}
}

// Census is a look at all sandboxes at one moment. It costs about a microsecond a sandbox, and asks nothing of the host. What this release
// has is in its maps even where nothing of it is counted; what another release has, only where there is some.
type Census struct {
	// States are how many sandboxes are in each state that is not terminal.
	States map[states.State]int
	// Acts are when what is under way was begun, the oldest of each step and kind; zero for none.
	Acts map[StepAct]time.Time
	// Debts are of the steps whose undo is owed.
	Debts map[states.Event]Debt
}

// StepAct is a kind of act on a step.
type StepAct struct {
	Step states.Event
	Kind ActKind
}

// Debt is how many sandboxes owe the undo of a step, and since when the first of them does.
type Debt struct {
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
	c := Census{States: map[states.State]int{}, Acts: map[StepAct]time.Time{}, Debts: map[states.Event]Debt{}}
	for _, state := range e.table.States() {
		if !state.Terminal() {
			c.States[state] = 0
		}
	}
	for _, step := range e.table.Steps() {
		c.Acts[StepAct{step, ActDo}], c.Acts[StepAct{step, ActUndo}] = time.Time{}, time.Time{}
		c.Debts[step] = Debt{}
	}
	c.Acts[StepAct{e.process.Declaration().Name, ActStop}] = time.Time{}
	return c
}

func (s *sandbox) count(c Census) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if state := s.state(); !state.Terminal() {
		c.States[state]++
	}
	for name, rec := range s.steps {
		if act := (StepAct{name, rec.acting}); rec.acting != "" && earlier(rec.actingSince, c.Acts[act]) {
			c.Acts[act] = rec.actingSince
		}
		if rec.status == StepOwed {
			debt := c.Debts[name]
			debt.Count++
			if earlier(rec.owedSince, debt.Since) {
				debt.Since = rec.owedSince
			}
			c.Debts[name] = debt
		}
	}
}

// earlier says whether a time is before another, which is zero for none.
func earlier(at, other time.Time) bool { return other.IsZero() || at.Before(other) }

// expected says that a cause of a rollback is no failure of a step, which the log has already, nor of anything else.
func expected(cause error) bool {
	var failed *StepError
	return cause == nil || errors.As(cause, &failed) || errors.Is(cause, errEnded) || errors.Is(cause, errInterrupted)
}
