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
		"pod and first container, alone":                            2 * (3 + 2),
		"pods with first container started per second, 2 at a time": 2 * (3 + 2),
		"RunPodSandbox, alone":                                      2 * (4 + 3),
		"RunPodSandbox, a pod of containerd's own handler":          2 * (2 + 1),
		"StopPodSandbox, 2 at a time":                               2 * (4 + 3),
		"RemovePodSandbox, alone":                                   2 * (3 + 2),
		"pods started per second, 2 at a time":                      2 * (4 + 3),
		"CPU time per pod":                                          2 * (4 + 3),
		"syncs per pod":                                             3 + 2,
		"bytes written per pod":                                     3 + 2,
		"RunPodSandbox, alone, with 2 pods":                         2 * (3 + 2),
		"pods started per second, 2 at a time, with 2 pods":         2 * (3 + 2),
		"resident memory per pod":                                   2 * (3 + 2),
		"ListPodSandbox, with 2 pods":                               2 * (3 + 2),
		"restart with 2 pods":                                       2 * (3 + 2),
		"RunPodSandbox, podfsm, by tracing":                         3 + 2,
	} {
		require.Equal(t, want, figures[row], row)
	}
}
