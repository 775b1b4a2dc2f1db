package lifecycle

import "github.com/podfsm/podfsm/states"

// Outside is what recovery knows of a sandbox besides the sandbox's own records.
type Outside struct {
	// Rebooted says that the sandbox was begun before this boot: whatever the kernel had for the sandbox is gone.
	Rebooted bool
	// Damaged says that the ledger has lost records, and that some of them may be the sandbox's.
	Damaged bool
	// Incomplete says that the ledger may have lost sandboxes. Forgotten says that the ledger has forgotten this one on purpose.
	Incomplete, Forgotten bool
	// Served says that containerd's CRI service has the sandbox from its caller: nobody asks for a sandbox that the service doesn't list.
	Served bool
	// Listed says that containerd has a record of the sandbox. Started says that, by that record, the sandbox was started.
	Listed, Started bool
}

// evidence is all that recovery decides by.
type evidence struct {
	Outside
	Unrecorded  bool // no record of the sandbox is left
	Unspecified bool // its specification can't be read
	OnlyLasting bool // no record is left but those that outlive a reboot
	Whole       bool // every transition up to Ready is on record
	Broken      bool // a transition is on record, and what led to it isn't
	State       states.State
	Goal        states.State
	Creating    bool // State is one before Ready, of any release
	Claim       Claim
	Exited      bool // its process has ended, by the records
	// Found says that the host shows all that a ready sandbox has. The host is looked at only where mayLive says so.
	Found bool
	// Unsure says that the host was looked at, and has not answered in time.
	Unsure bool
}

// Work is what recovery does for a sandbox.
type Work string

const (
	// WorkDrop takes no sandbox into the engine: nothing was ever made for it, or nothing is left of it.
	WorkDrop Work = "drop"
	// WorkKeep leaves the sandbox as it is, until somebody asks for its end.
	WorkKeep Work = "keep"
	// WorkAdopt watches the process of a ready sandbox, after a look whether the process lives.
	WorkAdopt Work = "adopt"
	// WorkRollBack undoes a creation.
	WorkRollBack Work = "roll back"
	// WorkStop stops the sandbox, which stays listed until somebody removes it.
	WorkStop Work = "stop"
	// WorkRemove removes the sandbox.
	WorkRemove Work = "remove"
)

// Action is what recovery does about a sandbox.
type Action struct {
	Work Work
	// State is the state to which recovery moves the sandbox first: Ready, NotReady or Quarantined; "" leaves the sandbox in its own.
	State states.State
	// Lost says that each step counts as having acted, whatever is on record, and that the process has ended.
	Lost bool
	// Claim is the least claim that the sandbox has from then on.
	Claim Claim
	// Sweep says that containerd's record and lease of the sandbox go.
	Sweep bool
}

// decide is the one place where recovery decides. It depends on nothing but the evidence.
func decide(e evidence) Action {
	switch {
	case e.Unrecorded && (e.Forgotten || !e.Started && !e.Incomplete):
		return Action{Work: WorkDrop, Sweep: true}
	case e.Found && e.mayLive():
		return Action{Work: WorkAdopt, State: states.Ready, Claim: Taken}
	case e.Unsure && e.mayLive():
		return Action{Work: WorkKeep, State: states.Quarantined, Claim: Taken} // nothing is undone of what may live
	}
	a := Action{Lost: e.lost()}
	a.State = e.moved(a.Lost)
	if a.Lost || a.State == states.Quarantined || e.State == states.Quarantined {
		e.Claim = max(e.Claim, Taken) // somebody may have claimed it, on a record that is lost
	}
	if a.State != "" {
		e.State, e.Creating = a.State, false
	}
	a.Claim, a.Work = e.Claim, e.work(a.Lost)
	if e.Damaged {
		a.Claim = max(a.Claim, Taken)
	}
	if finished := e.State == states.Ready || e.State == states.NotReady; finished && a.Work == WorkRemove {
		a.Claim = Discarded // a retry must not get it while it waits for its removal
	}
	a.Sweep = a.Work == WorkRollBack || a.Work == WorkRemove || e.State.Terminal()
	return a
}

// lost says that the sandbox has lost records, or what they say exists.
func (e evidence) lost() bool { return e.Rebooted || e.gaps() }

// gaps says that records of the sandbox are missing. Only a sandbox that was ready is known to containerd's service as started.
func (e evidence) gaps() bool {
	return e.OnlyLasting || !e.Whole && (e.Damaged || e.Broken || e.Served && e.Started)
}

// mayLive says that the sandbox may be ready although its records can't show it: the host can.
func (e evidence) mayLive() bool {
	return e.gaps() && !e.Rebooted && !e.Exited && !e.Unspecified && !e.nobodys() && (e.State == states.Ready || e.Creating && e.Started)
}

// nobodys says that nobody will ask for the sandbox: containerd's service doesn't know it, or has not taken it over from its creation.
func (e evidence) nobodys() bool {
	return e.Served && !e.Listed || e.Claim == Discarded || e.Claim == Unclaimed && !e.Started
}

// moved is where the sandbox has to go, whatever its last record says.
func (e evidence) moved(lost bool) states.State {
	wasReady := e.State == states.Ready || e.Creating && e.Listed && e.Started
	switch {
	case e.State.Terminal() || e.State == states.Quarantined:
		return ""
	case e.Unspecified && !e.adoptable():
		return states.Quarantined
	case lost && wasReady, e.State == states.Ready && e.Exited:
		return states.NotReady
	default:
		return ""
	}
}

// adoptable says that a sandbox without a specification can run on: all else is on record, and containerd's record stands in for it.
func (e evidence) adoptable() bool {
	return e.State == states.Ready && e.Whole && e.Served && e.Started && !e.Rebooted
}

// work is what a sandbox in its state needs.
func (e evidence) work(lost bool) Work {
	owed := e.State == states.CleanupOwed
	switch {
	case e.State.Terminal():
		return WorkKeep
	case e.Creating, e.State == states.RollingBack, owed && e.Goal == states.RolledBack:
		return WorkRollBack
	case e.State == states.Removing, e.Goal == states.Removed && e.State != states.Quarantined, e.nobodys():
		return WorkRemove
	case e.State == states.Stopping, owed && e.Goal == states.Stopped, e.State == states.NotReady && lost:
		return WorkStop
	case e.State == states.Ready:
		return WorkAdopt
	default:
		return WorkKeep
	}
}
