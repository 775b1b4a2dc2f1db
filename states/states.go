// Package states has the states of a pod sandbox, the events that move the sandbox from one state
// to the next, and the table of the legal transitions.
//
// The states and events off the creation path are fixed. Those of the creation
// path come from the declarations of the steps: see [NewTable].
//
// The engine decides when an event is fired and what happens then. This package does no I/O.
// Everything in it is immutable, except [Machine].
package states

// State is a state of a sandbox. Ledgers, metrics and API responses have its name, so the name
// never changes.
type State string

// The states at both ends of the creation path. The steps declare the states between them.
const (
	New   State = "New"
	Ready State = "Ready"
)

// The states off the creation path.
const (
	RollingBack State = "RollingBack"
	RolledBack  State = "RolledBack"
	CleanupOwed State = "CleanupOwed"
	NotReady    State = "NotReady"
	Stopping    State = "Stopping"
	Stopped     State = "Stopped"
	Removing    State = "Removing"
	Removed     State = "Removed"
	Quarantined State = "Quarantined"
)

// Event moves a sandbox from one state to another. Ledgers and API responses have its name. A name
// that changes has to be read forever: see [EventOnRecord].
type Event string

// The events off the creation path. Those of the path are the names of steps.
const (
	RollBack            Event = "roll_back"
	FinishRollback      Event = "finish_rollback"
	LosePause           Event = "lose_pause"
	Stop                Event = "stop"
	FinishStop          Event = "finish_stop"
	Remove              Event = "remove"
	FinishRemove        Event = "finish_remove"
	LeaveCleanupPending Event = "leave_cleanup_pending"
	Quarantine          Event = "quarantine"
)

// EventOnRecord returns the event with a recorded name. The first format calls
// [LeaveCleanupPending] owe_cleanup.
func EventOnRecord(name string) Event {
	if name == "owe_cleanup" {
		return LeaveCleanupPending
	}
	return Event(name)
}

// Transition is one row of the table: in state From, Event leads to To.
type Transition struct {
	From  State
	Event Event
	To    State
}

// Terminal says whether a sandbox in state s has ended: no event leads out of s.
func (s State) Terminal() bool { return s == RolledBack || s == Removed }

// described is a state and its meaning.
type described struct {
	state   State
	meaning string
}

var newState = described{New, "The sandbox is recorded; nothing has been made for it."}

// fixed are Ready and the states off the creation path.
var fixed = []described{
	{Ready, "It is complete, and containers may join it."},
	{RollingBack, "Its creation failed or was given up; the steps are being undone in reverse order."},
	{RolledBack, "Nothing of its creation is left on the host."},
	{CleanupOwed, "An undo failed; it is retried, across restarts, until it succeeds or is written off, by an operator or after a reboot."},
	{NotReady, "Its pause process is gone; its other resources may still be there."},
	{Stopping, "Its processes are being ended and its network detached."},
	{Stopped, "It has no process and no network; its record and files remain."},
	{Removing, "Its last files and records are being removed."},
	{Removed, "Nothing of it is left on the host."},
	{Quarantined, "Its record cannot be trusted; nothing is done to it until it is stopped or removed."},
}

// rule is an event, the states in which it is legal, and the state to which it leads. That must be
// another state: looplab/fsm reports a self-transition as an error ([fsm.NoTransitionError]).
type rule struct {
	event   Event
	from    []State
	to      State
	meaning string
}

// fixedRules returns the rules off the creation path. unfinished are the states before [Ready].
func fixedRules(unfinished []State) []rule {
	return []rule{
		{RollBack, with(unfinished, CleanupOwed), RollingBack,
			"A step failed, the pause process died early, or a pending rollback is retried."},
		{FinishRollback, []State{RollingBack}, RolledBack, "Every step was undone."},
		{LosePause, []State{Ready}, NotReady, "The pause process exited."},
		{Stop, []State{Ready, NotReady, CleanupOwed}, Stopping, "A caller stops the sandbox, or a pending stop is retried."},
		{FinishStop, []State{Stopping}, Stopped, "Its processes and its network are gone."},
		{Remove, []State{Stopped, CleanupOwed, Quarantined}, Removing, "A caller removes the sandbox, or a pending removal is retried."},
		{FinishRemove, []State{Removing}, Removed, "Its files and records are gone."},
		{LeaveCleanupPending, []State{RollingBack, Stopping, Removing}, CleanupOwed, "An undo failed, and the cleanup is pending."},
		{Quarantine, with(unfinished, Ready, RollingBack, CleanupOwed, NotReady, Stopping, Stopped, Removing), Quarantined,
			"The sandbox's record was found damaged or unreadable."},
	}
}

func with(states []State, more ...State) []State {
	return append(append([]State(nil), states...), more...)
}
