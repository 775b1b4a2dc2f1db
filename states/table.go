package states

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/looplab/fsm"
)

// Step declares a step of a sandbox to the table. A step of the creation path is an event, and
// leads to a state of its own. A step on demand changes no state.
type Step struct {
	// Name is the event that the completion of the step fires. Ledgers, spans and API responses
	// have the name, so it never changes.
	Name Event
	// State is the state to which the step leads: [Ready] for the last step, "" for a step on
	// demand.
	State State
	// Meaning describes State in a sentence. Ready has its own.
	Meaning string
	// Done describes the completion of the step in a sentence.
	Done string
	// OnDemand says that the step is not on the creation path.
	OnDemand bool
}

// Table has the legal transitions. It is immutable.
type Table struct {
	steps        []Step
	states       []described
	rules        []rule
	descriptions map[Event]fsm.Events // the rules for looplab/fsm
}

// NewTable makes the table of the fixed states and events and of the steps: those of the creation
// path in its order, then those on demand. It fails with InvalidArgument if the steps make no path
// from [New] to [Ready], or if one lacks a text.
func NewTable(steps []Step) (*Table, error) {
	t := &Table{steps: slices.Clone(steps), states: []described{newState}}
	at, unfinished := New, []State{New}
	for _, step := range steps {
		if step.Done == "" {
			return nil, fmt.Errorf("step %q has no text for its completion: %w", step.Name, errdefs.ErrInvalidArgument)
		}
		if step.OnDemand {
			if at != Ready || step.State != "" {
				return nil, fmt.Errorf("step %q is on demand: it must come after the creation path and lead to no state: %w", step.Name, errdefs.ErrInvalidArgument)
			}
			continue
		}
		if at == Ready || step.State == "" {
			return nil, fmt.Errorf("step %q must come before %s and lead to a state: %w", step.Name, Ready, errdefs.ErrInvalidArgument)
		}
		t.rules = append(t.rules, rule{step.Name, []State{at}, step.State, step.Done})
		at = step.State
		if at != Ready {
			t.states = append(t.states, described{at, step.Meaning})
			unfinished = append(unfinished, at)
		}
	}
	if at != Ready {
		return nil, fmt.Errorf("the creation path ends in %s, not in %s: %w", at, Ready, errdefs.ErrInvalidArgument)
	}
	t.states = append(t.states, fixed...)
	t.rules = append(t.rules, fixedRules(unfinished)...)
	if err := t.check(); err != nil {
		return nil, err
	}
	t.describe()
	return t, nil
}

// check refuses duplicate names and states without a meaning.
func (t *Table) check() error {
	seen := map[string]bool{string(anyState): true}
	for _, d := range t.states {
		if seen[string(d.state)] || d.meaning == "" {
			return fmt.Errorf("state %q has no meaning or is a duplicate: %w", d.state, errdefs.ErrInvalidArgument)
		}
		seen[string(d.state)] = true
	}
	names := t.Steps()
	for _, r := range fixedRules(nil) {
		names = append(names, r.event)
	}
	for i, name := range names {
		if name == "" || slices.Contains(names[:i], name) {
			return fmt.Errorf("event %q has no name or is a duplicate: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func (t *Table) describe() {
	t.descriptions = make(map[Event]fsm.Events, len(t.rules))
	for _, r := range t.rules {
		src := make([]string, 0, len(r.from))
		for _, from := range r.from {
			src = append(src, string(from))
		}
		t.descriptions[r.event] = append(t.descriptions[r.event], fsm.EventDesc{Name: string(r.event), Src: src, Dst: string(r.to)})
	}
}

// States returns every state, in the order of a sandbox's life.
func (t *Table) States() []State {
	all := make([]State, 0, len(t.states))
	for _, d := range t.states {
		all = append(all, d.state)
	}
	return all
}

// PathStates returns the states of the creation path, from [New] to [Ready].
func (t *Table) PathStates() []State {
	all := t.States()
	return all[:slices.Index(all, Ready)+1]
}

// Events returns every event, the creation path's first.
func (t *Table) Events() []Event {
	events := make([]Event, 0, len(t.rules))
	for _, r := range t.rules {
		events = append(events, r.event)
	}
	return events
}

// Path returns the events that lead from [New] to [Ready], in order.
func (t *Table) Path() []Event {
	var path []Event
	for _, step := range t.steps {
		if !step.OnDemand {
			path = append(path, step.Name)
		}
	}
	return path
}

// Steps returns the names of all steps, in their order.
func (t *Table) Steps() []Event {
	names := make([]Event, 0, len(t.steps))
	for _, step := range t.steps {
		names = append(names, step.Name)
	}
	return names
}

// Step returns the declaration of a step, and whether there is one.
func (t *Table) Step(name Event) (Step, bool) {
	i := slices.IndexFunc(t.steps, func(s Step) bool { return s.Name == name })
	if i < 0 {
		return Step{}, false
	}
	return t.steps[i], true
}

// Transitions returns every legal transition, one for each pair of event and
// source state.
func (t *Table) Transitions() []Transition {
	var all []Transition
	for _, r := range t.rules {
		for _, from := range r.from {
			all = append(all, Transition{From: from, Event: r.event, To: r.to})
		}
	}
	return all
}

// Next returns the state to which event leads from s, and whether event is legal in s.
func (t *Table) Next(s State, event Event) (State, bool) {
	for _, r := range t.rules {
		if r.event == event && slices.Contains(r.from, s) {
			return r.to, true
		}
	}
	return "", false
}

// Meaning describes state s in a sentence. It is empty for a state that the table doesn't have.
func (t *Table) Meaning(s State) string {
	for _, d := range t.states {
		if d.state == s {
			return d.meaning
		}
	}
	return ""
}

// EventMeaning describes event e in a sentence. It is empty for an event that the table doesn't
// have.
func (t *Table) EventMeaning(e Event) string {
	for _, r := range t.rules {
		if r.event == e {
			return r.meaning
		}
	}
	return ""
}

func (t *Table) knows(s State) bool { return t.Meaning(s) != "" }

// onPath says whether s is a state of the creation path before [Ready].
func (t *Table) onPath(s State) bool { return s != Ready && slices.Contains(t.PathStates(), s) }
