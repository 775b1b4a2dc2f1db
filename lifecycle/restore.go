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

// Describe makes a sandbox's request from the specification on record, which is nil if it can't be read.
type Describe func(key ledger.Key, spec any) Request

// findings are what a restart finds of a sandbox. They are a part of its recovery evidence.
type findings struct {
	outside     Outside
	unrecorded  bool
	unspecified bool
	onlyLasting bool
	whole       bool
	broken      bool
	unsure      error                // why the host doesn't show whether the sandbox runs; nil if it does
	found       map[states.Event]any // the results that the host shows; nil unless it shows all of them
}

// Restore adds the ledger's sandboxes to the engine, as they were, and decides on an action for each. [Engine.Resume]
// takes the action. If records are missing, Restore examines the host. It quarantines a sandbox that it doesn't
// understand, which is never an error.
func (e *Engine) Restore(ctx context.Context, saved []ledger.Sandbox, describe Describe, outside func(ledger.Sandbox) Outside) map[ledger.Key]Action {
	restored := make([]*sandbox, 0, len(saved))
	for _, entry := range saved {
		s, err := e.restore(entry, describe)
		if err != nil {
			log.G(ctx).WithField(tracing.LogSandbox, entry.Key.ID).WithError(err).Error("failed to restore sandbox, its records are kept")
			continue
		}
		for _, what := range s.unread {
			s.log(ctx).Warnf("sandbox kept, this release does not know all of its records: %s", what)
		}
		s.findings.outside = outside(entry)
		restored = append(restored, s)
	}
	findAll(ctx, restored)
	actions := make(map[ledger.Key]Action, len(restored))
	for _, s := range restored {
		if action, err := e.takeIn(s); err != nil {
			log.G(ctx).WithField(tracing.LogSandbox, s.key.ID).WithError(err).Error("failed to restore sandbox, its id or name is taken, its records are kept")
		} else {
			actions[s.key] = action
		}
	}
	return actions
}

// takeIn decides on the recovery action for a sandbox, and adds it to the engine.
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

// evidence returns the recovery evidence of the sandbox as of now.
func (s *sandbox) evidence() evidence {
	d := s.findings
	return evidence{
		Outside:    d.outside,
		Unrecorded: d.unrecorded, Unspecified: d.unspecified, OnlyLasting: d.onlyLasting, Whole: d.whole, Broken: d.broken,
		State: s.state(), Goal: s.goal, Creating: s.machine.Creating(), Claim: Claim(s.claim.Load()), Exited: s.exit != nil,
		Found: d.found != nil, Unsure: d.unsure != nil,
	}
}

// mark moves the sandbox to the state in which the action begins, and tells the observer.
func (s *sandbox) mark(a Action) error {
	if a.AssumeActed {
		s.assumeActed()
	}
	if raised, _ := s.raise(a.Claim, Taken); raised && !s.findings.unrecorded {
		s.appendOrLog(s.background(), &ledger.Record{Kind: ledger.Claimed, Claim: a.Claim.String()}, nil)
	}
	switch a.State {
	case states.Ready:
		return s.observed(s.rebuild())
	case states.NotReady:
		return s.moveToNotReady()
	case states.Quarantined:
		if unsure := s.findings.unsure; unsure != nil {
			return s.quarantine(fmt.Errorf("records of sandbox %q are lost, and the host did not show in time whether the sandbox runs: %w: %w", s.key.ID, unsure, errdefs.ErrDataLoss))
		}
		return s.quarantine(fmt.Errorf("this release can't read the specification of sandbox %q: %w", s.key.ID, errdefs.ErrDataLoss))
	default:
		return nil
	}
}

// assumeActed makes up for missing records: it assumes that every step acted, and that the process has ended.
func (s *sandbox) assumeActed() {
	s.touchAll()
	if s.exit == nil {
		s.setExit(Exit{Code: unknownExit, At: time.Now()})
	}
	s.announceExit()
}

// moveToNotReady moves a sandbox that was ready to NotReady, also if no record says that it was ready.
func (s *sandbox) moveToNotReady() error {
	if s.state() == states.Ready {
		return s.move(s.background(), states.LosePause, s.exit.cause())
	}
	return s.observed(s.assume(&ledger.Record{
		Kind: ledger.Moved, From: string(states.Ready), Event: string(states.LosePause), State: string(states.NotReady), At: s.exit.At,
	}, nil))
}

