package lifecycle

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/states"
)

// allEvidence calls f with each possible evidence.
func allEvidence(f func(evidence)) {
	known := append(testTable.States(), "Frozen") // of another release
	path := testTable.PathStates()
	for _, state := range known {
		creating := slices.Contains(path[:len(path)-1], state)
		for _, goal := range []states.State{"", states.RolledBack, states.Stopped, states.Removed, "Frozen"} {
			for claim := Unclaimed; claim <= Discarded; claim++ {
				for bits := range 1 << 14 {
					bit := func(n int) bool { return bits&(1<<n) != 0 }
					e := evidence{
						State: state, Goal: goal, Creating: creating, Claim: claim,
						Unrecorded: bit(0), Unspecified: bit(1), OnlyLasting: bit(2), Whole: bit(3), Exited: bit(4), Found: bit(5), Broken: bit(12), Unsure: bit(13),
						Outside: Outside{
							Rebooted: bit(6), Damaged: bit(7), Incomplete: bit(8), Forgotten: bit(8) && bit(9), Served: bit(9), Listed: bit(10), Started: bit(10) && bit(11),
						},
					}
					if e.possible() {
						f(e)
					}
				}
			}
		}
	}
}

// possible leaves out combinations that contradict each other.
func (e evidence) possible() bool {
	switch {
	case e.Unrecorded:
		return e.State == states.New && e.Unspecified && e.OnlyLasting && !e.Whole && !e.Broken && !e.Exited && !e.Rebooted && e.Claim == Unclaimed && e.Goal == ""
	case e.Found && e.Unsure:
		return false
	case e.Incomplete || e.Forgotten:
		return false // makes no difference for a sandbox with records
	case e.Whole && (e.OnlyLasting || e.Creating), e.State == states.Ready && !e.Whole && !e.Broken:
		return false
	case e.State == states.CleanupOwed:
		return e.Goal != ""
	case e.State != states.Stopping && e.State != states.Stopped && e.State != states.Removing:
		return e.Goal == ""
	}
	return true
}

// TestDecisions checks rules that hold for all evidence.
func TestDecisions(t *testing.T) {
	var count int
	allEvidence(func(e evidence) {
		count++
		a := decide(e)
		pendingTo := func(goal states.State) bool { return e.State == states.CleanupOwed && e.Goal == goal }
		asked := !e.unwanted()
		after := e
		if a.State != "" {
			after.State, after.Creating = a.State, false
		}
		for _, rule := range []struct {
			says  string
			holds bool
		}{
			{"a healthy pod runs on", !(e.State == states.Ready && e.Whole && !e.Rebooted && !e.Exited && !e.Unspecified && asked) ||
				a.Work == WorkAdopt && !a.AssumeActed && !a.Sweep},
			{"a pod that the host shows runs on", !(e.Found && e.mayLive()) || a.Work == WorkAdopt && a.State == states.Ready && !a.AssumeActed && !a.Sweep},
			{"a sandbox that may run is not undone", !(e.Unsure && e.mayLive()) || a == Action{Work: WorkKeep, State: states.Quarantined, Claim: Taken}},
			{"nothing is adopted after a reboot", !e.Rebooted || a.Work != WorkAdopt},
			{"nothing is adopted whose process has ended", !e.Exited || a.Work != WorkAdopt},
			{"nothing is adopted that isn't ready", a.Work != WorkAdopt || after.State == states.Ready},
			{"an unwanted sandbox is not adopted", a.Work != WorkAdopt || asked || a.Claim == Taken},
			{"the host counts only if records are missing, in this boot", !(e.Found && (e.Rebooted || !e.recordsMissing())) ||
				a == decide(altered(e, func(e *evidence) { e.Found = false }))},
			{"a removal stays a removal", !(e.State == states.Removing || pendingTo(states.Removed)) || e.Unspecified || a.Work == WorkRemove},
			{"a rollback stays a rollback", !(e.State == states.RollingBack || pendingTo(states.RolledBack)) || e.Unspecified || a.Work == WorkRollBack},
			{"a stop goes on", !(e.State == states.Stopping || pendingTo(states.Stopped)) || e.Unspecified || a.Work == WorkStop || a.Work == WorkRemove},
			{"a stopped sandbox isn't stopped again", e.State != states.Stopped || a.Work == WorkKeep || a.Work == WorkRemove},
			{"a claimed and listed sandbox isn't removed", !(e.Claim == Shown || e.Claim == Taken) || e.Served && !e.Listed || e.Creating || e.State == states.Removing ||
				e.Goal == states.Removed || a.Work != WorkRemove},
			{"a sandbox that containerd doesn't list doesn't stay", !(e.Served && !e.Listed) || e.State.Terminal() || a.Work == WorkRemove || a.Work == WorkRollBack || a.Work == WorkDrop},
			{"a half-made pod is rolled back", !(e.Creating && !e.Started && !e.Unspecified && !e.Unrecorded) || a.Work == WorkRollBack && a.Sweep},
			{"a sandbox that was ready stays listed", !(e.Listed && e.Started && e.Claim == Taken && e.Goal == "" && (e.State == states.Ready || e.State == states.NotReady)) || !a.Sweep},
			{"a sandbox that is gone is undone", !(a.AssumeActed && (e.State == states.Ready || e.State == states.NotReady)) || e.Unspecified ||
				a.Work == WorkStop || a.Work == WorkRemove},
			{"a sandbox with lost records may be claimed", !a.AssumeActed || a.Claim >= Taken},
			{"a quarantined sandbox is left alone", a.State != states.Quarantined || a.Work == WorkKeep || a.Work == WorkRemove && (e.Served && !e.Listed || e.Claim == Discarded)},
			{"claims only rise", a.Work == WorkDrop || a.Claim >= e.Claim},
			{"a sandbox on record isn't dropped", a.Work != WorkDrop || e.Unrecorded},
			{"a sandbox that may run isn't dropped", a.Work != WorkDrop || e.Forgotten || !e.Started},
			{"containerd keeps what podfsm keeps", !a.Sweep || a.Work != WorkKeep || e.State.Terminal()},
		} {
			if !rule.holds { // testify is too slow for so many
				t.Fatalf("%s: %+v gives %+v", rule.says, e, a)
			}
		}
	})
	require.Greater(t, count, 10000)
}

