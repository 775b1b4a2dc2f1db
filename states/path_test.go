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
		passage(1, New, AllocateIDs, IDsAllocated),
		passage(2, IDsAllocated, RollBack, RollingBack),
		passage(3, RollingBack, OweCleanup, CleanupOwed),
		passage(4, CleanupOwed, RollBack, RollingBack),
		passage(5, RollingBack, OweCleanup, CleanupOwed),
		passage(6, CleanupOwed, Quarantine, Quarantined), // folded in the diagram
		passage(7, `x"; evil`, "e", Ready),
	}
	mermaid := Mermaid(path...)
	for _, line := range []string{
		"New --> IDsAllocated : allocate_ids (1)\n",
		"IDsAllocated --> SnapshotRemapped : remap_snapshot\n",
		"RollingBack --> CleanupOwed : owe_cleanup (3, 5)\n",
		"CleanupOwed --> Quarantined : quarantine (6)\n",
		"class New,IDsAllocated,RollingBack,CleanupOwed,Quarantined taken\n",
	} {
		require.Contains(t, mermaid, line)
	}
	dot := DOT(path...)
	for _, line := range []string{
		`"New" -> "IDsAllocated" [label="allocate_ids (1)", color="#2563eb", penwidth=2];`,
		`"IDsAllocated" -> "SnapshotRemapped" [label="remap_snapshot"];`,
		`"CleanupOwed" [style="rounded,filled"`,
	} {
		require.Contains(t, dot, line)
	}
	require.NotContains(t, mermaid+dot, "evil")
	require.Equal(t, Mermaid(), Mermaid(passage(1, "no", "such", "state")))
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
