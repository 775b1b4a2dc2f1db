package states

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// testSteps returns steps of all kinds.
func testSteps() []Step {
	return []Step{
		{Name: "allocate_ids", Done: "Ids.", State: "IDsAllocated", Meaning: "It has ids."},
		{Name: "start_pause", Done: "Pause.", State: "PauseStarted", Meaning: "It has pause."},
		{Name: "attach_network", Done: "CNI.", State: "NetworkReady", Meaning: "It has a network."},
		{Name: "declare_ready", Done: "Looked.", State: Ready},
		{Name: "start_shim", Done: "A shim.", OnDemand: true},
	}
}

func tableOf(steps []Step) *Table {
	table, err := NewTable(steps)
	if err != nil {
		panic(err)
	}
	return table
}

var table = tableOf(testSteps())

const (
	idsAllocated State = "IDsAllocated"
	pauseStarted State = "PauseStarted"
	networkReady State = "NetworkReady"
)

// expected is written by hand, not derived from the table: a row for each
// state, the events legal in it and where they lead.
var expected = map[State]map[Event]State{
	New: {
		"allocate_ids": idsAllocated,
		"roll_back":    RollingBack,
		"quarantine":   Quarantined,
	},
	idsAllocated: {
		"start_pause": pauseStarted,
		"roll_back":   RollingBack,
		"quarantine":  Quarantined,
	},
	pauseStarted: {
		"attach_network": networkReady,
		"roll_back":      RollingBack,
		"quarantine":     Quarantined,
	},
	networkReady: {
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
		"finish_rollback":       RolledBack,
		"leave_cleanup_pending": CleanupOwed,
		"quarantine":            Quarantined,
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
		"finish_stop":           Stopped,
		"leave_cleanup_pending": CleanupOwed,
		"quarantine":            Quarantined,
	},
	Stopped: {
		"remove":     Removing,
		"quarantine": Quarantined,
	},
	Removing: {
		"finish_remove":         Removed,
		"leave_cleanup_pending": CleanupOwed,
		"quarantine":            Quarantined,
	},
	Removed: {},
	Quarantined: {
		"remove": Removing,
	},
}

func TestEveryStateAndEvent(t *testing.T) {
	require.Len(t, table.States(), len(expected))
	for _, state := range table.States() {
		row, ok := expected[state]
		require.True(t, ok, "no expectation for state %s", state)
		for event := range row {
			require.Contains(t, table.Events(), event)
		}
		for _, event := range table.Events() {
			t.Run(fmt.Sprintf("%s/%s", state, event), func(t *testing.T) {
				want, wantLegal := row[event]
				got, legal := table.Next(state, event)
				require.Equal(t, wantLegal, legal)
				require.Equal(t, want, got)
			})
		}
	}
}

func TestTerminalStates(t *testing.T) {
	require.Equal(t, []State{RolledBack, Removed}, table.terminals())
	for _, s := range table.States() {
		require.Equal(t, len(expected[s]) == 0, s.Terminal(), s)
	}
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
	for _, row := range table.Transitions() {
		require.False(t, seen[key{row.From, row.Event}], "duplicate transition for %s in %s", row.Event, row.From)
		seen[key{row.From, row.Event}] = true
		require.NotEqual(t, row.From, row.To, "%s is a self-transition", row.Event)
		require.Contains(t, table.States(), row.From)
		require.Contains(t, table.States(), row.To)
	}
}

func TestMeanings(t *testing.T) {
	for _, s := range table.States() {
		require.NotEmpty(t, table.Meaning(s), s)
	}
	for _, e := range table.Events() {
		require.NotEmpty(t, table.EventMeaning(e), e)
	}
	require.Equal(t, "It has pause.", table.Meaning(pauseStarted))
	require.Equal(t, "Pause.", table.EventMeaning("start_pause"))
	require.Empty(t, table.Meaning("Nowhere"))
	require.Empty(t, table.EventMeaning("vanish"))
	require.Empty(t, table.EventMeaning("start_shim"), "a step on demand is not an event")
}

func TestPath(t *testing.T) {
	require.Equal(t, []State{New, idsAllocated, pauseStarted, networkReady, Ready}, table.PathStates())
	require.Equal(t, []Event{"allocate_ids", "start_pause", "attach_network", "declare_ready"}, table.Path())
	require.Equal(t, append(table.Path(), "start_shim"), table.Steps())
	step, ok := table.Step("start_shim")
	require.True(t, ok)
	require.True(t, step.OnDemand)
	_, ok = table.Step("stop")
	require.False(t, ok)
}

