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

// Past says how much of a sandbox's past is on record.
type Past int

const (
	// Recorded is all of it.
	Recorded Past = iota
	// Lost is all but what was meant to last: the steps' own records are gone, and after a reboot what they made, too. What is
	// left of any step is looked for by name.
	Lost
	// LostReady is a Lost past of a sandbox that was ready.
	LostReady
)

// Describe makes the request of a sandbox again from the specification on record, which is nil when that can't be read.
type Describe func(key journal.Key, spec any) (Request, Past)

// Restore takes the sandboxes that the ledger knows into the engine, as they were. Nothing is done to them before
// [Engine.Resume]. What can't be understood is quarantined, never an error.
func (e *Engine) Restore(ctx context.Context, saved []journal.Sandbox, describe Describe) {
	for _, entry := range saved {
		s, err := e.restore(entry, describe)
		if err == nil {
			err = e.addRestored(s)
		}
		if err != nil {
			log.G(ctx).WithField(tracing.LogSandbox, entry.Key.ID).WithError(err).Error("sandbox: its place in the engine is taken; what the ledger says of it is left alone")
		}
	}
}

// restore rebuilds a sandbox. One whose records make that panic is quarantined without them.
func (e *Engine) restore(saved journal.Sandbox, describe Describe) (s *sandbox, err error) {
	rebuild := func() error {
		s, err = restored(e, saved, describe)
		return err
	}
	if err := Protect(rebuild); errdefs.IsInternal(err) {
		saved.Records = []journal.Record{{Kind: journal.Unreadable, Error: err.Error()}}
		return s, Protect(rebuild)
	}
	return s, err
}

// Replay is what the sandboxes of a ledger are by their records, for a reader without an engine that has the steps of its release. What
// can't be understood is shown as quarantined; Replay fails only for what a ledger can't hold.
func Replay(table *states.Table, saved []journal.Sandbox, describe Describe) ([]View, error) {
	e := &Engine{table: table, journal: unwritten{}, meter: unmetered{}}
	views := make([]View, 0, len(saved))
	for _, entry := range saved {
		s, err := e.restore(entry, describe)
		if err != nil {
			return nil, fmt.Errorf("failed to read the records of sandbox %q: %w", entry.Key, err)
		}
		views = append(views, s.view())
	}
	return views, nil
}

// unwritten is a journal for who only reads one.
type unwritten struct{}

func (unwritten) Append(context.Context, *journal.Record) error { return nil }

func (unwritten) Forget(context.Context, journal.Key) error { return nil }

// restored rebuilds a sandbox from its records.
func restored(e *Engine, saved journal.Sandbox, describe Describe) (*sandbox, error) {
	s := newSandbox(e, saved.Key, Request{})
	s.restored = true
	history := &history{sandbox: s}
	unreadable := history.replay(saved.Records)
	req, past := describe(saved.Key, history.spec)
	s.req = req
	if !history.accepted && !req.Created.IsZero() {
		s.created = req.Created.Round(0)
	}
	if past != Recorded {
		if err := history.lose(past); err != nil {
			return nil, err
		}
	}
	if history.spec == nil {
		unreadable = append(unreadable, errors.New("its specification is not on record"))
	}
	if history.assumed && e.observe != nil {
		s.aside(func() { e.observe(s.view()) })
	}
	if s.exit != nil {
		s.announceExit()
		if s.state() == states.Ready { // the kill came between the record of the exit and that of the move
			if err := s.move(s.background(), states.LosePause, s.exit.cause()); err != nil {
				return nil, err
			}
		}
	}
	s.failInterrupted()
	if reason := errors.Join(unreadable...); reason != nil {
		return s, s.quarantine(fmt.Errorf("the records of sandbox %q can't all be read: %w: %w", saved.Key.ID, reason, errdefs.ErrDataLoss))
	}
	return s, nil
}

// quarantine keeps a sandbox that isn't understood from anything but its removal. Every step counts as having acted, so that
// the removal looks for all of them.
func (s *sandbox) quarantine(reason error) error {
	s.touchAll()
	s.raise(Taken, Taken)
	if state := s.state(); state == states.Quarantined || state.Terminal() { // nothing is left of what has ended
		return nil
	}
	return s.move(s.background(), states.Quarantine, reason)
}

// failInterrupted ends the steps on demand that the daemon before was doing or undoing: after the creation, it did no others. The stop of
// the sandbox undoes them.
func (s *sandbox) failInterrupted() {
	if s.machine.Creating() {
		return
	}
	for _, rec := range s.steps {
		if rec.status != StepRunning && (rec.status != StepUndoing || s.state() != states.Ready) {
			continue
		}
		rec.status = StepFailed
		if rec.err == nil {
			rec.err = errRestarted
		}
	}
}

var errRestarted = fmt.Errorf("containerd was restarted before the step had ended: %w", errdefs.ErrAborted)

func (s *sandbox) touchAll() {
	for _, rec := range s.steps {
		rec.touched = true
	}
}

// Verdict is what becomes of a sandbox after a restart.
type Verdict int

const (
	// Keep goes on with it: what was ready is adopted if its process lives, what was stopping is stopped.
	Keep Verdict = iota
	// Gone keeps the record of a sandbox whose process and namespaces can't be there any more, after a reboot: what is left is
	// undone, and it stays stopped until it is removed.
	Gone
	// Discard removes it: nobody will ask for it again.
	Discard
)

// resumeParallel is how many sandboxes are undone at a time, or looked at again, for nobody who waits.
const resumeParallel = 8

