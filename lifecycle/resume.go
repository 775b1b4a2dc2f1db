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

// resumeParallel is how many sandboxes are undone or examined at a time without a waiting caller.
const resumeParallel = 8

// Hold delays what the engine does without a waiting caller: the cleanups of restored sandboxes, and retries. Requests
// don't wait. It must be called before [Engine.Restore]. release ends the delay. It is idempotent.
func (e *Engine) Hold() (release func()) { return e.limit.hold() }

// Resume takes the recovery action for a restored sandbox. It examines a sandbox that was ready before it returns. What
// has to be undone is undone afterwards, some sandboxes at a time. A request for a sandbox doesn't wait for that. An
// error means that Resume can't determine whether a ready sandbox's process runs. The sandbox stays as it is, and is
// examined again later.
func (e *Engine) Resume(ctx context.Context, key ledger.Key) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) { s.resumeNow(ctx, reply) })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("sandbox %q is busy: %w", key.ID, context.Cause(ctx))
	}
}

func (s *sandbox) resumeNow(ctx context.Context, reply func(error)) {
	switch work := decide(s.evidence()).Work; work {
	case WorkAdopt:
		reply(s.recover(ctx, func(ctx context.Context) (Recovery, error) { return s.look(ctx, 1) }))
	case WorkKeep:
		reply(nil)
		s.recovered(RecoveryKept, 0)
	default:
		reply(nil)
		s.postLimited(s.goOn)
	}
}

// goOn does what a restored sandbox still needs: a caller may have stopped or removed it since.
func (s *sandbox) goOn() {
	work := s.workNow()
	if work == nil {
		s.recovered(RecoveryKept, 0) // a caller was faster
		return
	}
	_ = s.recover(s.background(), func(ctx context.Context) (Recovery, error) {
		if err := work(ctx); err != nil {
			return RecoveryPendingCleanup, err
		}
		return became(s.state()), nil
	})
}

// workNow returns the function that undoes the sandbox as far as necessary; nil for nothing.
func (s *sandbox) workNow() func(context.Context) error {
	switch decide(s.evidence()).Work {
	case WorkRollBack:
		return s.rollBackInterrupted
	case WorkStop:
		return s.stop
	case WorkRemove:
		return s.remove
	default:
		return nil
	}
}

func (s *sandbox) rollBackInterrupted(ctx context.Context) error {
	if s.state() == states.CleanupOwed {
		return s.rollBack(ctx, nil) // the cause is on record
	}
	return s.rollBack(ctx, errInterrupted)
}

// became returns the outcome of a recovery that ended in a state.
func became(state states.State) Recovery {
	switch state {
	case states.RolledBack:
		return RecoveryRolledBack
	case states.Removed:
		return RecoveryRemoved
	default:
		return RecoveryStopped
	}
}

// recover does work for a restored sandbox, in a trace of its own that is linked to the sandbox's. It reports the
// outcome.
func (s *sandbox) recover(ctx context.Context, work func(context.Context) (Recovery, error)) error {
	begun, was := time.Now(), s.state()
	ctx, span := tracing.StartLinked(ctx, tracing.SpanRecover, s.traceParent, s.req.Attributes...)
	recovery, err := work(ctx)
	took := time.Since(begun)
	s.recovered(recovery, took)
	s.logPanics(func() {
		span.SetAttributes(tracing.Recovery.String(string(recovery)))
		tracing.End(span, err)
		entry := s.log(ctx).WithFields(log.Fields{
			tracing.LogFrom: was, tracing.LogTo: s.state(), tracing.LogOutcome: recovery, tracing.LogSeconds: took.Seconds(),
		})
		if recovery == RecoveryAdopted || err != nil { // the caller or the retry logs the error
			entry.Debug("sandbox recovered after the restart")
		} else {
			entry.Info("sandbox recovered after the restart")
		}
	})
	return err
}

// recovered notes the outcome of a recovery, and has the meter count it.
func (s *sandbox) recovered(recovery Recovery, took time.Duration) {
	s.mu.Lock()
	s.recovery = recovery
	s.mu.Unlock()
	s.logPanics(func() { s.engine.meter.Recovered(recovery, took) })
}

var errInterrupted = fmt.Errorf("containerd was restarted before the sandbox was ready: %w", errdefs.ErrAborted)

// lookTimeout bounds one look at a process.
const lookTimeout = 5 * time.Second

// look checks whether the process of a ready sandbox runs. If look can't determine that, it retries later, without a
// limit.
func (s *sandbox) look(ctx context.Context, tries int) (Recovery, error) {
	err := s.adopt(ctx)
	if err == nil && s.state() == states.Ready {
		return RecoveryAdopted, nil
	}
	if err == nil {
		return RecoveryLostPause, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setTimerLocked(s.engine.backoff(tries), func() { s.lookAgain(tries + 1) })
	return RecoveryUnknown, err
}

func (s *sandbox) lookAgain(tries int) {
	if s.state() != states.Ready {
		return
	}
	err := s.recover(s.background(), func(ctx context.Context) (Recovery, error) { return s.look(ctx, tries) })
	if err != nil {
		s.log(s.background()).WithError(err).Warn("cannot determine whether pause is running, will retry")
	}
}

func (s *sandbox) adopt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	exit, err := s.engine.process.Exited(ctx, s.newRun(s.engine.process))
	if err != nil {
		return err
	}
	if exit != nil {
		s.pauseExited(*exit)
	}
	return nil
}
