// Package states holds the states of a pod sandbox, the events that move it
// from one to the next, and the table that says which event is legal where.
//
// It decides nothing else: what an event does, and when it is fired, is the
// engine's business. The package does no I/O, and everything in it but
// [Machine] is immutable.
package states

import "slices"

//go:generate go run ./gen ../docs

// State is a fact about a sandbox, in the past tense. Its string is the
// constant's name; it stands in journals, metrics and API answers, so it never
// changes.
type State string

// The states of the creation path, in order. A sandbox is in the last one whose
// event was recorded.
const (
	New              State = "New"
	IDsAllocated     State = "IDsAllocated"
	SnapshotRemapped State = "SnapshotRemapped"
	PauseStarted     State = "PauseStarted"
	NetNSCaptured    State = "NetNSCaptured"
	NetworkReady     State = "NetworkReady"
	Ready            State = "Ready"
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

// Event is what moves a sandbox from one state to another, as a verb. Its
// string stands in journals and API answers, so it never changes.
type Event string

// The events of the creation path, in order.
const (
	AllocateIDs   Event = "allocate_ids"
	RemapSnapshot Event = "remap_snapshot"
	StartPause    Event = "start_pause"
	CaptureNetNS  Event = "capture_netns"
	AttachNetwork Event = "attach_network"
	DeclareReady  Event = "declare_ready"
)

// StartShim is a step that is no event: a ready sandbox stays ready. It starts the process that runs the pod's containers.
const StartShim Event = "start_shim"

// The events off the creation path.
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

var stateMeanings = []struct {
	state   State
	meaning string
}{
	{New, "The sandbox is recorded; nothing has been made for it."},
	{IDsAllocated, "Its user and group id ranges are its pod's alone, unless they are the node's, and on record."},
	{SnapshotRemapped, "The rootfs of its pause container is owned by those ids."},
	{PauseStarted, "Its pause process runs in the pod's namespaces."},
	{NetNSCaptured, "The pause process's network namespace is proven to be the pod's own, and pinned."},
	{NetworkReady, "Every CNI plugin of its chain has succeeded."},
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

// rules is the transition table. A self-transition must not enter it:
// looplab/fsm reports one as an error ([fsm.NoTransitionError]).
var rules = []struct {
	event   Event
	from    []State
	to      State
	meaning string
}{
	{AllocateIDs, []State{New}, IDsAllocated, "The id ranges were put on record."},
	{RemapSnapshot, []State{IDsAllocated}, SnapshotRemapped, "The pause rootfs was remapped to them."},
	{StartPause, []State{SnapshotRemapped}, PauseStarted, "The pause process was started in its new namespaces."},
	{CaptureNetNS, []State{PauseStarted}, NetNSCaptured, "Its network namespace was captured and pinned."},
	{AttachNetwork, []State{NetNSCaptured}, NetworkReady, "The CNI chain was run."},
	{DeclareReady, []State{NetworkReady}, Ready, "The sandbox was found complete."},
	{RollBack, []State{New, IDsAllocated, SnapshotRemapped, PauseStarted, NetNSCaptured, NetworkReady, CleanupOwed}, RollingBack,
		"A step failed, the pause process died early, or an owed rollback is tried again."},
	{FinishRollback, []State{RollingBack}, RolledBack, "Every step was undone."},
	{LosePause, []State{Ready}, NotReady, "The pause process exited."},
	{Stop, []State{Ready, NotReady, CleanupOwed}, Stopping, "The sandbox shall stop, or an owed stop is tried again."},
	{FinishStop, []State{Stopping}, Stopped, "Its processes and its network are gone."},
	{Remove, []State{Stopped, CleanupOwed, Quarantined}, Removing, "The sandbox shall go, or an owed removal is tried again."},
	{FinishRemove, []State{Removing}, Removed, "Its files and records are gone."},
	{OweCleanup, []State{RollingBack, Stopping, Removing}, CleanupOwed, "An undo failed and is owed."},
	{Quarantine, []State{New, IDsAllocated, SnapshotRemapped, PauseStarted, NetNSCaptured, NetworkReady, Ready, RollingBack, CleanupOwed, NotReady, Stopping, Stopped, Removing}, Quarantined,
		"The sandbox's record was found damaged or unreadable."},
}

// All returns every state, in the order of a sandbox's life.
func All() []State {
	all := make([]State, 0, len(stateMeanings))
	for _, s := range stateMeanings {
		all = append(all, s.state)
	}
	return all
}

// Events returns every event, the creation path's first.
func Events() []Event {
	events := make([]Event, 0, len(rules))
	for _, r := range rules {
		events = append(events, r.event)
	}
	return events
}

// CreationPath returns the events that lead from [New] to [Ready], in order.
func CreationPath() []Event {
	return []Event{AllocateIDs, RemapSnapshot, StartPause, CaptureNetNS, AttachNetwork, DeclareReady}
}

// Steps returns all that is done for a sandbox one after the other, and undone in reverse order: the creation path, then what a ready
// sandbox gets on demand.
func Steps() []Event { return append(CreationPath(), StartShim) }

// Table returns every legal transition, one for each pair of event and source
// state.
func Table() []Transition {
	var table []Transition
	for _, r := range rules {
		for _, from := range r.from {
			table = append(table, Transition{From: from, Event: r.event, To: r.to})
		}
	}
	return table
}

// Next returns the state that event leads to from s, and whether it is legal
// there at all.
func Next(s State, event Event) (State, bool) {
	for _, r := range rules {
		if r.event == event && slices.Contains(r.from, s) {
			return r.to, true
		}
	}
	return "", false
}

// Terminal reports whether no event leads out of s. It is false for a state
// that is not in [All].
func (s State) Terminal() bool {
	return s.known() && !slices.ContainsFunc(Events(), func(e Event) bool {
		_, ok := Next(s, e)
		return ok
	})
}

// Meaning says in a sentence what is true of a sandbox in state s. It is empty
// for a state that is not in [All].
func (s State) Meaning() string {
	for _, known := range stateMeanings {
		if known.state == s {
			return known.meaning
		}
	}
	return ""
}

// Meaning says in a sentence what has happened when e is fired. It is empty for
// an event that is not in [Events].
func (e Event) Meaning() string {
	for _, r := range rules {
		if r.event == e {
			return r.meaning
		}
	}
	return ""
}

func (s State) known() bool {
	return slices.Contains(All(), s)
}
