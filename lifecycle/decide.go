package lifecycle

import "github.com/podfsm/podfsm/states"

// Outside is what recovery knows of a sandbox besides the sandbox's own records.
type Outside struct {
	// Rebooted says that the sandbox was begun before this boot. Nothing of the sandbox is left in the kernel.
	Rebooted bool
	// Damaged says that records are missing in the ledger, and that some of them may be the sandbox's.
	Damaged bool
	// Incomplete says that sandboxes may be missing in the ledger. Forgotten says that the ledger forgot this one on
	// purpose.
	Incomplete, Forgotten bool
	// Served says that the sandbox came by CRI. No caller asks for a sandbox that containerd's CRI service doesn't list.
	Served bool
	// Listed says that containerd has a record of the sandbox. Started says that, by that record, the sandbox was started.
	Listed, Started bool
}

// evidence is the recovery evidence. decide considers nothing else.
type evidence struct {
	Outside
	Unrecorded  bool // no record of the sandbox is left
	Unspecified bool // its specification can't be read
	OnlyLasting bool // only records that outlive a reboot are left
	Whole       bool // every transition up to Ready is on record
	Broken      bool // a transition is on record without those that led to it
	State       states.State
	Goal        states.State
	Creating    bool // State is one before Ready, of any release
	Claim       Claim
	Exited      bool // its process has ended, by the records
	// Found says that the host shows all that a ready sandbox has. Recovery examines the host only if mayLive.
	Found bool
	// Unsure says that the host was examined, and did not answer in time.
	Unsure bool
}

// Work is what recovery does for a sandbox.
type Work string

const (
	// WorkDrop adds no sandbox to the engine: nothing was made for it, or nothing is left.
	WorkDrop Work = "drop"
	// WorkKeep leaves the sandbox as it is until a caller stops or removes it.
	WorkKeep Work = "keep"
	// WorkAdopt checks whether the process of a ready sandbox runs, and watches for its exit.
	WorkAdopt Work = "adopt"
	// WorkRollBack undoes a creation.
	WorkRollBack Work = "roll back"
	// WorkStop stops the sandbox, which stays listed until a caller removes it.
	WorkStop Work = "stop"
	// WorkRemove removes the sandbox.
	WorkRemove Work = "remove"
)

// Action is the recovery action for a sandbox.
type Action struct {
	Work Work
	// State is the state to which recovery moves the sandbox first: Ready, NotReady or Quarantined; "" for no move.
	State states.State
	// AssumeActed says that every step counts as having acted, whatever is on record, and the process as ended.
	AssumeActed bool
	// Claim is the least claim that the sandbox has from then on.
	Claim Claim
	// Sweep says that containerd's record and lease of the sandbox are deleted.
	Sweep bool
}

// decide returns the recovery action for the evidence. It depends on nothing else, and nothing else in recovery decides.
func decide(e evidence) Action {
	switch {
	case e.Unrecorded && (e.Forgotten || !e.Started && !e.Incomplete):
		return Action{Work: WorkDrop, Sweep: true}
	case e.Found && e.mayLive():
		return Action{Work: WorkAdopt, State: states.Ready, Claim: Taken}
	case e.Unsure && e.mayLive():
		return Action{Work: WorkKeep, State: states.Quarantined, Claim: Taken} // never undo a sandbox that may run
	}
	a := Action{AssumeActed: e.unreliable()}
	a.State = e.moveTo(a.AssumeActed)
	moved := e.movedBy(a)
	a.Work = moved.work(a.AssumeActed)
	a.Claim = moved.claimFor(a.Work)
	a.Sweep = a.Work == WorkRollBack || a.Work == WorkRemove || moved.State.Terminal()
	return a
}

// movedBy returns the evidence once the action has moved the sandbox.
func (e evidence) movedBy(a Action) evidence {
	if a.State != "" {
		e.State, e.Creating = a.State, false
	}
	if a.AssumeActed || e.State == states.Quarantined {
		e.Claim = max(e.Claim, Taken) // the record of a claim may be missing
	}
	return e
}

// claimFor returns the least claim that the sandbox has from the work on.
func (e evidence) claimFor(work Work) Claim {
	finished := e.State == states.Ready || e.State == states.NotReady
	switch {
	case finished && work == WorkRemove:
		return Discarded // a retry of the creation must not get a sandbox that waits for its removal
	case e.Damaged:
		return max(e.Claim, Taken) // the record of a claim may be missing; the work goes by the claim on record
	default:
		return e.Claim
	}
}

// unreliable says that the sandbox's records are incomplete, or describe what a reboot ended.
func (e evidence) unreliable() bool { return e.Rebooted || e.recordsMissing() }

// recordsMissing says that records of the sandbox are missing. containerd's service has only a sandbox that was ready as
// started.
func (e evidence) recordsMissing() bool {
	return e.OnlyLasting || !e.Whole && (e.Damaged || e.Broken || e.Served && e.Started)
}

// mayLive says that the sandbox may be ready although its records don't show it. The host can show it.
func (e evidence) mayLive() bool {
	return e.recordsMissing() && !e.Rebooted && !e.Exited && !e.Unspecified && !e.unwanted() && (e.State == states.Ready || e.Creating && e.Started)
}

// unwanted says that no caller will ask for the sandbox: containerd's service doesn't know it, or never took it over from
// its creation.
func (e evidence) unwanted() bool {
	return e.Served && !e.Listed || e.Claim == Discarded || e.Claim == Unclaimed && !e.Started
}

// moveTo returns the state to which the sandbox has to move, whatever its last record says; "" for no move.
func (e evidence) moveTo(unreliable bool) states.State {
	wasReady := e.State == states.Ready || e.Creating && e.Listed && e.Started
	switch {
	case e.State.Terminal() || e.State == states.Quarantined:
		return ""
	case e.Unspecified && !e.adoptable():
		return states.Quarantined
	case unreliable && wasReady, e.State == states.Ready && e.Exited:
		return states.NotReady
	default:
		return ""
	}
}

// adoptable says that a sandbox without a specification can run on: all else is on record, and containerd's record
// replaces the specification.
func (e evidence) adoptable() bool {
	return e.State == states.Ready && e.Whole && e.Served && e.Started && !e.Rebooted
}

// work returns what a sandbox in its state needs.
func (e evidence) work(unreliable bool) Work {
	pending := e.State == states.CleanupOwed
	switch {
	case e.State.Terminal():
		return WorkKeep
	case e.Creating, e.State == states.RollingBack, pending && e.Goal == states.RolledBack:
		return WorkRollBack
	case e.State == states.Removing, e.Goal == states.Removed && e.State != states.Quarantined, e.unwanted():
		return WorkRemove
	case e.State == states.Stopping, pending && e.Goal == states.Stopped, e.State == states.NotReady && unreliable:
		return WorkStop
	case e.State == states.Ready:
		return WorkAdopt
	default:
		return WorkKeep
	}
}
