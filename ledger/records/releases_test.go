package records_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/states"
)

// replayed are sandboxes by their pods.
func replayed(t *testing.T, saved []ledger.Sandbox) map[string]lifecycle.View {
	t.Helper()
	views, err := records.Replay(saved)
	require.NoError(t, err)
	byPod := map[string]lifecycle.View{}
	for _, view := range views {
		byPod[view.Pod] = view
	}
	return byPod
}

// fixtures are the ledgers of killed daemons, one per release.
func fixtures(t *testing.T) map[string][]ledger.Sandbox {
	t.Helper()
	found, err := filepath.Glob("testdata/release-*.json")
	require.NoError(t, err)
	require.NotEmpty(t, found)
	all := map[string][]ledger.Sandbox{}
	for _, path := range found {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		var saved []ledger.Sandbox
		require.NoError(t, json.Unmarshal(text, &saved))
		all[filepath.Base(path)] = saved
	}
	return all
}

// An upgraded podfsm reads all records of the older releases.
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
		require.NotZero(t, view.Step("start_pause").Result.(*records.Pause).Pid)
		require.NotEmpty(t, view.Transitions)
		response, err := show.Inspection(view)
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(response.GetSteps()), len(records.Table().Path()))
	}
	require.True(t, slices.ContainsFunc(pods["default/owed"].Transitions, func(made lifecycle.Transition) bool {
		return made.Event == states.LeaveCleanupPending
	}), "the first format has another name for the event")
	ready := pods["default/ready"]
	network, ok := records.NetworkOf(ready)
	require.True(t, ok)
	require.Regexp(t, `^10\.88\.0\.\d+$`, network.IP)
	require.EqualValues(t, 65536, show.Sandbox(ready).GetUserns().GetUids()[0].GetLength())
	require.NotEmpty(t, ready.Step("capture_netns").Result.(*records.NetNS).Path)
}

// A downgrade changes no sandbox, whatever a later release has added to its records. The records
// stay for the next upgrade.
func TestRecordsOfALaterRelease(t *testing.T) {
	for what, later := range map[string]ledger.Record{
		"a step":                {Kind: ledger.Intent, Step: "later_step", AtStop: true},
		"a result of a step":    {Kind: ledger.Done, Step: "later_step"},
		"a type of data":        {Kind: ledger.Noted, Step: "start_pause", Data: &ledger.Data{TypeURL: "podfsm/Later", Value: []byte(`{"Kept":"as it is"}`)}},
		"a kind":                {Kind: "later"},
		"a kind for a step":     {Kind: "later", Step: "start_pause"},
		"a claim":               {Kind: ledger.Claimed, Claim: "later"},
		"a way back to Ready":   {Kind: ledger.Moved, From: "Later", Event: "later_event", State: "Ready"},
		"a goal that is no one": {Kind: ledger.Moved, From: "Later", Event: "later_event", State: "Ready", Goal: "Later"},
	} {
		t.Run(what, func(t *testing.T) {
			for name, saved := range fixtures(t) {
				before := replayed(t, saved)
				root, state := t.TempDir(), t.TempDir()
				log, err := ledger.Open(root, state)
				require.NoError(t, err)
				for _, sandbox := range saved {
					for _, r := range sandbox.Records {
						require.NoError(t, log.Append(t.Context(), &r))
					}
				}
				later.Key, later.Durable, later.Release = before["default/ready"].Key, true, "v9.0.0"
				require.NoError(t, log.Append(t.Context(), &later))
				require.NoError(t, log.Close())

				for range 2 { // opening it, which may write it anew, takes nothing from it
					log, err = ledger.Open(root, state)
					require.NoError(t, err)
					require.Empty(t, log.Damage())
					after := replayed(t, log.Sandboxes())
					requireFixture(t, after)
					require.True(t, slices.ContainsFunc(log.Sandboxes(), func(saved ledger.Sandbox) bool {
						return slices.ContainsFunc(saved.Records, func(r ledger.Record) bool {
							kept := later
							kept.Seq, kept.At = r.Seq, r.At
							return reflect.DeepEqual(r, kept)
						})
					}), "%s: its record stays", name)
					require.NoError(t, log.Close())
				}
			}
		})
	}
}

// A step that this release can't undo is shown as unknown.
func TestUnknownStepIsShown(t *testing.T) {
	for _, saved := range fixtures(t) {
		key := replayed(t, saved)["default/ready"].Key
		i := slices.IndexFunc(saved, func(s ledger.Sandbox) bool { return s.Key == key })
		saved[i].Records = append(saved[i].Records, ledger.Record{Kind: ledger.Intent, Step: "later_step", Release: "v9.0.0"}, ledger.Record{Kind: "later", Release: "v9.0.0"})
		view := replayed(t, saved)["default/ready"]
		require.Equal(t, states.Ready, view.State)
		require.Len(t, view.Unread, 1)
		response, err := show.Inspection(view)
		require.NoError(t, err)
		last := response.GetSteps()[len(response.GetSteps())-1]
		require.Equal(t, "later_step", last.GetName())
		require.Contains(t, last.GetDetail()["unknown"], "v9.0.0")
	}
}
