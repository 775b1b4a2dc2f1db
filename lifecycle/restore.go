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

// Describe makes the request of a sandbox again from the specification on record, which is nil when that can't be read.
type Describe func(key journal.Key, spec any) Request

// dossier is what a restart has found of a sandbox.
type dossier struct {
	outside     Outside
	unrecorded  bool
	unspecified bool
	onlyLasting bool
	whole       bool
	broken      bool
	unsure      error                // why the host has not shown whether the sandbox lives; nil where it has
	found       map[states.Event]any // results that the host shows, where records are missing; nil where it doesn't show all of them
}

// Restore takes the sandboxes that the ledger knows into the engine, as they were, and decides what becomes of each. [Engine.Resume]
// does it. Where records are missing, Restore looks at the host. What can't be understood is quarantined, never an error.
func (e *Engine) Restore(ctx context.Context, saved []journal.Sandbox, describe Describe, outside func(journal.Sandbox) Outside) map[journal.Key]Action {
	restored := make([]*sandbox, 0, len(saved))
	for _, entry := range saved {
		s, err := e.restore(entry, describe)
		if err != nil {
			log.G(ctx).WithField(tracing.LogSandbox, entry.Key.ID).WithError(err).Error("sandbox: it can't be restored; what the ledger says of it is left alone")
			continue
		}
		for _, what := range s.unread {
			s.log(ctx).Warnf("sandbox: kept without knowing it: %s", what)
		}
		s.dossier.outside = outside(entry)
		restored = append(restored, s)
	}
	findAll(ctx, restored)
	actions := make(map[journal.Key]Action, len(restored))
	for _, s := range restored {
		if action, err := e.takeIn(s); err != nil {
			log.G(ctx).WithField(tracing.LogSandbox, s.key.ID).WithError(err).Error("sandbox: its place in the engine is taken; what the ledger says of it is left alone")
		} else {
			actions[s.key] = action
		}
	}
	return actions
}

// takeIn decides what becomes of a sandbox, and adds it to the engine.
func (e *Engine) takeIn(s *sandbox) (Action, error) {
	action := decide(s.evidence())
	if action.Work == WorkDrop {
		return action, nil
	}
	if err := Protect(func() error { return s.mark(action) }); err != nil {
		return action, err
	}
	return action, e.addRestored(s)
}

// evidence is what recovery knows of the sandbox now.
func (s *sandbox) evidence() evidence {
	d := s.dossier
	return evidence{
		Outside:    d.outside,
		Unrecorded: d.unrecorded, Unspecified: d.unspecified, OnlyLasting: d.onlyLasting, Whole: d.whole, Broken: d.broken,
		State: s.state(), Goal: s.goal, Creating: s.machine.Creating(), Claim: Claim(s.claim.Load()), Exited: s.exit != nil,
		Found: d.found != nil, Unsure: d.unsure != nil,
	}
}

// mark brings the sandbox to where the action begins, and tells whoever observes it.
func (s *sandbox) mark(a Action) error {
	if a.Lost {
		s.lose()
	}
	if raised, _ := s.raise(a.Claim, Taken); raised && !s.dossier.unrecorded {
		s.record(s.background(), &journal.Record{Kind: journal.Claimed, Claim: a.Claim.String()}, nil)
	}
	switch a.State {
	case states.Ready:
		return s.observed(s.rebuild())
	case states.NotReady:
		return s.loseReady()
	case states.Quarantined:
		if unsure := s.dossier.unsure; unsure != nil {
			return s.quarantine(fmt.Errorf("records of sandbox %q are lost, and the host did not show in time whether the sandbox runs: %w: %w", s.key.ID, unsure, errdefs.ErrDataLoss))
		}
		return s.quarantine(fmt.Errorf("this release can't read the specification of sandbox %q: %w", s.key.ID, errdefs.ErrDataLoss))
	default:
		return nil
	}
}

// lose makes up for records that are gone: every step may have acted, and the process is no more.
func (s *sandbox) lose() {
	s.touchAll()
	if s.exit == nil {
		s.setExit(Exit{Code: unknownExit, At: time.Now()})
	}
	s.announceExit()
}

