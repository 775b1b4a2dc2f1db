package integration

import (
	"maps"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// rowsOfBench are the rows of the sections of make bench, with the number of filled columns per
// row, for both kinds of pods if both are measured.
var rowsOfBench = map[string]map[string]int{
	"container": {
		"pod and first container, alone":                            2 * (3 + 2),
		"pods with first container started per second, 2 at a time": 2 * (3 + 2),
	},
	"alone": {
		"RunPodSandbox, alone":    2 * (4 + 3),
		"RemovePodSandbox, alone": 2 * (3 + 2),
		"CPU time per pod":        2 * (4 + 3),
	},
	"stock": {
		"RunPodSandbox, a pod of containerd's own handler":   2 * (2 + 1),
		"CreateContainer, a pod of containerd's own handler": 2 * (2 + 1),
	},
	"parallel": {
		"StopPodSandbox, 2 at a time":          2 * (4 + 3),
		"pods started per second, 2 at a time": 2 * (4 + 3),
	},
	"writes": {
		"syncs per pod":         3 + 2,
		"bytes written per pod": 3 + 2,
	},
	"standing": {
		"RunPodSandbox, alone, with 2 pods":                 2 * (3 + 2),
		"pods started per second, 2 at a time, with 2 pods": 2 * (3 + 2),
		"resident memory per pod":                           2 * (3 + 2),
		"ListPodSandbox, with 2 pods":                       2 * (3 + 2),
		"restart with 2 pods":                               2 * (3 + 2),
	},
	"growth": {
		"RunPodSandbox, podfsm, mode auto":                       2 + 1,
		"CreateContainer, unmodified containerd":                 2 + 1,
		"ContainerStatus, podfsm, mode auto":                     2 + 1,
		"PortForward, podfsm, a pod of containerd's own handler": 2 + 1,
		"StopPodSandbox, unmodified containerd":                  2 + 1,
		"RemovePodSandbox, podfsm, mode auto":                    2 + 1,
	},
	"tracing": {
		"RunPodSandbox, podfsm, by tracing": 3 + 2,
	},
}

// A small make bench of one section, or in full of every section: each side has a value for what it
// supports, and nothing is left.
func TestBench(t *testing.T) {
	sections := []string{"alone"}
	if full() {
		sections = slices.Sorted(maps.Keys(rowsOfBench))
	}
	bench := osexec.CommandContext(t.Context(), "go", "run", "../tools/bench", "-rounds", "1", "-parallel", "2", "-standing", "1,2", "-page", "",
		"-sections", strings.Join(sections, ","))
	bench.Stderr = os.Stderr
	table, err := bench.Output()
	require.NoError(t, err)
	t.Logf("%s", table)

	figures := map[string]int{} // the number of filled columns by row
	for line := range strings.Lines(string(table)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for _, cell := range cells[1:] {
			if strings.TrimSpace(cell) != "" {
				figures[strings.TrimSpace(cells[0])]++
			}
		}
	}
	for _, section := range sections {
		for row, want := range rowsOfBench[section] {
			require.Equal(t, want, figures[row], row)
		}
	}
}
