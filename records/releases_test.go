package records

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// replayed are sandboxes by their pods.
func replayed(t *testing.T, saved []journal.Sandbox) map[string]lifecycle.View {
	t.Helper()
	views, err := Replay(saved)
	require.NoError(t, err)
	byPod := map[string]lifecycle.View{}
	for _, view := range views {
		byPod[view.Pod] = view
	}
	return byPod
}

// fixtures are what daemons of each release had on record when they were killed.
func fixtures(t *testing.T) map[string][]journal.Sandbox {
	t.Helper()
	found, err := filepath.Glob("testdata/release-*.json")
	require.NoError(t, err)
	require.NotEmpty(t, found)
	all := map[string][]journal.Sandbox{}
	for _, path := range found {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		var saved []journal.Sandbox
		require.NoError(t, json.Unmarshal(text, &saved))
		all[filepath.Base(path)] = saved
	}
	return all
}

// An upgrade finds all of what an older podfsm has left.
func TestRecordsOfAllReleases(t *testing.T) {
	for name, saved := range fixtures(t) {
		t.Run(name, func(t *testing.T) {
			for _, sandbox := range saved {
				for _, r := range sandbox.Records {
					require.NotEmpty(t, r.Release)
				}
			}
			pods := replayed(t, saved)
			requireFixture(t, pods)
			for _, view := range pods {
				require.Empty(t, view.Unread)
			}
		})
	}
}

func requireFixture(t *testing.T, pods map[string]lifecycle.View) {
	t.Helper()
	for pod, want := range map[string]states.State{
		"default/ready": states.Ready, "default/on-node": states.Ready, "default/stopped": states.Stopped, "default/owed": states.CleanupOwed,
	} {
		view, ok := pods[pod]
		require.True(t, ok, pod)
		require.Equal(t, want, view.State, pod)
		require.NotZero(t, view.Step("start_pause").Result.(*Pause).Pid)
		require.NotEmpty(t, view.Transitions)
		response, err := Inspection(view)
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(response.GetSteps()), len(Table().Path()))
	}
	ready := pods["default/ready"]
	network, ok := NetworkOf(ready)
	require.True(t, ok)
	require.Regexp(t, `^10\.88\.0\.\d+$`, network.IP)
	require.EqualValues(t, 65536, Sandbox(ready).GetUserns().GetUids()[0].GetLength())
	require.NotEmpty(t, ready.Step("capture_netns").Result.(*NetNS).Path)
}

// After a downgrade a sandbox is what it was, whatever a later release has added to its records, and they stay for when that comes back.
func TestRecordsOfALaterRelease(t *testing.T) {
	for what, later := range map[string]journal.Record{
		"a step":                {Kind: journal.Intent, Step: "later_step", AtStop: true},
		"a result of a step":    {Kind: journal.Done, Step: "later_step"},
		"a type of data":        {Kind: journal.Noted, Step: "start_pause", Data: &journal.Data{TypeURL: "podfsm/Later", Value: []byte(`{"Kept":"as it is"}`)}},
		"a kind":                {Kind: "later"},
		"a kind for a step":     {Kind: "later", Step: "start_pause"},
		"a claim":               {Kind: journal.Claimed, Claim: "later"},
		"a way back to Ready":   {Kind: journal.Moved, From: "Later", Event: "later_event", State: "Ready"},
		"a goal that is no one": {Kind: journal.Moved, From: "Later", Event: "later_event", State: "Ready", Goal: "Later"},
	} {
		t.Run(what, func(t *testing.T) {
			for name, saved := range fixtures(t) {
				before := replayed(t, saved)
				root, state := t.TempDir(), t.TempDir()
				ledger, err := journal.Open(root, state)
				require.NoError(t, err)
				for _, sandbox := range saved {
					for _, r := range sandbox.Records {
						require.NoError(t, ledger.Append(t.Context(), &r))
					}
				}
				later.Key, later.Durable, later.Release = before["default/ready"].Key, true, "v9.0.0"
				require.NoError(t, ledger.Append(t.Context(), &later))
				require.NoError(t, ledger.Close())

				for range 2 { // opening it, which may write it anew, takes nothing from it
					ledger, err = journal.Open(root, state)
					require.NoError(t, err)
					require.Empty(t, ledger.Damage())
					after := replayed(t, ledger.Sandboxes())
					requireFixture(t, after)
					require.True(t, slices.ContainsFunc(ledger.Sandboxes(), func(saved journal.Sandbox) bool {
						return slices.ContainsFunc(saved.Records, func(r journal.Record) bool {
							kept := later
							kept.Seq, kept.At = r.Seq, r.At
							return reflect.DeepEqual(r, kept)
						})
					}), "%s: its record stays", name)
					require.NoError(t, ledger.Close())
				}
			}
		})
	}
}

// What this release can't undo is shown as that.
func TestUnknownStepIsShown(t *testing.T) {
	for _, saved := range fixtures(t) {
		key := replayed(t, saved)["default/ready"].Key
		i := slices.IndexFunc(saved, func(s journal.Sandbox) bool { return s.Key == key })
		saved[i].Records = append(saved[i].Records, journal.Record{Kind: journal.Intent, Step: "later_step", Release: "v9.0.0"}, journal.Record{Kind: "later", Release: "v9.0.0"})
		view := replayed(t, saved)["default/ready"]
		require.Equal(t, states.Ready, view.State)
		require.Len(t, view.Unread, 1)
		response, err := Inspection(view)
		require.NoError(t, err)
		last := response.GetSteps()[len(response.GetSteps())-1]
		require.Equal(t, "later_step", last.GetName())
		require.Contains(t, last.GetDetail()["unknown"], "v9.0.0")
	}
}
