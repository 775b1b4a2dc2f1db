package lifecycle

import (
	"slices"
	"time"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// StepStatus is where a step of a sandbox stands.
type StepStatus string

const (
	StepPending StepStatus = "pending"
	StepRunning StepStatus = "running"
	StepDone    StepStatus = "done"
	StepSkipped StepStatus = "skipped"
	StepFailed  StepStatus = "failed"
	StepUndoing StepStatus = "undoing"
	StepUndone  StepStatus = "undone"
	StepOwed    StepStatus = "owed"
)

// StepView is one step of a sandbox.
type StepView struct {
	Name      states.Event
	Status    StepStatus
	Started   time.Time     // zero when it never ran
	Duration  time.Duration // of the last Do; zero while it runs
	Err       error         // of Do, of the last undo while it is owed, or of the last check of what is done
	Attempts  int           // failed tries at undoing it
	Unknown   bool          // this release can't undo it: it doesn't know the step, or its data
	Release   string        // the release of podfsm that did it; "" when it never ran
	OwedSince time.Time     // when the first of them failed
	Plan      any
	Notes     []any
	Result    any
}

// Transition is one change of a sandbox's state.
type Transition struct {
	Seq      uint64 // from 1, the transition out of New; it only ever grows, also over a restart
	At       time.Time
	After    time.Duration // how long the sandbox was in From
	Event    states.Event
	From, To states.State
	Step     states.Event // that was done, or whose failure led to it; "" for none
	Err      error        // that led to it
	Class    string       // of Err, as error.type of a span
	TraceID  string       // of the span that it happened under; "" when that was in no trace
}

// ActKind is what an act does with its step.
type ActKind string

const (
	ActDo   ActKind = "do"
	ActUndo ActKind = "undo"
	ActStop ActKind = "stop" // of the sandbox's process

	ActCheck ActKind = "check" // of what is done; the acts of a view don't hold it

	ActWriteOff ActKind = "write-off" // the undo was given up
)

// Act is one try at doing or undoing a step. Of the tries at one thing the first and the last are kept.
type Act struct {
	Step           states.Event
	Kind           ActKind
	Started, Ended time.Time // Ended is zero while it is under way, and where nobody knows: the daemon was killed meanwhile
	Err            error     // of a write-off, that of the last undo
	Reason         string    // of a write-off
}

// View is a sandbox at one moment. It shares nothing that changes with the engine.
type View struct {
	Key         journal.Key
	Pod         string
	Spec        any
	State       states.State
	Goal        states.State // what the owed cleanup leads to, "" when nothing is owed
	Created     time.Time
	Since       time.Time // when the state was entered
	TraceParent string    // of the span it was created under, a W3C traceparent
	TraceID     string
	Claim       Claim
	HalfMade    bool         // its creation has not come to Ready, nor to a rollback
	Steps       []StepView   // in the order in which they were begun; those that weren't, where they would be; on demand, those that somebody has asked for
	Unread      []string     // what this release doesn't know of its records
	Transitions []Transition // without those in the middle where there are very many
	Acts        []Act        // in the order in which they began
	NextTry     time.Time    // of the owed cleanup
	Err         error        // the last one
	Exit        *Exit
}

// Pending says whether the sandbox has a pending cleanup, also while that is tried again. One in quarantine stays there when its stop fails.
func (v View) Pending() bool {
	return v.State == states.CleanupOwed || slices.ContainsFunc(v.Steps, func(s StepView) bool { return s.Status == StepOwed })
}

// Step is one step of the view.
func (v View) Step(name states.Event) StepView {
	for _, step := range v.Steps {
		if step.Name == name {
			return step
		}
	}
	return StepView{}
}

// Current is the step that the sandbox waits for, if there is one.
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
		Acts:        slices.Clone(s.acts),
		Unread:      slices.Clone(s.unread),
		NextTry:     s.nextTry, Err: s.lastErr,
	}
	if !tracing.FromParent(s.traceParent).IsValid() {
		v.TraceID = ""
	}
	if v.State != states.CleanupOwed {
		v.Goal, v.NextTry = "", time.Time{} // it is being paid
	}
	if s.exit != nil {
		exit := *s.exit
		v.Exit = &exit
	}
	for _, name := range s.order() {
		rec := s.steps[name]
		declared, known := s.engine.table.Step(name)
		if rec.status == StepPending && declared.OnDemand {
			continue // nobody has asked for it
		}
		view := StepView{Name: name, Unknown: !known || rec.unknown != "", Release: rec.release, Status: rec.status, Started: rec.started, Duration: rec.took(), Err: rec.err, Attempts: rec.attempts, OwedSince: rec.owedSince,
			Plan: rec.plan, Notes: slices.Clone(rec.notes), Result: rec.result}
		switch {
		case rec.status == StepOwed:
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
