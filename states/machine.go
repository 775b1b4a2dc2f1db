package states

import (
	"context"
	"fmt"
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
	// mu makes reading the state and firing an event one action, so that an
	// error names the state that refused the event.
	mu    sync.Mutex
	state State
}

// NewMachine returns a machine in the given state: [New] for a new sandbox, the
// journaled one for a sandbox of an earlier run. A state that is not in [All]
// gives an [errdefs.ErrInvalidArgument].
func NewMachine(initial State) (*Machine, error) {
	if !initial.known() {
		return nil, fmt.Errorf("unknown sandbox state %q: %w", initial, errdefs.ErrInvalidArgument)
	}
	return &Machine{state: initial}, nil
}

// Current returns the state the machine is in.
func (m *Machine) Current() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// Can reports whether event is legal in the current state. The answer may be
// out of date at once when others fire events; [Machine.Fire] checks again.
func (m *Machine) Can(event Event) bool {
	return legality(m.Current(), event).Can(string(event))
}

// Fire moves the machine along event and returns the state it is in afterwards.
// An event that is illegal in the current state, or unknown, leaves the machine
// as it is and gives an [errdefs.ErrFailedPrecondition] that names both. The
// context's cancellation is ignored: what the event reports has happened.
func (m *Machine) Fire(ctx context.Context, event Event) (State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	table := legality(m.state, event)
	// Without callbacks and with a context that never ends, the only errors
	// are InvalidEventError and UnknownEventError.
	if err := table.Event(context.WithoutCancel(ctx), string(event)); err != nil {
		return m.state, fmt.Errorf("event %q is illegal in sandbox state %q: %w", event, m.state, errdefs.ErrFailedPrecondition)
	}
	m.state = State(table.Current())
	return m.state, nil
}

// legality returns an FSM in the given state that knows one event. An FSM of
// them all takes up kilobytes, so no sandbox keeps one, and ten microseconds
// to make; this one takes less than one.
func legality(current State, event Event) *fsm.FSM {
	return fsm.NewFSM(string(current), descriptions[event], nil)
}

// descriptions are the rules in looplab/fsm's form; an unknown event has none.
var descriptions = describe()

func describe() map[Event]fsm.Events {
	all := make(map[Event]fsm.Events, len(rules))
	for _, r := range rules {
		src := make([]string, 0, len(r.from))
		for _, from := range r.from {
			src = append(src, string(from))
		}
		all[r.event] = append(all[r.event], fsm.EventDesc{Name: string(r.event), Src: src, Dst: string(r.to)})
	}
	return all
}
