package lifecycle

import (
	"slices"
	"time"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// StepStatus is the status of a step of a sandbox.
type StepStatus string

const (
	StepPending        StepStatus = "pending"
	StepRunning        StepStatus = "running"
	StepDone           StepStatus = "done"
	StepSkipped        StepStatus = "skipped"
	StepFailed         StepStatus = "failed"
	StepUndoing        StepStatus = "undoing"
	StepUndone         StepStatus = "undone"
	StepCleanupPending StepStatus = "cleanup_pending"
)

// StepView is one step of a sandbox.
type StepView struct {
	Name         states.Event
	Status       StepStatus
	Started      time.Time     // zero if it never ran
	Duration     time.Duration // of the last Do; zero while it runs
	Err          error         // of a pending undo, of the last check of a done step, or else of Do
	FailedTries  int           // failed undos
	Unknown      bool          // this release can't undo it: it doesn't know the step, or its data
	Release      string        // the release of podfsm that did it; "" if it never ran
	PendingSince time.Time     // when the undo first failed, or began to wait for another
	Plan         any
	Notes        []any
	Result       any
}

// Transition is one change of a sandbox's state.
type Transition struct {
	Seq      uint64 // 1 is the transition from New; grows across restarts, too
	At       time.Time
	After    time.Duration // how long the sandbox was in From
	Event    states.Event
	From, To states.State
	Step     states.Event // the step that was done, or whose failure led to the transition; "" for none
	Err      error        // the cause
	Class    string       // of Err, as in a span's error.type
	TraceID  string       // "" without a trace
}

// Operation is what a try does with a step.
type Operation string

const (
	OperationDo   Operation = "do"
	OperationUndo Operation = "undo"
	OperationStop Operation = "stop" // of the sandbox's process

	OperationCheck Operation = "check" // of a done step; views don't have these

	OperationWriteOff Operation = "write-off" // the undo was given up
)

// Try is one try of an operation on a step. Of the tries of one operation on one step, the first
// and the last are kept.
type Try struct {
	Step           states.Event
	Operation      Operation
	Started, Ended time.Time // Ended is zero while it is under way, and if the daemon was killed meanwhile
	Err            error     // of a write-off: the error of the last undo
	Reason         string    // of a write-off
}

// View is a sandbox at one moment. The engine doesn't change it afterwards.
type View struct {
	Key         ledger.Key
	Pod         string
	Spec        any
	State       states.State
	Goal        states.State // of the pending cleanup; "" for none
	Created     time.Time
	Since       time.Time // when the state was entered
	TraceParent string    // W3C traceparent of the span under which it was created
	TraceID     string
	Claim       Claim
	HalfMade    bool         // neither ready yet nor being rolled back
	Steps       []StepView   // in the order in which they began or will begin, without steps on demand that were not demanded
	Unread      []string     // the records that this release doesn't know
	Transitions []Transition // if there are very many, without some in the middle
	Tries       []Try        // in the order in which they began
	NextTry     time.Time    // of the pending cleanup
	Err         error        // the last one
	Exit        *Exit
}

// Pending says whether the sandbox has a pending cleanup, also while it is being retried. A
// quarantined sandbox with a pending cleanup stays quarantined.
func (v View) Pending() bool {
	return v.State == states.CleanupOwed || slices.ContainsFunc(v.Steps, func(s StepView) bool { return s.Status == StepCleanupPending })
}

// Step returns a step of the view; the zero StepView for an unknown name.
func (v View) Step(name states.Event) StepView {
	for _, step := range v.Steps {
		if step.Name == name {
			return step
		}
	}
	return StepView{}
}

// Current returns the step that is being done or undone, if there is one.
func (v View) Current() (StepView, bool) {
	for _, step := range slices.Backward(v.Steps) {
		if step.Status == StepUndoing {
			return step, true
		}
	}
	for _, step := range v.Steps {
		if step.Status == StepRunning {
			return step, true
		}
	}
	return StepView{}, false
}

func (s *sandbox) view() View {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := View{
		Key: s.key, Pod: s.req.Pod, Spec: s.req.Spec,
		State: s.state(), Goal: s.goal, HalfMade: s.machine.Creating(),
		Created: s.created, Since: s.entered,
		TraceID:     tracing.FromParent(s.traceParent).TraceID().String(),
		TraceParent: s.traceParent,
		Claim:       Claim(s.claim.Load()),
		Transitions: slices.Clone(s.transitions),
		Tries:       slices.Clone(s.tries),
		Unread:      slices.Clone(s.unread),
		NextTry:     s.nextTry, Err: s.lastErr,
	}
	if !tracing.FromParent(s.traceParent).IsValid() {
		v.TraceID = ""
	}
	if v.State != states.CleanupOwed {
		v.Goal, v.NextTry = "", time.Time{} // the cleanup is being retried
	}
	if s.exit != nil {
		exit := *s.exit
		v.Exit = &exit
	}
	for _, name := range s.order() {
		rec := s.steps[name]
		declared, known := s.engine.table.Step(name)
		if rec.status == StepPending && declared.OnDemand {
			continue // no caller demanded the step
		}
		view := StepView{Name: name, Unknown: !known || rec.unknown != "", Release: rec.release, Status: rec.status, Started: rec.started, Duration: rec.took(), Err: rec.err, FailedTries: rec.failedTries, PendingSince: rec.pendingSince,
			Plan: rec.plan, Notes: slices.Clone(rec.notes), Result: rec.result}
		switch {
		case rec.status == StepCleanupPending:
			view.Err = rec.undoErr
		case rec.status == StepDone && rec.checkErr != nil:
			view.Err = rec.checkErr
			if v.Err == nil {
				v.Err = rec.checkErr
			}
		}
		v.Steps = append(v.Steps, view)
	}
	return v
}
