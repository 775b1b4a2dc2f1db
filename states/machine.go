package states

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/looplab/fsm"
)

// Machine holds the current state of one sandbox and refuses events that are
// illegal in it. It is safe for concurrent use.
//
// What is legal is looplab/fsm's to say, without callbacks, on purpose. In
// v1.0.3 a context that is cancelled before the state changes, or a callback
// that panics on the way out of a state, leaves an FSM "in transition" for
// good; Event, Can and SetState deadlock inside before_ and leave_ callbacks;
// and a mistyped callback key is ignored. Side effects belong to the engine,
// before the event is fired.
type Machine struct {
	table *Table

	// mu makes reading the state and firing an event one action, so that an
	// error names the state that refused the event.
	mu     sync.Mutex
	state  State
	byStep bool // a step led to the state, which the table doesn't have
}

// NewMachine returns a machine in state [New].
func (t *Table) NewMachine() *Machine { return &Machine{table: t, state: New} }

// Current returns the state the machine is in.
func (m *Machine) Current() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// Creating says whether the sandbox is on the creation path before [Ready], on
// that of another release, too.
func (m *Machine) Creating() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.table.onPath(m.state) || m.byStep
}

// Can reports whether event is legal in the current state. The answer may be
// out of date at once when others fire events; [Machine.Fire] checks again.
func (m *Machine) Can(event Event) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.legality(event).Can(string(event))
}

// Next returns the state that event leads to now, and whether it is legal.
func (m *Machine) Next(event Event) (State, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.legal(event) {
		for _, from := range d.Src {
			if from == string(m.state) {
				return State(d.Dst), true
			}
		}
	}
	return "", false
}

// Fire moves the machine along event and returns the state it is in afterwards.
// An event that is illegal in the current state, or unknown, leaves the machine
// as it is and gives an [errdefs.ErrFailedPrecondition] that names both. The
// context's cancellation is ignored: what the event reports has happened.
func (m *Machine) Fire(ctx context.Context, event Event) (State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	table := m.legality(event)
	// Without callbacks and with a context that never ends, the only errors
	// are InvalidEventError and UnknownEventError.
	if err := table.Event(context.WithoutCancel(ctx), string(event)); err != nil {
		return m.state, fmt.Errorf("event %q is illegal in sandbox state %q: %w", event, m.state, errdefs.ErrFailedPrecondition)
	}
	m.state, m.byStep = State(table.Current()), false
	return m.state, nil
}

// Take moves the machine along a recorded transition. step says that the
// completion of a step was recorded with it.
//
// A record may be missing before it, so the transition counts from its own source.
// One that the table has all names of, but that no release makes, is damage: it
// gives an [errdefs.ErrDataLoss] and leaves the machine as it is. One with a name
// that the table doesn't have is another release's, and is taken as recorded. So
// is a step of the creation path at another place of the path: releases may have
// other orders.
func (m *Machine) Take(t Transition, step bool) error {
	if t.From == "" || t.Event == "" || t.To == "" || !m.table.allows(t, step) {
		return fmt.Errorf("the recorded transition from %q by %q to %q is illegal: %w", t.From, t.Event, t.To, errdefs.ErrDataLoss)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state, m.byStep = t.To, step && !m.table.knows(t.To)
	return nil
}

// allows says whether a release may have made a transition, as far as this one
// can tell.
func (t *Table) allows(made Transition, step bool) bool {
	if !t.knows(made.From) || !t.knows(made.To) || t.EventMeaning(made.Event) == "" {
		return true
	}
	if to, ok := t.Next(made.From, made.Event); ok && to == made.To {
		return true
	}
	return step && slices.Contains(t.Path(), made.Event) && t.leadsOn(made.From, made.To)
}

// leadsOn says whether a step can lead from one state to another, in some order of
// the steps.
func (t *Table) leadsOn(from, to State) bool {
	return t.onPath(from) && from != to && to != New && (to == Ready || t.onPath(to))
}

// legality returns an FSM in the machine's state that knows one event. An FSM of
// them all takes up kilobytes, so no sandbox keeps one, and ten microseconds
// to make; this one takes less than one. The caller holds mu.
func (m *Machine) legality(event Event) *fsm.FSM {
	return fsm.NewFSM(string(m.state), m.legal(event), nil)
}

// legal is the table's description of an event, with the ways out of a state that
// the table doesn't have: what a step of another release has led to is rolled
// back, and whatever else another release's sandbox is, it can be stopped. The
// caller holds mu.
func (m *Machine) legal(event Event) fsm.Events {
	if m.table.knows(m.state) {
		return m.table.descriptions[event]
	}
	leads := Transition{m.state, Stop, Stopping}
	if m.byStep {
		leads = Transition{m.state, RollBack, RollingBack}
	}
	if event == Quarantine {
		leads = Transition{m.state, Quarantine, Quarantined}
	}
	if event != leads.Event {
		return nil
	}
	return fsm.Events{{Name: string(leads.Event), Src: []string{string(leads.From)}, Dst: string(leads.To)}}
}
