package states

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// expected is written by hand, not derived from the table: a row for each
// state, the events legal in it and where they lead.
var expected = map[State]map[Event]State{
	New: {
		"allocate_ids": IDsAllocated,
		"roll_back":    RollingBack,
		"quarantine":   Quarantined,
	},
	IDsAllocated: {
		"remap_snapshot": SnapshotRemapped,
		"roll_back":      RollingBack,
		"quarantine":     Quarantined,
	},
	SnapshotRemapped: {
		"start_pause": PauseStarted,
		"roll_back":   RollingBack,
		"quarantine":  Quarantined,
	},
	PauseStarted: {
		"capture_netns": NetNSCaptured,
		"roll_back":     RollingBack,
		"quarantine":    Quarantined,
	},
	NetNSCaptured: {
		"attach_network": NetworkReady,
		"roll_back":      RollingBack,
		"quarantine":     Quarantined,
	},
	NetworkReady: {
		"declare_ready": Ready,
		"roll_back":     RollingBack,
		"quarantine":    Quarantined,
	},
	Ready: {
		"lose_pause": NotReady,
		"stop":       Stopping,
		"quarantine": Quarantined,
	},
	RollingBack: {
		"finish_rollback": RolledBack,
		"owe_cleanup":     CleanupOwed,
		"quarantine":      Quarantined,
	},
	RolledBack: {},
	CleanupOwed: {
		"roll_back":  RollingBack,
		"stop":       Stopping,
		"remove":     Removing,
		"quarantine": Quarantined,
	},
	NotReady: {
		"stop":       Stopping,
		"quarantine": Quarantined,
	},
	Stopping: {
		"finish_stop": Stopped,
		"owe_cleanup": CleanupOwed,
		"quarantine":  Quarantined,
	},
	Stopped: {
		"remove":     Removing,
		"quarantine": Quarantined,
	},
	Removing: {
		"finish_remove": Removed,
		"owe_cleanup":   CleanupOwed,
		"quarantine":    Quarantined,
	},
	Removed: {},
	Quarantined: {
		"remove": Removing,
	},
}

func TestEveryStateAndEvent(t *testing.T) {
	require.Len(t, All(), len(expected))
	for _, state := range All() {
		row, ok := expected[state]
		require.True(t, ok, "no expectation for state %s", state)
		for event := range row {
			require.Contains(t, Events(), event)
		}
		for _, event := range Events() {
			t.Run(fmt.Sprintf("%s/%s", state, event), func(t *testing.T) {
				want, wantLegal := row[event]
				got, legal := Next(state, event)
				require.Equal(t, wantLegal, legal)
				require.Equal(t, want, got)
			})
		}
	}
}

func TestTerminalStates(t *testing.T) {
	require.Equal(t, []State{RolledBack, Removed}, terminals())
	require.False(t, State("Nowhere").Terminal())
}

// looplab/fsm silently keeps the last of two transitions with the same event
// and source, and fails an event that leads nowhere.
func TestTableIsUnambiguous(t *testing.T) {
	type key struct {
		from  State
		event Event
	}
	seen := map[key]bool{}
	for _, row := range Table() {
		require.False(t, seen[key{row.From, row.Event}], "duplicate transition for %s in %s", row.Event, row.From)
		seen[key{row.From, row.Event}] = true
		require.NotEqual(t, row.From, row.To, "%s is a self-transition", row.Event)
		require.Contains(t, All(), row.From)
		require.Contains(t, All(), row.To)
	}
}

func TestNamesAreUniqueAndExplained(t *testing.T) {
	states, events := All(), Events()
	for _, s := range states {
		require.NotEmpty(t, s.Meaning(), s)
	}
	for _, e := range events {
		require.NotEmpty(t, e.Meaning(), e)
	}
	require.Empty(t, State("Nowhere").Meaning())
	require.Empty(t, Event("vanish").Meaning())

	slices.Sort(states)
	require.Len(t, slices.Compact(states), len(All()))
	slices.Sort(events)
	require.Len(t, slices.Compact(events), len(Events()))
}

func TestCreationPath(t *testing.T) {
	path := []State{New}
	for _, event := range CreationPath() {
		next, ok := Next(path[len(path)-1], event)
		require.True(t, ok, "%s in %s", event, path[len(path)-1])
		path = append(path, next)
	}
	require.Equal(t, []State{New, IDsAllocated, SnapshotRemapped, PauseStarted, NetNSCaptured, NetworkReady, Ready}, path)
}

func TestEveryStateIsReachable(t *testing.T) {
	require.ElementsMatch(t, All(), reachable(New))
}

func TestEverySandboxCanEnd(t *testing.T) {
	for _, s := range All() {
		require.True(t, slices.ContainsFunc(reachable(s), State.Terminal), "no way out of %s", s)
	}
}

// reachable returns start and every state that some sequence of events leads to
// from it.
func reachable(start State) []State {
	found := []State{start}
	for i := 0; i < len(found); i++ {
		for _, row := range Table() {
			if row.From == found[i] && !slices.Contains(found, row.To) {
				found = append(found, row.To)
			}
		}
	}
	return found
}

// What a caller does to a returned slice must not reach the table.
func TestReturnedSlicesAreCopies(t *testing.T) {
	All()[0], Events()[0], CreationPath()[0], Table()[0] = "", "", "", Transition{}
	require.Equal(t, New, All()[0])
	require.Equal(t, AllocateIDs, Events()[0])
	require.Equal(t, AllocateIDs, CreationPath()[0])
	require.Equal(t, Transition{From: New, Event: AllocateIDs, To: IDsAllocated}, Table()[0])
}

func TestDiagramsShowEveryTransition(t *testing.T) {
	mermaid, dot := Mermaid(), DOT()
	for _, row := range Table() {
		from := row.From
		if row.Event == Quarantine {
			from = anyState
		}
		require.Contains(t, mermaid, fmt.Sprintf("    %s --> %s : %s\n", from, row.To, row.Event))
		require.Contains(t, dot, fmt.Sprintf("    %q -> %q [label=%q];\n", from, row.To, row.Event))
	}
	require.Equal(t, 1, strings.Count(mermaid, string(Quarantine)))
	require.Equal(t, 1, strings.Count(dot, string(Quarantine)))
}
