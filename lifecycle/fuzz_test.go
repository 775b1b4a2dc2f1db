package lifecycle

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// FuzzRestore restores any sequence of records, each encoded in three bytes: its kind, its step,
// transition or claim, and its data. The sandbox always has a state and all steps of this release.
func FuzzRestore(f *testing.F) {
	kinds := []ledger.Kind{
		ledger.Begun, ledger.Intent, ledger.Noted, ledger.Done, ledger.UndoIntent, ledger.UndoFailed, ledger.Undone, ledger.Moved, ledger.Exited,
		ledger.Claimed, ledger.CleanupPending, "later",
	}
	spec, err := ledger.Marshal(&testSpec{Name: "web"})
	require.NoError(f, err)
	result, err := ledger.Marshal(&testResult{})
	require.NoError(f, err)
	exit, err := ledger.Marshal(&Exit{Code: 1})
	require.NoError(f, err)
	data := []*ledger.Data{nil, spec, result, exit, {TypeURL: "nobody's", Value: []byte("{}")}, {TypeURL: spec.TypeURL, Value: []byte("{")}, {TypeURL: result.TypeURL, Value: []byte("null")}}
	events := append(stepNames(), states.Stop, states.LeaveCleanupPending, "", "later")
	all := append(testTable.States(), "", "Later")
	claims := append(slices.Clone(claimNames), "", "later")

	steps := newWorldOn(f, unwritten{}, newNode()).steps
	steps[0].(*fakeStep).node.exists = stepNames() // the host shows all

	f.Add([]byte{0, 0, 1})
	f.Add([]byte{0, 0, 1, 1, 0, 0, 3, 0, 2, 1, 1, 0, 9, 6, 0})
	f.Add([]byte{3, 0, 2, 0, 0, 1, 6, 7, 0, 7, 6, 3, 10, 0, 0})
	f.Add([]byte{0, 0, 1, 1, 0, 128})
	f.Add([]byte{0, 0, 1, 9, 7, 10})
	f.Fuzz(func(t *testing.T, b []byte) {
		saved := ledger.Sandbox{Key: testKey}
		for ; len(b) >= 3; b = b[3:] {
			kind, at, how := kinds[int(b[0])%len(kinds)], int(b[1]), int(b[2])
			r := ledger.Record{Seq: uint64(len(saved.Records) + 1), Key: testKey, Kind: kind, At: time.Unix(1, 0), Error: "failed"}
			r.Step, r.Data = string(events[at%len(events)]), data[how%len(data)]
			r.State, r.Goal, r.Claim = string(all[at%len(all)]), string(all[(at+how)%len(all)]), claims[at%len(claims)]
			r.From, r.Event = string(all[how%len(all)]), string(events[how%len(events)])
			r.WrittenOff = []string{"", "gone"}[how%2]
			saved.Records = append(saved.Records, r)
		}
		describe := func(_ ledger.Key, spec any) Request { return Request{Pod: "ns/web", Spec: spec} }
		for _, known := range []Outside{kept, begun, unlisted, rebooted, {Damaged: true, Listed: true, Started: true}} {
			e := &Engine{
				table: testTable, steps: steps, process: steps[2].(Ender), ledger: unwritten{}, meter: unmetered{},
				sandboxes: map[ledger.Key]*sandbox{}, names: map[string]*sandbox{}, pods: map[string][]*sandbox{},
			}
			requireTaken(t, e.Restore(t.Context(), []ledger.Sandbox{saved}, describe, outsideOf(known))[testKey], e)
		}
		views, err := Replay(testTable, []ledger.Sandbox{saved}, describe)
		require.NoError(t, err)
		require.Len(t, views, 1)
		require.NotEmpty(t, views[0].State)
		if views[0].State == states.CleanupOwed {
			require.NotEmpty(t, views[0].Goal)
		}
		for _, name := range creationPath() {
			require.Equal(t, name, views[0].Step(name).Name)
		}
	})
}

// requireTaken requires that a sandbox is in the state in which its action begins.
func requireTaken(t *testing.T, action Action, e *Engine) {
	require.NotEmpty(t, action.Work)
	s, err := e.lookup(testKey)
	if action.Work == WorkDrop {
		require.Error(t, err)
		return
	}
	require.NoError(t, err)
	if action.State != "" {
		require.Equal(t, action.State, s.state())
	}
	require.Equal(t, action.Work, decide(s.evidence()).Work, "it is still to be done")
}
