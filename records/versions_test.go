package records

import (
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

// copyOf is a ledger of testdata that may be written to.
func copyOf(t *testing.T, name string) (root, state string) {
	dir := t.TempDir()
	require.NoError(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata", name))))
	return filepath.Join(dir, "root"), filepath.Join(dir, "state")
}

// replayed are the sandboxes of a ledger by their pods.
func replayed(t *testing.T, ledger *journal.Ledger) map[string]lifecycle.View {
	views, err := Replay(ledger.Sandboxes())
	require.NoError(t, err)
	byPod := map[string]lifecycle.View{}
	for _, view := range views {
		byPod[view.Pod] = view
	}
	return byPod
}

// fixtures are ledgers as daemons of all versions have left them when they were killed: the steps' version, which names their directories.
func fixtures(t *testing.T) []string {
	found, err := filepath.Glob("testdata/ledger-*")
	require.NoError(t, err)
	require.NotEmpty(t, found)
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	return found
}

// An upgrade finds all of what an older podfsm has left.
func TestLedgersOfAllVersions(t *testing.T) {
	for _, name := range fixtures(t) {
		t.Run(name, func(t *testing.T) {
			root, state := copyOf(t, name)
			for range 2 { // opening it, which may write it anew, takes nothing from it
				ledger, err := journal.Open(root, state)
				require.NoError(t, err)
				require.Empty(t, ledger.Damage())
				requireFixture(t, replayed(t, ledger))
				require.NoError(t, ledger.Close())
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
		require.NotZero(t, view.Step(states.StartPause).Result.(*Pause).Pid)
		require.NotEmpty(t, view.Transitions)
		response, err := Inspection(view)
		require.NoError(t, err)
		require.Len(t, response.GetSteps(), len(states.CreationPath()))
	}
	ready := pods["default/ready"]
	network, ok := NetworkOf(ready)
	require.True(t, ok)
	require.Regexp(t, `^10\.88\.0\.\d+$`, network.IP)
	require.EqualValues(t, 65536, Sandbox(ready).GetUserns().GetUids()[0].GetLength())
	require.NotEmpty(t, ready.Step(states.CaptureNetNS).Result.(*NetNS).Path)
}

// After a downgrade, a sandbox with records of a later version is quarantined, it alone, and its records stay for when that comes back.
func TestRecordsOfALaterVersion(t *testing.T) {
	for _, name := range fixtures(t) {
		for what, later := range map[string]journal.Record{
			"of the steps": {Kind: journal.Noted, Step: string(states.StartPause), Version: 1000},
			"a step":       {Kind: journal.Done, Step: "later_step", Version: 1},
			"a type":       {Kind: journal.Noted, Step: string(states.StartPause), Version: 1, Data: &journal.Data{TypeURL: "podfsm/Later", Value: []byte(`{"Kept":"as it is"}`)}},
			"a kind":       {Kind: "later", Version: 1},
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				root, state := copyOf(t, name)
				ledger, err := journal.Open(root, state)
				require.NoError(t, err)
				before := replayed(t, ledger)
				later.Key, later.Durable = before["default/ready"].Key, true
				require.NoError(t, ledger.Append(t.Context(), &later))
				require.NoError(t, ledger.Close())

				for range 2 {
					ledger, err = journal.Open(root, state)
					require.NoError(t, err)
					require.Empty(t, ledger.Damage())
					after := replayed(t, ledger)
					require.Len(t, after, len(before))
					for pod, view := range after {
						want := before[pod].State
						if pod == "default/ready" {
							want = states.Quarantined
						}
						require.Equal(t, want, view.State, pod)
					}
					require.True(t, slices.ContainsFunc(ledger.Sandboxes(), func(saved journal.Sandbox) bool {
						return slices.ContainsFunc(saved.Records, func(r journal.Record) bool {
							return r.Seq == later.Seq && r.Kind == later.Kind && r.Version == later.Version && reflect.DeepEqual(r.Data, later.Data)
						})
					}), "its record stays")
					require.NoError(t, ledger.Close())
				}
			})
		}
	}
}
