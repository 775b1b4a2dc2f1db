// Package states holds the states of a pod sandbox, the events that move it
// from one to the next, and the table that says which event is legal where.
//
// The states and events off the creation path are fixed. Those of the creation
// path come from the declarations of the steps: see [NewTable].
//
// The package decides nothing else: what an event does, and when it is fired, is
// the engine's business. It does no I/O, and everything in it but [Machine] is
// immutable.
package states

// State is a fact about a sandbox, in the past tense. It stands in ledgers,
// metrics and API answers, so it never changes.
type State string

// The states at both ends of the creation path. Those between them are declared
// with the steps that lead to them.
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

// Event is what moves a sandbox from one state to another, as a verb. It stands
// in ledgers and API answers, so it never changes.
type Event string

// The events off the creation path. Those of the path are the names of steps.
const (
	RollBack       Event = "roll_back"
	FinishRollback Event = "finish_rollback"
	LosePause      Event = "lose_pause"
	Stop           Event = "stop"
	FinishStop     Event = "finish_stop"
	Remove         Event = "remove"
	FinishRemove   Event = "finish_remove"
	OweCleanup     Event = "owe_cleanup"
	Quarantine     Event = "quarantine"
)

// Transition is one row of the table: in state From, Event leads to To.
type Transition struct {
	From  State
	Event Event
	To    State
}

// Terminal says whether a sandbox in state s has ended: no event leads out of s.
func (s State) Terminal() bool { return s == RolledBack || s == Removed }

// described is a state and what is true of a sandbox in it.
type described struct {
	state   State
	meaning string
}

var newState = described{New, "The sandbox is recorded; nothing has been made for it."}

// fixed are the states after the creation path, from its end on.
var fixed = []described{
	{Ready, "It is complete, and containers may join it."},
	{RollingBack, "Its creation failed or was given up; the steps are being undone in reverse order."},
	{RolledBack, "Nothing of its creation is left on the host."},
	{CleanupOwed, "An undo failed; it is retried until it succeeds, across restarts."},
	{NotReady, "Its pause process is gone; its other resources may still be there."},
	{Stopping, "Its processes are being ended and its network detached."},
	{Stopped, "It has no process and no network; its record and files remain."},
	{Removing, "Its last files and records are being removed."},
	{Removed, "Nothing of it is left on the host."},
	{Quarantined, "Its record cannot be trusted; nothing is done to it until it is stopped or removed."},
}

// rule is an event, the states in which it is legal, and where it leads. A
// self-transition must not become one: looplab/fsm reports it as an error
// ([fsm.NoTransitionError]).
type rule struct {
	event   Event
	from    []State
	to      State
	meaning string
}

// fixedRules are those off the creation path. unfinished are its states before
// [Ready].
func fixedRules(unfinished []State) []rule {
	return []rule{
		{RollBack, with(unfinished, CleanupOwed), RollingBack,
			"A step failed, the pause process died early, or an owed rollback is tried again."},
		{FinishRollback, []State{RollingBack}, RolledBack, "Every step was undone."},
		{LosePause, []State{Ready}, NotReady, "The pause process exited."},
		{Stop, []State{Ready, NotReady, CleanupOwed}, Stopping, "The sandbox shall stop, or an owed stop is tried again."},
		{FinishStop, []State{Stopping}, Stopped, "Its processes and its network are gone."},
		{Remove, []State{Stopped, CleanupOwed, Quarantined}, Removing, "The sandbox shall go, or an owed removal is tried again."},
		{FinishRemove, []State{Removing}, Removed, "Its files and records are gone."},
		{OweCleanup, []State{RollingBack, Stopping, Removing}, CleanupOwed, "An undo failed and is owed."},
		{Quarantine, with(unfinished, Ready, RollingBack, CleanupOwed, NotReady, Stopping, Stopped, Removing), Quarantined,
			"The sandbox's record was found damaged or unreadable."},
	}
}

func with(states []State, more ...State) []State {
	return append(append([]State(nil), states...), more...)
}
