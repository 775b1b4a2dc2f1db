package lifecycle

import (
	"slices"
	"time"

	"github.com/podfsm/podfsm/states"
)

// The steps of the tests, and the states that they lead to.
const (
	allocateIDs   states.Event = "allocate_ids"
	remapSnapshot states.Event = "remap_snapshot"
	startPause    states.Event = "start_pause"
	captureNetNS  states.Event = "capture_netns"
	attachNetwork states.Event = "attach_network"
	declareReady  states.Event = "declare_ready"
	startShim     states.Event = "start_shim"

	idsAllocated     states.State = "IDsAllocated"
	snapshotRemapped states.State = "SnapshotRemapped"
	pauseStarted     states.State = "PauseStarted"
	netNSCaptured    states.State = "NetNSCaptured"
	networkReady     states.State = "NetworkReady"
)

// testSteps returns steps that hold each other as the real ones do.
func testSteps() []Declaration {
	return []Declaration{
		declare(allocateIDs, idsAllocated, Declaration{}),
		declare(remapSnapshot, snapshotRemapped, Declaration{Holds: []states.Event{allocateIDs}}),
		declare(startPause, pauseStarted, Declaration{Holds: []states.Event{allocateIDs, remapSnapshot}}),
		declare(captureNetNS, netNSCaptured, Declaration{AtStop: true}),
		declare(attachNetwork, networkReady, Declaration{Holds: []states.Event{captureNetNS}, AtStop: true, Lasting: true, Foreign: true}),
		declare(declareReady, states.Ready, Declaration{}),
		declare(startShim, "", Declaration{Holds: []states.Event{allocateIDs, startPause, captureNetNS}, AtStop: true}),
	}
}

// declare completes a declaration. A step that leads to no state is on demand.
func declare(name states.Event, state states.State, d Declaration) Declaration {
	d.Step = states.Step{Name: name, State: state, Meaning: "It is " + string(state) + ".", Done: string(name) + " was done.", OnDemand: state == ""}
	d.Deadline, d.UndoDeadline = time.Minute, time.Minute
	return d
}

// tableOf returns the table of declarations.
func tableOf(declared []Declaration) *states.Table {
	var steps []states.Step
	for _, d := range declared {
		steps = append(steps, d.Step)
	}
	table, err := states.NewTable(steps)
	if err != nil {
		panic(err)
	}
	return table
}

var testTable = tableOf(testSteps())

func creationPath() []states.Event { return slices.Clone(testTable.Path()) }

func stepNames() []states.Event { return testTable.Steps() }
