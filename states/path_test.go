package states

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func passage(seq uint64, from State, event Event, to State) Passage {
	return Passage{Transition{from, event, to}, seq}
}

func TestDiagramsShowThePathTaken(t *testing.T) {
	path := []Passage{
		passage(1, New, "allocate_ids", idsAllocated),
		passage(2, idsAllocated, RollBack, RollingBack),
		passage(3, RollingBack, LeaveCleanupPending, CleanupOwed),
		passage(4, CleanupOwed, RollBack, RollingBack),
		passage(5, RollingBack, LeaveCleanupPending, CleanupOwed),
		passage(6, CleanupOwed, Quarantine, Quarantined), // folded in the diagram
		passage(7, `x"; evil`, "e", Ready),
	}
	mermaid := table.Mermaid(path...)
	for _, line := range []string{
		"New --> IDsAllocated : allocate_ids (1)\n",
		"IDsAllocated --> PauseStarted : start_pause\n",
		"RollingBack --> CleanupOwed : leave_cleanup_pending (3, 5)\n",
		"CleanupOwed --> Quarantined : quarantine (6)\n",
		"class New,IDsAllocated,RollingBack,CleanupOwed,Quarantined taken\n",
	} {
		require.Contains(t, mermaid, line)
	}
	dot := table.DOT(path...)
	for _, line := range []string{
		`"New" -> "IDsAllocated" [label="allocate_ids (1)", color="#2563eb", penwidth=2];`,
		`"IDsAllocated" -> "PauseStarted" [label="start_pause"];`,
		`"CleanupOwed" [style="rounded,filled"`,
	} {
		require.Contains(t, dot, line)
	}
	require.NotContains(t, mermaid+dot, "evil")
}

func TestNumbersOfManyPassages(t *testing.T) {
	for want, all := range map[string][]uint64{
		"":               nil,
		"1":              {1},
		"1, 3, 5, 7":     {1, 3, 5, 7},
		"1, 3, 5, …, 11": {1, 3, 5, 7, 9, 11},
	} {
		require.Equal(t, want, Numbers(all))
	}
}

// The diagram has the states of another release that are on the sandbox's path.
func TestDiagramsShowThePathOfAnotherRelease(t *testing.T) {
	path := []Passage{
		passage(1, New, "allocate_ids", idsAllocated),
		passage(2, idsAllocated, "label_pod", "Labelled"),
		passage(3, "Labelled", RollBack, RollingBack),
		passage(4, "Elsewhere", Stop, Stopping),
	}
	mermaid := table.Mermaid(path...)
	for _, line := range []string{
		"IDsAllocated --> Labelled : label_pod (2)\n",
		"Labelled --> RollingBack : roll_back (3)\n",
		"class New,Elsewhere,IDsAllocated,Labelled,RollingBack,Stopping taken\n",
	} {
		require.Contains(t, mermaid, line)
	}
	require.Contains(t, table.DOT(path...), `"IDsAllocated" -> "Labelled" [label="label_pod (2)", color="#2563eb", penwidth=2];`)
	require.Equal(t, []State{New, "Elsewhere", idsAllocated, "Labelled", pauseStarted}, table.StatesWith(path)[:5])
	require.Equal(t, table.States(), table.StatesWith(nil))
}