// Resume takes up a restored sandbox. A sandbox that was ready is looked at before Resume returns; everything that has to be
// undone is undone afterwards, some sandboxes at a time. A request for a sandbox doesn't wait for its turn. A creation that a
// restart interrupted is rolled back in any case. An error means that nobody knows whether a ready sandbox's process lives: it
// stays as it is, and is looked at again.
func (e *Engine) Resume(ctx context.Context, key journal.Key, verdict Verdict) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) { s.resumeAs(ctx, verdict, reply) })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("sandbox %q is busy: %w", key.ID, context.Cause(ctx))
	}
}

func (s *sandbox) resumeAs(ctx context.Context, verdict Verdict, reply func(error)) {
	if s.state() == states.Ready && verdict == Keep {
		reply(s.recover(ctx, func(ctx context.Context) (Recovery, error) { return s.look(ctx, 1) }))
		return
	}
	reply(nil)
	if s.next(verdict) == nil {
		s.recovered(RecoveryKept, 0)
		return
	}
	s.inTurn(func() { s.goOn(verdict) })
}

// goOn does what a restored sandbox still needs, if nobody has asked for it meanwhile.
func (s *sandbox) goOn(verdict Verdict) {
	work := s.next(verdict)
	if work == nil {
		s.recovered(RecoveryKept, 0) // somebody was faster
		return
	}
	_ = s.recover(s.background(), func(ctx context.Context) (Recovery, error) {
		if err := work(ctx); err != nil {
			return RecoveryOwed, err
		}
		return became(s.state()), nil
	})
}

// became is the recovery that leads to a state.
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

// recover does what a restored sandbox needs, in a trace of its own that is linked to the sandbox's, and tells what became of it.
func (s *sandbox) recover(ctx context.Context, work func(context.Context) (Recovery, error)) error {
	begun, was := time.Now(), s.state()
	ctx, span := tracing.StartLinked(ctx, tracing.SpanRecover, s.traceParent, s.req.Attributes...)
	recovery, err := work(ctx)
	took := time.Since(begun)
	s.recovered(recovery, took)
	s.aside(func() {
		span.SetAttributes(tracing.Recovery.String(string(recovery)))
		tracing.End(span, err)
		entry := s.log(ctx).WithFields(log.Fields{
			tracing.LogFrom: was, tracing.LogTo: s.state(), tracing.LogOutcome: recovery, tracing.LogSeconds: took.Seconds(),
		})
		if recovery == RecoveryAdopted || err != nil { // who has asked, or the debt, logs the error
			entry.Debug("sandbox: taken up after the restart")
		} else {
			entry.Info("sandbox: taken up after the restart")
		}
	})
	return err
}

// recovered tells the meter what became of a restored sandbox.
func (s *sandbox) recovered(recovery Recovery, took time.Duration) {
	s.aside(func() { s.engine.meter.Recovered(recovery, took) })
}

// next is what a sandbox that isn't simply adopted still needs; nil for nothing.
func (s *sandbox) next(verdict Verdict) func(context.Context) error {
	switch state := s.state(); state {
	case states.Ready, states.NotReady, states.Stopping, states.Stopped:
		if verdict == Discard || s.goal == states.Removed {
			return s.remove
		}
		if state == states.Stopping || state != states.Stopped && verdict == Gone {
			return s.stop
		}
		return nil
	case states.Removing:
		return s.remove
	case states.CleanupOwed:
		if slices.Contains(goals, s.goal) {
			return s.pay
		}
		return s.nextUnknown(verdict)
	case states.Quarantined:
		if verdict == Discard {
			return s.remove
		}
		return nil
	case states.RolledBack, states.Removed:
		return nil
	default:
		if s.rollsBack() {
			return func(ctx context.Context) error { return s.rollback(ctx, errInterrupted) }
		}
		return s.nextUnknown(verdict)
	}
}

// nextUnknown is for a sandbox in a state of another release, or on the way to one: it waits for a request, unless nobody will make one.
func (s *sandbox) nextUnknown(verdict Verdict) func(context.Context) error {
	if verdict == Discard {
		return s.remove
	}
	return nil
}

var errInterrupted = fmt.Errorf("containerd was restarted before the sandbox was ready: %w", errdefs.ErrAborted)

// lookTimeout bounds one look at a process.
const lookTimeout = 5 * time.Second

// look makes sure that the process of a ready sandbox lives. When that can't be told it looks again later, as many attempts as it takes.
func (s *sandbox) look(ctx context.Context, attempts int) (Recovery, error) {
	err := s.adopt(ctx)
	if err == nil && s.state() == states.Ready {
		return RecoveryAdopted, nil
	}
	if err == nil {
		return RecoveryLostPause, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(s.engine.backoff(attempts), func() { s.inTurn(func() { s.lookAgain(attempts + 1) }) })
	return RecoveryUnknown, err
}

func (s *sandbox) lookAgain(attempts int) {
	if s.state() != states.Ready {
		return
	}
	err := s.recover(s.background(), func(ctx context.Context) (Recovery, error) { return s.look(ctx, attempts) })
	if err != nil {
		s.log(s.background()).WithError(err).Warn("sandbox: nobody knows whether its process lives")
	}
}

func (s *sandbox) adopt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	exit, err := s.engine.process.Exited(ctx, s.run(s.engine.process))
	if err != nil {
		return err
	}
	if exit != nil {
		s.pauseExited(*exit)
	}
	return nil
}

// unknownExit is containerd's exit code for a process that nobody saw ending.
const unknownExit = 255
