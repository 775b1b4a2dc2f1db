package lifecycle

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
)

// FuzzRestore has any sequence of records, each by three bytes: its kind, its step, transition or claim, and its data. Whatever they are,
// the sandbox is in a state, and has all steps of this release.
func FuzzRestore(f *testing.F) {
	kinds := []journal.Kind{
		journal.Begun, journal.Intent, journal.Noted, journal.Done, journal.UndoIntent, journal.UndoFailed, journal.Undone, journal.Moved, journal.Exited,
		journal.Claimed, journal.Owed, "later",
	}
	spec, err := journal.Marshal(&testSpec{Name: "web"})
	require.NoError(f, err)
	result, err := journal.Marshal(&testResult{})
	require.NoError(f, err)
	exit, err := journal.Marshal(&Exit{Code: 1})
	require.NoError(f, err)
	data := []*journal.Data{nil, spec, result, exit, {TypeURL: "nobody's", Value: []byte("{}")}, {TypeURL: spec.TypeURL, Value: []byte("{")}, {TypeURL: result.TypeURL, Value: []byte("null")}}
	events := append(stepNames(), states.Stop, states.OweCleanup, "", "later")
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
		saved := journal.Sandbox{Key: testKey}
		for ; len(b) >= 3; b = b[3:] {
			kind, at, how := kinds[int(b[0])%len(kinds)], int(b[1]), int(b[2])
			r := journal.Record{Seq: uint64(len(saved.Records) + 1), Key: testKey, Kind: kind, At: time.Unix(1, 0), Error: "failed"}
			r.Step, r.Data = string(events[at%len(events)]), data[how%len(data)]
			r.State, r.Goal, r.Claim = string(all[at%len(all)]), string(all[(at+how)%len(all)]), claims[at%len(claims)]
			r.From, r.Event = string(all[how%len(all)]), string(events[how%len(events)])
			r.WrittenOff = []string{"", "gone"}[how%2]
			saved.Records = append(saved.Records, r)
		}
		describe := func(_ journal.Key, spec any) Request { return Request{Pod: "ns/web", Spec: spec} }
		for _, known := range []Outside{kept, begun, nobodys, rebooted, {Damaged: true, Listed: true, Started: true}} {
			e := &Engine{
				table: testTable, steps: steps, process: steps[2].(Ender), journal: unwritten{}, meter: unmetered{},
				sandboxes: map[journal.Key]*sandbox{}, names: map[string]*sandbox{}, pods: map[string][]*sandbox{},
			}
			requireTaken(t, e.Restore(t.Context(), []journal.Sandbox{saved}, describe, outsideOf(known))[testKey], e)
		}
		views, err := Replay(testTable, []journal.Sandbox{saved}, describe)
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

// requireTaken says that a sandbox is where the action says that it begins.
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
