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

func (s StepStatus) complete() bool { return s == StepDone || s == StepSkipped }

// StepView is one step of a sandbox.
type StepView struct {
	Name      states.Event
	Status    StepStatus
	Started   time.Time     // zero when it never ran
	Duration  time.Duration // of the last Do; zero while it runs
	Err       error
	Attempts  int       // failed tries at undoing it
	OwedSince time.Time // when the first of them failed
	Result    any
}

// Transition is one change of a sandbox's state.
type Transition struct {
	Seq      uint64 // from 1, the transition out of New
	At       time.Time
	Event    states.Event
	From, To states.State
	Err      error
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
	TraceID     string
	TraceParent string     // W3C, of the span that it was created under
	Steps       []StepView // in the order of the creation path
	Transitions []Transition
	NextTry     time.Time // of the owed cleanup
	Err         error     // the last one
	Exit        *Exit
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

func (s *sandbox) view() View {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := View{
		Key: s.key, Pod: s.req.Pod, Spec: s.req.Spec,
		State: s.state(), Goal: s.goal,
		Created: s.created, Since: s.created,
		TraceID:     tracing.FromParent(s.traceParent).TraceID().String(),
		TraceParent: s.traceParent,
		Transitions: slices.Clone(s.transitions),
		NextTry:     s.nextTry, Err: s.lastErr,
	}
	if !tracing.FromParent(s.traceParent).IsValid() {
		v.TraceID = ""
	}
	if v.State != states.CleanupOwed {
		v.Goal, v.NextTry = "", time.Time{} // it is being paid
	}
	if n := len(s.transitions); n > 0 {
		v.Since = s.transitions[n-1].At
	}
	if s.exit != nil {
		exit := *s.exit
		v.Exit = &exit
	}
	for _, name := range states.CreationPath() {
		rec := s.steps[name]
		view := StepView{Name: name, Status: rec.status, Started: rec.started, Err: rec.err, Attempts: rec.attempts, OwedSince: rec.owedSince, Result: rec.result}
		if rec.status == StepOwed {
			view.Err = rec.undoErr
		}
		if !rec.ended.IsZero() {
			view.Duration = rec.ended.Sub(rec.started)
		}
		v.Steps = append(v.Steps, view)
	}
	return v
}
