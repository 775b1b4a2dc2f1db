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
// It is looplab/fsm without callbacks, on purpose. In v1.0.3 a context that is
// cancelled before the state changes, or a callback that panics on the way out
// of a state, leaves the machine "in transition" for good; Event, Can and
// SetState deadlock inside before_ and leave_ callbacks; and a mistyped callback
// key is ignored. Side effects belong to the engine, before the event is fired.
type Machine struct {
	// mu makes reading the state and firing an event one action, so that an
	// error names the state that refused the event.
	mu  sync.Mutex
	fsm *fsm.FSM
}

// NewMachine returns a machine in the given state: [New] for a new sandbox, the
// journaled one for a sandbox of an earlier run. A state that is not in [All]
// gives an [errdefs.ErrInvalidArgument].
func NewMachine(initial State) (*Machine, error) {
	if !initial.known() {
		return nil, fmt.Errorf("unknown sandbox state %q: %w", initial, errdefs.ErrInvalidArgument)
	}
	events := make(fsm.Events, 0, len(rules))
	for _, r := range rules {
		src := make([]string, 0, len(r.from))
		for _, from := range r.from {
			src = append(src, string(from))
		}
		events = append(events, fsm.EventDesc{Name: string(r.event), Src: src, Dst: string(r.to)})
	}
	return &Machine{fsm: fsm.NewFSM(string(initial), events, nil)}, nil
}

// Current returns the state the machine is in.
func (m *Machine) Current() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return State(m.fsm.Current())
}

// Can reports whether event is legal in the current state. The answer may be
// out of date at once when others fire events; [Machine.Fire] checks again.
func (m *Machine) Can(event Event) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fsm.Can(string(event))
}

// Fire moves the machine along event and returns the state it is in afterwards.
// An event that is illegal in the current state, or unknown, leaves the machine
// as it is and gives an [errdefs.ErrFailedPrecondition] that names both. The
// context's cancellation is ignored: what the event reports has happened.
func (m *Machine) Fire(ctx context.Context, event Event) (State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	from := State(m.fsm.Current())
	// Without callbacks and with a context that never ends, the only errors
	// are InvalidEventError and UnknownEventError.
	if err := m.fsm.Event(context.WithoutCancel(ctx), string(event)); err != nil {
		return from, fmt.Errorf("event %q is illegal in sandbox state %q: %w", event, from, errdefs.ErrFailedPrecondition)
	}
	return State(m.fsm.Current()), nil
}
