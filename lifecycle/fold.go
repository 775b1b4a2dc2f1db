package lifecycle

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/typeurl/v2"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// history folds records into a sandbox. The state comes from the recorded transitions, never from
// the steps of this release.
type history struct {
	*sandbox
	accepted bool // the sandbox's first record is there
	spec     any
}

// replay folds all records. It returns an error for each record that can't be read.
func (h *history) replay(records []ledger.Record) (unreadable []error) {
	for i := range records {
		if err := h.fold(&records[i]); err != nil {
			unreadable = append(unreadable, fmt.Errorf("record %d (%s %s): %w", records[i].Seq, records[i].Kind, records[i].Step, err))
		}
	}
	return unreadable
}

func (h *history) fold(record *ledger.Record) error {
	if record.Kind == ledger.Unreadable {
		return errors.New(record.Error)
	}
	data, err := h.unpack(record)
	if err != nil {
		return err
	}
	if record.Kind == ledger.Begun {
		return h.foldSpec(record, data)
	}
	if record.Step != "" {
		h.foldStep(record, data)
	}
	if record.State != "" {
		if err := h.foldTransition(record); err != nil {
			return err
		}
	}
	switch record.Kind {
	case ledger.Intent, ledger.Noted, ledger.Done, ledger.UndoIntent, ledger.UndoFailed, ledger.Undone:
		return present(record.Step, "step")
	case ledger.Moved:
		return h.foldMove(record)
	case ledger.CleanupPending:
		return h.foldPendingCleanup(record)
	case ledger.Claimed:
		return h.foldClaim(record)
	case ledger.Exited:
		return h.foldExit(record, data)
	default:
		h.unread = append(h.unread, fmt.Sprintf("record %d of the kind %q, written by %s", record.Seq, record.Kind, releaseName(record.Release)))
		return nil
	}
}

func present(field, what string) error {
	if field == "" {
		return fmt.Errorf("the record has no %s", what)
	}
	return nil
}

func (h *history) foldSpec(record *ledger.Record, data any) error {
	h.accepted, h.traceParent = true, record.TraceParent
	h.created, h.entered = record.At, record.At
	if _, unknown := data.(*Unknown); unknown {
		return nil // unpack has kept it as unread
	}
	h.spec = data
	return nil
}

// foldStep keeps what a record says about a step. The step may be another release's.
func (h *history) foldStep(record *ledger.Record, data any) {
	name := states.Event(record.Step)
	rec, ok := h.steps[name]
	if !ok {
		rec = &stepState{status: StepPending}
		h.steps[name] = rec
	}
	switch record.Kind {
	case ledger.Intent:
		h.begin(name)
		rec.interrupted = false
		rec.plan, rec.touched, rec.status, rec.started, rec.ended, rec.err = data, true, StepRunning, record.At, time.Time{}, nil
		rec.release, rec.atStop, rec.unknown = record.Release, record.AtStop, ""
		rec.holds = nil
		for _, held := range record.Holds {
			rec.holds = append(rec.holds, states.Event(held))
		}
		h.tries.begin(name, OperationDo, record.At)
	case ledger.Noted:
		rec.notes = append(rec.notes, data)
	case ledger.Done:
		rec.result, rec.status, rec.ended, rec.touched = data, StepDone, record.At, true
		if _, skipped := data.(*Skipped); skipped {
			rec.status = StepSkipped
		}
		if !slices.Contains(h.begun, name) { // its intent is lost
			h.begin(name)
			rec.release = record.Release
		}
		h.tries.end(name, OperationDo, rec.started, record.At, nil)
	case ledger.UndoIntent:
		if rec.status == StepRunning && record.Error != "" { // a step on demand, whose failure no rollback records
			rec.ended, rec.err = record.At, errors.New(record.Error)
			h.tries.end(name, OperationDo, rec.started, record.At, rec.err)
		}
		rec.interrupted = rec.interrupted || record.Interrupted || rec.status == StepUndoing
		rec.status, rec.undoing = StepUndoing, record.At
		h.tries.begin(name, OperationUndo, record.At)
	case ledger.UndoFailed:
		h.foldUndoFailed(name, record)
	case ledger.Undone:
		h.foldUndone(name, record)
	}
	if unknown, ok := data.(*Unknown); ok {
		rec.unknown, rec.release = unknown.Type, record.Release
	}
}

