package lifecycle

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/typeurl/v2"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// history folds records into a sandbox. Its state is what the recorded transitions say, never what this release's steps would have led to.
type history struct {
	*sandbox
	accepted bool // that is on record
	spec     any
}

// replay folds all records, and returns why some of them can't be read.
func (h *history) replay(records []journal.Record) (unreadable []error) {
	for i := range records {
		if err := h.fold(&records[i]); err != nil {
			unreadable = append(unreadable, fmt.Errorf("record %d (%s %s): %w", records[i].Seq, records[i].Kind, records[i].Step, err))
		}
	}
	return unreadable
}

func (h *history) fold(record *journal.Record) error {
	if record.Kind == journal.Unreadable {
		return errors.New(record.Error)
	}
	data, err := h.unpack(record)
	if err != nil {
		return err
	}
	if record.Kind == journal.Begun {
		return h.foldSpec(record, data)
	}
	if record.Step != "" {
		h.foldStep(record, data)
	}
	if record.State != "" {
		if err := h.enter(record); err != nil {
			return err
		}
	}
	switch record.Kind {
	case journal.Intent, journal.Noted, journal.Done, journal.UndoIntent, journal.UndoFailed, journal.Undone:
		return present(record.Step, "step")
	case journal.Moved:
		return h.foldMove(record)
	case journal.Owed:
		return h.foldDebt(record)
	case journal.Claimed:
		return h.foldClaim(record)
	case journal.Exited:
		return h.foldExit(record, data)
	default:
		h.unread = append(h.unread, fmt.Sprintf("record %d of the kind %q, written by %s", record.Seq, record.Kind, releaseName(record.Release)))
		return nil
	}
}

func present(field, what string) error {
	if field == "" {
		return fmt.Errorf("it names no %s", what)
	}
	return nil
}

func (h *history) foldSpec(record *journal.Record, data any) error {
	h.accepted, h.traceParent = true, record.TraceParent
	h.created, h.entered = record.At, record.At
	if _, unknown := data.(*Unknown); unknown {
		return nil // which is kept as unread
	}
	h.spec = data
	return nil
}

// foldStep keeps what a record says of a step, which may be another release's.
func (h *history) foldStep(record *journal.Record, data any) {
	name := states.Event(record.Step)
	rec, ok := h.steps[name]
	if !ok {
		rec = &stepRecord{status: StepPending}
		h.steps[name] = rec
	}
	switch record.Kind {
	case journal.Intent:
		h.begin(name)
		rec.interrupted = false
		rec.plan, rec.touched, rec.status, rec.started, rec.ended, rec.err = data, true, StepRunning, record.At, time.Time{}, nil
		rec.release, rec.atStop, rec.unknown = record.Release, record.AtStop, ""
		rec.holds = nil
		for _, held := range record.Holds {
			rec.holds = append(rec.holds, states.Event(held))
		}
		h.acts.begin(name, ActDo, record.At)
	case journal.Noted:
		rec.notes = append(rec.notes, data)
	case journal.Done:
		rec.result, rec.status, rec.ended, rec.touched = data, StepDone, record.At, true
		if _, skipped := data.(*Skipped); skipped {
			rec.status = StepSkipped
		}
		if !slices.Contains(h.begun, name) { // its intent is lost
			h.begin(name)
			rec.release = record.Release
		}
		h.acts.end(name, ActDo, rec.started, record.At, nil)
	case journal.UndoIntent:
		if rec.status == StepRunning && record.Error != "" { // a step on demand: no rollback says that it failed
			rec.ended, rec.err = record.At, errors.New(record.Error)
			h.acts.end(name, ActDo, rec.started, record.At, rec.err)
		}
		rec.interrupted = rec.interrupted || record.Interrupted || rec.status == StepUndoing
		rec.status, rec.undoing = StepUndoing, record.At
		h.acts.begin(name, ActUndo, record.At)
	case journal.UndoFailed:
		h.foldUndoFailed(name, record)
	case journal.Undone:
		h.foldUndone(name, record)
	}
	if unknown, ok := data.(*Unknown); ok {
		rec.unknown, rec.release = unknown.Type, record.Release
	}
}

// foldUndoFailed keeps that an undo has failed. That of a step on demand is owed only when the sandbox is stopped.
func (h *history) foldUndoFailed(name states.Event, record *journal.Record) {
	rec, reason := h.steps[name], errors.New(record.Error)
	if rec.status == StepUndoing {
		h.acts.end(name, ActUndo, rec.undoing, record.At, reason)
	}
	if h.state() == states.Ready {
		rec.status = StepFailed
		return
	}
	rec.owedFrom(record.At, reason)
}