func altered(e evidence, change func(*evidence)) evidence {
	change(&e)
	return e
}

// TestDecisionsByName checks the cases of real nodes.
func TestDecisionsByName(t *testing.T) {
	served := Outside{Served: true, Listed: true, Started: true}
	ready := evidence{State: states.Ready, Whole: true, Claim: Taken, Outside: served}
	made := evidence{State: networkReady, Creating: true, Outside: Outside{Served: true, Listed: true}}
	lastingOnly := evidence{State: networkReady, Creating: true, OnlyLasting: true, Outside: served}
	lastingOnly.Damaged = true
	for name, tc := range map[string]struct {
		e    evidence
		want Action
	}{
		"ready": {ready, Action{Work: WorkAdopt, Claim: Taken}},
		"ready, records of others damaged": {
			altered(ready, func(e *evidence) { e.Damaged, e.Claim = true, Shown }), Action{Work: WorkAdopt, Claim: Taken}},
		"ready, not claimed yet": {altered(ready, func(e *evidence) { e.Claim = Unclaimed }), Action{Work: WorkAdopt}},
		"ready, not handed to containerd's service yet": {
			altered(ready, func(e *evidence) { e.Claim, e.Started = Unclaimed, false }), Action{Work: WorkRemove, Claim: Discarded, Sweep: true}},
		"ready, discarded": {
			altered(ready, func(e *evidence) { e.Claim = Discarded }), Action{Work: WorkRemove, Claim: Discarded, Sweep: true}},
		"ready, containerd's service has lost it": {
			altered(ready, func(e *evidence) { e.Listed, e.Started = false, false }), Action{Work: WorkRemove, Claim: Discarded, Sweep: true}},
		"ready, before a reboot": {
			altered(ready, func(e *evidence) { e.Rebooted = true }), Action{Work: WorkStop, State: states.NotReady, AssumeActed: true, Claim: Taken}},
		"ready, its specification is a later release's": {
			altered(ready, func(e *evidence) { e.Unspecified = true }), Action{Work: WorkAdopt, Claim: Taken}},
		"made": {made, Action{Work: WorkRollBack, Sweep: true}},
		"made, before a reboot": {
			altered(made, func(e *evidence) { e.Rebooted = true }), Action{Work: WorkRollBack, AssumeActed: true, Claim: Taken, Sweep: true}},
		"made, its specification is a later release's": {
			altered(made, func(e *evidence) { e.Unspecified = true }), Action{Work: WorkKeep, State: states.Quarantined, Claim: Taken}},
		"without the log, and it runs": {
			altered(lastingOnly, func(e *evidence) { e.Found = true }), Action{Work: WorkAdopt, State: states.Ready, Claim: Taken}},
		"without the log, and it doesn't run": {lastingOnly, Action{Work: WorkStop, State: states.NotReady, AssumeActed: true, Claim: Taken}},
		"without the log, half made": {
			altered(lastingOnly, func(e *evidence) { e.Started = false }), Action{Work: WorkRollBack, AssumeActed: true, Claim: Taken, Sweep: true}},
		"without the log, killed when part of it was found again": {
			evidence{State: states.Ready, Broken: true, Claim: Taken, Found: true, Outside: served}, Action{Work: WorkAdopt, State: states.Ready, Claim: Taken}},
		"half made, and killed when it was taken up without the log": {
			altered(made, func(e *evidence) { e.Broken = true }), Action{Work: WorkRollBack, AssumeActed: true, Claim: Taken, Sweep: true}},
		"stopped": {evidence{State: states.Stopped, Whole: true, Claim: Taken, Outside: served}, Action{Work: WorkKeep, Claim: Taken}},
		"removing": {
			evidence{State: states.Removing, Whole: true, Claim: Taken, Outside: served}, Action{Work: WorkRemove, Claim: Taken, Sweep: true}},
		"pending removal": {
			evidence{State: states.CleanupOwed, Goal: states.Removed, Whole: true, Claim: Taken, Outside: served},
			Action{Work: WorkRemove, Claim: Taken, Sweep: true}},
		"pending rollback": {
			evidence{State: states.CleanupOwed, Goal: states.RolledBack}, Action{Work: WorkRollBack, Sweep: true}},
		"a cleanup that only a later release knows": {
			evidence{State: states.CleanupOwed, Goal: "Frozen", Whole: true, Claim: Taken, Outside: served}, Action{Work: WorkKeep, Claim: Taken}},
		"lost, and containerd's service has it as started": {
			evidence{State: states.New, Creating: true, Unrecorded: true, Unspecified: true, OnlyLasting: true, Outside: served},
			Action{Work: WorkKeep, State: states.Quarantined, AssumeActed: true, Claim: Taken}},
		"never begun": {
			evidence{State: states.New, Creating: true, Unrecorded: true, Unspecified: true, OnlyLasting: true, Outside: Outside{Served: true, Listed: true}},
			Action{Work: WorkDrop, Sweep: true}},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tc.want, decide(tc.e), fmt.Sprintf("%+v", tc.e))
		})
	}
}