// loseReady moves a sandbox that was ready to NotReady, also where no record says that it was ready.
func (s *sandbox) loseReady() error {
	if s.state() == states.Ready {
		return s.move(s.background(), states.LosePause, s.exit.cause())
	}
	return s.observed(s.assume(&journal.Record{
		Kind: journal.Moved, From: string(states.Ready), Event: string(states.LosePause), State: string(states.NotReady), At: s.exit.At,
	}, nil))
}

// observed tells the observer of a transition that was assumed.
func (s *sandbox) observed(err error) error {
	if err == nil && s.engine.observe != nil {
		s.aside(func() { s.engine.observe(s.view()) })
	}
	return err
}

// assume puts a record in the place of one that is lost, and folds it as the next restart will.
func (s *sandbox) assume(r *journal.Record, data any) error {
	r.Nth = s.seq + 1
	s.record(s.background(), r, data)
	return (&history{sandbox: s}).fold(r)
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
		if err == nil && s.dossier.unspecified {
			err = s.mark(Action{State: states.Quarantined})
		}
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
	history := &history{sandbox: s}
	unreadable := history.replay(saved.Records)
	s.restored, s.dossier = true, dossier{
		unrecorded: len(saved.Records) == 0, unspecified: history.spec == nil, onlyLasting: onlyLasting(saved),
	}
	s.dossier.whole, s.dossier.broken = joined(saved)
	s.req = describe(saved.Key, history.spec)
	if !history.accepted && !s.req.Created.IsZero() {
		s.created = s.req.Created.Round(0)
	}
	if s.exit != nil {
		s.announceExit()
		if s.state() == states.Ready { // the kill came between the record of the exit and that of the move
			if err := s.move(s.background(), states.LosePause, s.exit.cause()); err != nil {
				return nil, err
			}
		}
	}
	s.markInterrupted()
	s.failInterrupted()
	if reason := errors.Join(unreadable...); reason != nil {
		return s, s.quarantine(fmt.Errorf("the records of sandbox %q can't all be read: %w: %w", saved.Key.ID, reason, errdefs.ErrDataLoss))
	}
	return s, nil
}

// onlyLasting says that the log in the state directory is gone, and with it all that the steps had recorded there.
func onlyLasting(s journal.Sandbox) bool {
	return !slices.ContainsFunc(s.Records, func(r journal.Record) bool { return !r.Durable })
}

// joined says whether all that led a sandbox to Ready is on record: each transition from [states.New] on begins where the one before it
// ended. broken says that a transition doesn't: records before it are missing.
func joined(s journal.Sandbox) (whole, broken bool) {
	at := states.New
	for _, r := range s.Records {
		switch {
		case r.Kind != journal.Done || r.From == "":
		case r.From == string(at):
			at = states.State(r.State)
		default:
			broken = true
		}
	}
	return at == states.Ready, broken
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

// markInterrupted notes which undos the daemon before was making: each may have succeeded without a record of that.
func (s *sandbox) markInterrupted() {
	for _, rec := range s.steps {
		rec.interrupted = rec.interrupted || rec.status == StepUndoing
	}
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

// resumeParallel is how many sandboxes are undone at a time, or looked at again, for nobody who waits.
const resumeParallel = 8

// Hold keeps back what the engine does for no caller: the cleanups of restored sandboxes, and retries. Requests don't wait. It must be
// called before [Engine.Restore]. release ends it; all its calls but the first do nothing.
func (e *Engine) Hold() (release func()) { return e.turns.hold() }

// Resume takes up a restored sandbox. A sandbox that was ready is looked at before Resume returns; everything that has to be
// undone is undone afterwards, some sandboxes at a time. A request for a sandbox doesn't wait for its turn. An error means that nobody
// knows whether a ready sandbox's process lives: it stays as it is, and is looked at again.
func (e *Engine) Resume(ctx context.Context, key journal.Key) error {
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
		s.inTurn(s.goOn)
	}
}

// goOn does what a restored sandbox needs by now: somebody may have asked for it meanwhile.
func (s *sandbox) goOn() {
	work := s.workNow()
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

// workNow is what undoes the sandbox as far as that has to be; nil for nothing.
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
		return s.rollback(ctx, nil) // why it was begun is on record
	}
	return s.rollback(ctx, errInterrupted)
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