func (h *history) foldUndone(name states.Event, record *journal.Record) {
	rec := h.steps[name]
	rec.status = StepUndone
	if record.WrittenOff == "" {
		h.acts.end(name, ActUndo, rec.undoing, record.At, nil)
		return
	}
	h.acts.end(name, ActUndo, rec.undoing, record.At, errors.New(record.Error))
	h.acts.writeOff(name, record.At, errors.New(record.Error), record.WrittenOff)
}

func (h *history) foldMove(record *journal.Record) error {
	if err := present(record.State, "state"); err != nil {
		return err
	}
	switch states.State(record.State) {
	case states.Stopped:
		h.settle()
	case states.RollingBack:
		h.fail(record)
	}
	return nil
}

func (h *history) foldDebt(record *journal.Record) error {
	if err := errors.Join(present(record.State, "state"), present(record.Goal, "goal")); err != nil {
		return err
	}
	h.acts.endAll(ActUndo, record.At, errors.New(record.Error))
	h.owe(record)
	return nil
}

// foldClaim takes a claim that only another release knows for one that keeps the sandbox.
func (h *history) foldClaim(record *journal.Record) error {
	if err := present(record.Claim, "claim"); err != nil {
		return err
	}
	claim, err := parseClaim(record.Claim)
	if err != nil {
		claim = Taken
	}
	h.raise(claim, Taken)
	return nil
}

func (h *history) foldExit(record *journal.Record, data any) error {
	switch exit := data.(type) {
	case *Exit:
		h.setExit(*exit)
	case *Unknown:
		h.setExit(Exit{Code: unknownExit, At: record.At})
	default:
		return fmt.Errorf("it holds %T instead of an exit", data)
	}
	return nil
}

// owe finds what a debt is of: the steps whose undo has failed, and those that wait for them. A release that doesn't record each failure
// has begun their undos; where none was begun, it was the process that could not be ended.
func (h *history) owe(record *journal.Record) {
	begun := false
	for _, rec := range h.steps {
		switch {
		case !rec.touched:
		case rec.failedToUndo():
			begun = true
		case rec.status == StepUndoing:
			begun = true
			rec.owedFrom(record.At, errors.New(record.Error))
		}
	}
	if failed := h.steps[states.Event(record.Cause)]; !begun && failed != nil && failed.touched {
		failed.owedFrom(record.At, errors.New(record.Error))
	}
	h.oweRest(states.State(record.Goal), record.At)
}

// fail ends what was being done when the rollback began, and keeps why that was.
func (h *history) fail(record *journal.Record) {
	if record.Error == "" {
		return // an owed rollback is tried again
	}
	h.failure = errors.New(record.Error)
	for name, rec := range h.steps {
		if rec.status != StepRunning {
			continue
		}
		rec.status, rec.ended = StepFailed, record.At
		if name == states.Event(record.Cause) {
			rec.err = h.failure
		}
	}
	h.acts.endAll(ActDo, record.At, h.failure)
}

// settle takes back what was owed for a stop: what stays until the removal stands as it did.
func (h *history) settle() {
	for name := range h.steps {
		h.settleStep(name)
	}
	h.lastErr = h.failure // as live
}

// enter takes the transition that a record of any kind stands for. Only a debt has a goal, and never none: its cleanup would lead nowhere.
func (h *history) enter(record *journal.Record) error {
	if states.State(record.State) == states.CleanupOwed {
		if err := present(record.Goal, "goal"); err != nil {
			return err
		}
	}
	done := record.Kind == journal.Done
	t := Transition{
		Seq: record.Nth, At: record.At, After: record.After, Event: states.Event(record.Event), From: states.State(record.From), To: states.State(record.State),
		Step: states.Event(record.Cause), Class: record.Class,
	}
	if done {
		t.Step = states.Event(record.Step)
	}
	if record.Error != "" {
		t.Err = errors.New(record.Error)
	}
	if origin := tracing.FromParent(record.TraceParent); origin.IsValid() {
		t.TraceID = origin.TraceID().String()
	}
	if err := h.machine.Take(states.Transition{From: t.From, Event: t.Event, To: t.To}, done); err != nil {
		return err
	}
	h.goal = states.State(record.Goal)
	h.keep(t)
	return nil
}

// unpack decodes a record's data, which is an *Unknown where this release doesn't know its type.
func (h *history) unpack(record *journal.Record) (any, error) {
	if record.Data == nil {
		return nil, nil
	}
	data, err := typeurl.UnmarshalAny(record.Data)
	if errors.Is(err, typeurl.ErrNotFound) {
		h.unread = append(h.unread, fmt.Sprintf("record %d (%s %s) with data of the type %q, written by %s",
			record.Seq, record.Kind, record.Step, record.Data.TypeURL, releaseName(record.Release)))
		return &Unknown{record.Data.TypeURL, record.Data.Value}, nil
	}
	return data, err
}
