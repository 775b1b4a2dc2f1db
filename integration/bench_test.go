package integration

import (
	"os"
	osexec "os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// make bench in small: every section measures something on every side that it has, and nothing is left.
func TestBench(t *testing.T) {
	bench := osexec.CommandContext(t.Context(), "go", "run", "./bench", "-rounds", "1", "-parallel", "2", "-standing", "1,2", "-page", "")
	bench.Stderr = os.Stderr
	table, err := bench.Output()
	require.NoError(t, err)
	t.Logf("%s", table)

	figures := map[string]int{} // how many columns each row has filled, by its first column
	for line := range strings.Lines(string(table)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for _, cell := range cells[1:] {
			if strings.TrimSpace(cell) != "" {
				figures[strings.TrimSpace(cells[0])]++
			}
		}
	}
	for row, want := range map[string]int{ // of both kinds of pods where both are measured
		"RunPodSandbox, alone":                 12,
		"StopPodSandbox, 2 at a time":          12,
		"RemovePodSandbox, alone":              8,
		"pods started a second, 2 at a time":   12,
		"CPU time a pod":                       12,
		"a pod and its first container, alone": 4,
		"RunPodSandbox, by crun, alone":        3,
		"syncs to disk a pod, start":           4,
		"bytes of the ledger's log a pod":      1,
		"heap bytes a sandbox":                 4,
		"ListPodSandbox with 2 pods":           4,
		"restart with 2 pods":                  4,
		"RunPodSandbox, podfsm, by tracing":    5,
	} {
		require.Equal(t, want, figures[row], row)
	}
}