// A step is added by its declaration alone: the table, the path and the diagrams have it.
func TestStepThatIsAdded(t *testing.T) {
	steps := slices.Insert(testSteps(), 3, Step{Name: "label_pod", Done: "Labels.", State: "Labelled", Meaning: "It has labels."})
	longer := tableOf(steps)
	require.Equal(t, []State{New, idsAllocated, pauseStarted, networkReady, "Labelled", Ready}, longer.PathStates())
	require.Equal(t, []Event{"allocate_ids", "start_pause", "attach_network", "label_pod", "declare_ready"}, longer.Path())
	for _, row := range []Transition{
		{networkReady, "label_pod", "Labelled"}, {"Labelled", "declare_ready", Ready}, {"Labelled", RollBack, RollingBack}, {"Labelled", Quarantine, Quarantined},
	} {
		require.Contains(t, longer.Transitions(), row)
		require.NotContains(t, table.Transitions(), row)
	}
	require.NotContains(t, longer.Transitions(), Transition{networkReady, "declare_ready", Ready})
	require.Contains(t, longer.Mermaid(), "    NetworkReady --> Labelled : label_pod\n    Labelled --> Ready : declare_ready\n")
	require.Contains(t, longer.DOT(), `"Labelled" -> "RollingBack" [label="roll_back"];`)
}

func TestNewTableRefuses(t *testing.T) {
	for name, spoil := range map[string]func([]Step) []Step{
		"no step":                func([]Step) []Step { return nil },
		"a path that has no end": func(s []Step) []Step { return slices.Delete(s, 3, 5) },
		"a step after the end": func(s []Step) []Step {
			return append(s, Step{Name: "more", Done: "More.", State: "More", Meaning: "More."})
		},
		"a step that leads nowhere": func(s []Step) []Step { s[1].State = ""; return s },
		"one on demand on the path": func(s []Step) []Step { return slices.Insert(s, 1, s[4]) },
		"one on demand that leads":  func(s []Step) []Step { s[4].State = "Shimmed"; return s },
		"a step twice":              func(s []Step) []Step { return append(s, s[4]) },
		"a state twice":             func(s []Step) []Step { s[1].State = idsAllocated; return s },
		"a state of the table":      func(s []Step) []Step { s[1].State = Stopped; return s },
		"the diagrams' state":       func(s []Step) []Step { s[1].State = anyState; return s },
		"an event of the table":     func(s []Step) []Step { s[1].Name = Stop; return s },
		"no name":                   func(s []Step) []Step { s[1].Name = ""; return s },
		"no meaning":                func(s []Step) []Step { s[1].Meaning = ""; return s },
		"no word of what it did":    func(s []Step) []Step { s[1].Done = ""; return s },
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewTable(spoil(testSteps()))
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		})
	}
}

func TestEveryStateIsReachable(t *testing.T) {
	require.ElementsMatch(t, table.States(), reachable(New))
}

func TestEverySandboxCanEnd(t *testing.T) {
	for _, s := range table.States() {
		require.True(t, slices.ContainsFunc(reachable(s), State.Terminal), "no way out of %s", s)
	}
}

// reachable returns start and every state that some sequence of events leads to
// from it.
func reachable(start State) []State {
	found := []State{start}
	for i := 0; i < len(found); i++ {
		for _, row := range table.Transitions() {
			if row.From == found[i] && !slices.Contains(found, row.To) {
				found = append(found, row.To)
			}
		}
	}
	return found
}

// A caller that changes a returned slice must not change the table.
func TestReturnedSlicesAreCopies(t *testing.T) {
	steps := testSteps()
	own := tableOf(steps)
	own.States()[0], own.PathStates()[0], own.Events()[0], own.Path()[0], own.Steps()[0], own.Transitions()[0] = "", "", "", "", "", Transition{}
	steps[0] = Step{}
	require.Equal(t, table, own)
}

func TestDiagramsShowEveryTransition(t *testing.T) {
	mermaid, dot := table.Mermaid(), table.DOT()
	for _, row := range table.Transitions() {
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
