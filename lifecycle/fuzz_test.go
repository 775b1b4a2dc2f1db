package lifecycle

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
)

// FuzzRestore has any sequence of records, each by three bytes: its kind, its step, state or claim, and what is wrong with it. Whatever
// they are, the sandbox is in a state that there is, and where they can't all be read it is quarantined.
func FuzzRestore(f *testing.F) {
	kinds := []journal.Kind{
		journal.Begun, journal.Intent, journal.Noted, journal.Done, journal.UndoIntent, journal.Undone, journal.Moved, journal.Exited,
		journal.Claimed, journal.Owed, "later",
	}
	spec, err := journal.Marshal(&testSpec{Name: "web"})
	require.NoError(f, err)
	result, err := journal.Marshal(&testResult{})
	require.NoError(f, err)
	exit, err := journal.Marshal(&Exit{Code: 1})
	require.NoError(f, err)
	data := []*journal.Data{nil, spec, result, exit, {TypeURL: "nobody's", Value: []byte("{}")}, {TypeURL: spec.TypeURL, Value: []byte("{")}, {TypeURL: result.TypeURL, Value: []byte("null")}}
	events := append(states.Steps(), "", "later")
	all := append(states.All(), "", "Later")
	claims := append(slices.Clone(claimNames), "", "later")

	f.Add([]byte{0, 0, 1})
	f.Add([]byte{0, 0, 1, 1, 0, 0, 3, 0, 2, 1, 1, 0, 9, 6, 0})
	f.Add([]byte{3, 0, 2, 0, 0, 1, 6, 7, 0, 7, 6, 3, 10, 0, 0})
	f.Add([]byte{0, 0, 1, 1, 0, 128})
	f.Add([]byte{0, 0, 1, 9, 7, 10})
	f.Fuzz(func(t *testing.T, b []byte) {
		saved := journal.Sandbox{Key: testKey}
		readable := true
		for ; len(b) >= 3; b = b[3:] {
			kind, at, how := kinds[int(b[0])%len(kinds)], int(b[1]), int(b[2])
			r := journal.Record{Seq: uint64(len(saved.Records) + 1), Key: testKey, Kind: kind, Version: definitionVersion, At: time.Unix(1, 0), Error: "failed"}
			r.Step, r.Data = string(events[at%len(events)]), data[how%len(data)]
			r.State, r.Goal, r.Claim = string(all[at%len(all)]), string(all[(at+how)%len(all)]), claims[at%len(claims)]
			if how >= 128 {
				r.Version++
				readable = false
			}
			saved.Records = append(saved.Records, r)
		}
		views, err := Replay([]journal.Sandbox{saved}, func(_ journal.Key, spec any) (Request, Past) {
			return Request{Pod: "ns/web", Spec: spec}, Past(len(saved.Records) % 3)
		})
		require.NoError(t, err)
		require.Len(t, views, 1)
		require.Contains(t, states.All(), views[0].State)
		if views[0].State == states.CleanupOwed {
			require.Contains(t, goals, views[0].Goal, "a cleanup that leads nowhere is never done")
		}
		shown := states.Steps()[:len(views[0].Steps)]
		require.GreaterOrEqual(t, len(shown), len(states.CreationPath()))
		for i, step := range views[0].Steps {
			require.Equal(t, shown[i], step.Name)
		}
		if !readable && !views[0].State.Terminal() {
			require.Equal(t, states.Quarantined, views[0].State, "of a record that a later version wrote nobody knows what it means")
		}
	})
}