// observed tells the observer of an assumed transition.
func (s *sandbox) observed(err error) error {
	if err == nil && s.engine.observe != nil {
		s.logPanics(func() { s.engine.observe(s.view()) })
	}
	return err
}

// assume writes a record in the place of a missing one, and folds it as the next restart will.
func (s *sandbox) assume(r *ledger.Record, data any) error {
	r.Nth = s.seq + 1
	s.appendOrLog(s.background(), r, data)
	return (&history{sandbox: s}).fold(r)
}

// restore rebuilds a sandbox. If its records cause a panic, it is quarantined without them.
func (e *Engine) restore(saved ledger.Sandbox, describe Describe) (s *sandbox, err error) {
	rebuild := func() error {
		s, err = restored(e, saved, describe)
		return err
	}
	if err := Protect(rebuild); errdefs.IsInternal(err) {
		saved.Records = []ledger.Record{{Kind: ledger.Unreadable, Error: err.Error()}}
		return s, Protect(rebuild)
	}
	return s, err
}

// Replay returns the sandboxes of a ledger by their records, for a reader without an engine. A sandbox that it doesn't
// understand is shown as quarantined. Replay fails only for what a ledger can't hold.
func Replay(table *states.Table, saved []ledger.Sandbox, describe Describe) ([]View, error) {
	e := &Engine{table: table, ledger: unwritten{}, meter: unmetered{}}
	views := make([]View, 0, len(saved))
	for _, entry := range saved {
		s, err := e.restore(entry, describe)
		if err == nil && s.findings.unspecified {
			err = s.mark(Action{State: states.Quarantined})
		}
		if err != nil {
			return nil, fmt.Errorf("failed to read the records of sandbox %q: %w", entry.Key, err)
		}
		views = append(views, s.view())
	}
	return views, nil
}

// unwritten is a ledger for a reader: it writes nothing.
type unwritten struct{}

func (unwritten) Append(context.Context, *ledger.Record) error { return nil }

func (unwritten) Forget(context.Context, ledger.Key) error { return nil }

// restored rebuilds a sandbox from its records.
func restored(e *Engine, saved ledger.Sandbox, describe Describe) (*sandbox, error) {
	s := newSandbox(e, saved.Key, Request{})
	history := &history{sandbox: s}
	unreadable := history.replay(saved.Records)
	s.recovery = RecoveryWaiting
	s.restored, s.findings = true, findings{
		unrecorded: len(saved.Records) == 0, unspecified: history.spec == nil, onlyLasting: onlyLasting(saved),
	}
	s.findings.whole, s.findings.broken = joined(saved)
	s.req = describe(saved.Key, history.spec)
	if !history.accepted && !s.req.Created.IsZero() {
		s.created = s.req.Created.Round(0)
	}
	if s.exit != nil {
		s.announceExit()
		if s.state() == states.Ready { // a kill between the records of the exit and of the move
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

// onlyLasting says that the log in the state directory is gone, and with it the steps' records.
func onlyLasting(s ledger.Sandbox) bool {
	return !slices.ContainsFunc(s.Records, func(r ledger.Record) bool { return !r.Durable })
}

// joined says whether all transitions up to Ready are on record: each one from [states.New] on begins where the one
// before it ended. broken says that some transition doesn't, so that records before it are missing.
func joined(s ledger.Sandbox) (whole, broken bool) {
	at := states.New
	for _, r := range s.Records {
		switch {
		case r.Kind != ledger.Done || r.From == "":
		case r.From == string(at):
			at = states.State(r.State)
		default:
			broken = true
		}
	}
	return at == states.Ready, broken
}

// quarantine allows nothing but the removal of a sandbox that podfsm doesn't understand. It assumes that every step
// acted, so that the removal undoes all of them.
func (s *sandbox) quarantine(reason error) error {
	s.touchAll()
	s.raise(Taken, Taken)
	if state := s.state(); state == states.Quarantined || state.Terminal() { // nothing is left of a terminal sandbox
		return nil
	}
	return s.move(s.background(), states.Quarantine, reason)
}

// markInterrupted marks the undos that the last daemon had under way. Each may have succeeded without a record.
func (s *sandbox) markInterrupted() {
	for _, rec := range s.steps {
		rec.interrupted = rec.interrupted || rec.status == StepUndoing
	}
}

// failInterrupted fails the steps that the last daemon was doing or undoing after the creation: those on demand. The
// stop of the sandbox undoes them.
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