// foldUndoFailed keeps the failure of an undo. If the sandbox is ready, the step is on demand, and
// its undo isn't pending before the sandbox is stopped.
func (h *history) foldUndoFailed(name states.Event, record *ledger.Record) {
	rec, reason := h.steps[name], errors.New(record.Error)
	if rec.status == StepUndoing {
		h.tries.end(name, OperationUndo, rec.undoing, record.At, reason)
	}
	if h.state() == states.Ready {
		rec.status = StepFailed
		return
	}
	rec.leavePending(record.At, reason)
}

func (h *history) foldUndone(name states.Event, record *ledger.Record) {
	rec := h.steps[name]
	rec.status = StepUndone
	if record.WrittenOff == "" {
		h.tries.end(name, OperationUndo, rec.undoing, record.At, nil)
		return
	}
	h.tries.end(name, OperationUndo, rec.undoing, record.At, errors.New(record.Error))
	h.tries.writeOff(name, record.At, errors.New(record.Error), record.WrittenOff)
}

// foldTransition makes the recorded transition. A pending cleanup needs a goal: without one, no
// event would lead out of the state.
func (h *history) foldTransition(record *ledger.Record) error {
	if states.State(record.State) == states.CleanupOwed {
		if err := present(record.Goal, "goal"); err != nil {
			return err
		}
	}
	done := record.Kind == ledger.Done
	t := Transition{
		Seq: record.Nth, At: record.At, After: record.After, Event: states.EventOnRecord(record.Event), From: states.State(record.From), To: states.State(record.State),
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

func (h *history) foldMove(record *ledger.Record) error {
	if err := present(record.State, "state"); err != nil {
		return err
	}
	switch states.State(record.State) {
	case states.Stopped:
		h.foldStopped()
	case states.RollingBack:
		h.foldFailure(record)
	}
	return nil
}

func (h *history) foldPendingCleanup(record *ledger.Record) error {
	if err := errors.Join(present(record.State, "state"), present(record.Goal, "goal")); err != nil {
		return err
	}
	h.tries.endAll(OperationUndo, record.At, errors.New(record.Error))
	h.foldPendingSteps(record)
	return nil
}

// foldClaim raises the claim. A claim of another release that this release doesn't know counts as
// Taken, which keeps the sandbox.
func (h *history) foldClaim(record *ledger.Record) error {
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

func (h *history) foldExit(record *ledger.Record, data any) error {
	switch exit := data.(type) {
	case *Exit:
		h.setExit(*exit)
	case *Unknown:
		h.setExit(Exit{Code: unknownExit, At: record.At})
	default:
		return fmt.Errorf("the record has a %T instead of an exit", data)
	}
	return nil
}

// foldPendingSteps marks the steps of a pending cleanup: those whose undo failed, and those that
// wait for them. A release that doesn't record each failure has recorded that the undos began. If no
// undo began, the process could not be ended.
func (h *history) foldPendingSteps(record *ledger.Record) {
	begun := false
	for _, rec := range h.steps {
		switch {
		case !rec.touched:
		case rec.failedToUndo():
			begun = true
		case rec.status == StepUndoing:
			begun = true
			rec.leavePending(record.At, errors.New(record.Error))
		}
	}
	if failed := h.steps[states.Event(record.Cause)]; !begun && failed != nil && failed.touched {
		failed.leavePending(record.At, errors.New(record.Error))
	}
	h.leaveRestPending(states.State(record.Goal), record.At)
}

// foldFailure ends the steps that ran when the rollback began, and keeps the cause of the rollback.
func (h *history) foldFailure(record *ledger.Record) {
	if record.Error == "" {
		return // the retry of a pending rollback has no cause of its own
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
	h.tries.endAll(OperationDo, record.At, h.failure)
}

// foldStopped ends the pending cleanup of a stop. A step that stays until the removal is done again,
// not pending.
func (h *history) foldStopped() {
	for name := range h.steps {
		h.markDoneAgain(name)
	}
	h.lastErr = h.failure // as sandbox.finishOrLeavePending does
}

// unpack decodes a record's data. It returns an *Unknown for a type that this release doesn't know.
func (h *history) unpack(record *ledger.Record) (any, error) {
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
