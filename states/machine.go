package states

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/looplab/fsm"
)

// Machine has the current state of one sandbox and refuses illegal events. It is safe for
// concurrent use.
//
// looplab/fsm decides what is legal, without callbacks. In v1.0.3, callbacks have traps. If a
// context ends before the state changes, or a leave_ callback panics, the FSM stays "in transition"
// forever. Event, Can and SetState deadlock inside before_ and leave_ callbacks. A mistyped
// callback key is ignored. So the engine causes all side effects, before it fires the event.
type Machine struct {
	table *Table

	// mu is held from the check of an event to the change of the state, so that an error names the
	// state that refused the event.
	mu     sync.Mutex
	state  State
	byStep bool // the table doesn't have the state, to which a step of another release led
}

// NewMachine returns a machine in state [New].
func (t *Table) NewMachine() *Machine { return &Machine{table: t, state: New} }

// Current returns the current state.
func (m *Machine) Current() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// Creating says whether the sandbox is on the creation path before [Ready], also on the path of
// another release.
func (m *Machine) Creating() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.table.onPath(m.state) || m.byStep
}

// Can says whether event is legal in the current state. With concurrent events, the answer may be
// outdated at once. [Machine.Fire] checks again.
func (m *Machine) Can(event Event) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.legality(event).Can(string(event))
}

// Next returns the state to which event leads now, and whether event is legal.
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

// Fire moves the machine by event and returns the new state. For an illegal or unknown event, it
// changes nothing and fails with FailedPrecondition. It ignores the end of ctx, because what the
// event reports has happened.
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

// Take moves the machine by a recorded transition, whatever state it is in: records may be missing.
// step says that the record is of the completion of a step.
//
// A transition with a name that the table doesn't have is another release's. Take makes it as
// recorded. So it does for a step of the creation path in another order. If the table has all names
// but not the transition, the record is damaged: Take changes nothing and fails with DataLoss.
func (m *Machine) Take(t Transition, step bool) error {
	if t.From == "" || t.Event == "" || t.To == "" || !m.table.allows(t, step) {
		return fmt.Errorf("the recorded transition from %q by %q to %q is illegal: %w", t.From, t.Event, t.To, errdefs.ErrDataLoss)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state, m.byStep = t.To, step && !m.table.knows(t.To)
	return nil
}

// allows says whether some release may have made a transition.
func (t *Table) allows(made Transition, step bool) bool {
	if !t.knows(made.From) || !t.knows(made.To) || t.EventMeaning(made.Event) == "" {
		return true
	}
	if to, ok := t.Next(made.From, made.Event); ok && to == made.To {
		return true
	}
	return step && slices.Contains(t.Path(), made.Event) && t.leadsOn(made.From, made.To)
}

// leadsOn says whether a step can lead from one state to another in some order of the steps.
func (t *Table) leadsOn(from, to State) bool {
	return t.onPath(from) && from != to && to != New && (to == Ready || t.onPath(to))
}

// legality returns an FSM in the machine's state that knows one event. It takes less than a
// microsecond to make. An FSM with all events takes ten, and kilobytes of memory for each sandbox.
// The caller holds mu.
func (m *Machine) legality(event Event) *fsm.FSM {
	return fsm.NewFSM(string(m.state), m.legal(event), nil)
}

// legal returns the table's description of an event. If the table doesn't have the current state,
// legal allows only the ways out of it. If a step led to the state, the sandbox can be rolled back,
// otherwise it can be stopped. It can also be quarantined. The caller holds mu.
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
