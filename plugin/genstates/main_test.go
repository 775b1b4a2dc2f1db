package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/plugin"
	"github.com/podfsm/podfsm/states"
)

func TestGeneratedFilesAreUpToDate(t *testing.T) {
	files, err := generate(plugin.Steps())
	require.NoError(t, err)
	require.Len(t, files, 3)
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join("..", "..", name))
		require.NoError(t, err)
		require.Equal(t, string(want), string(got), "%s is stale: run go generate ./plugin", name)
	}
}

// One more declaration in the list is in all that is generated.
func TestStepThatIsAdded(t *testing.T) {
	path, demanded := added(plugin.Steps())
	files, err := generate(slices.Concat(path, demanded))
	require.NoError(t, err)
	for name, parts := range map[string][]string{
		"docs/reference/states.md": {
			"    NetworkReady --> Labelled : label_pod\n    Labelled --> Ready : declare_ready\n", "    Labelled --> RollingBack : roll_back\n",
			"| `Labelled` | Its labels are set. | `declare_ready`, `roll_back`, `quarantine` |\n",
			"| `label_pod` | Its labels were set. | `Labelled` |\n",
			"| `open_gate` | Its gate was opened. |\n",
		},
		"docs/reference/states.dot": {`"NetworkReady" -> "Labelled" [label="label_pod"];`, `"Labelled" -> "Ready" [label="declare_ready"];`},
		"ledger/records/steps.go":   {`Name: "label_pod", State: "Labelled", OnDemand: false`, `Name: "open_gate", State: "", OnDemand: true`},
	} {
		for _, part := range parts {
			require.Contains(t, string(files[name]), part, name)
		}
	}
}

// added are the steps of the creation path with one before the last, and those on demand with one after them.
func added(steps []states.Step) (path, demanded []states.Step) {
	first := slices.IndexFunc(steps, func(s states.Step) bool { return s.OnDemand })
	path = slices.Insert(slices.Clone(steps[:first]), first-1, states.Step{
		Name: "label_pod", Done: "Its labels were set.", State: "Labelled", Meaning: "Its labels are set.",
	})
	return path, slices.Concat(steps[first:], []states.Step{{Name: "open_gate", Done: "Its gate was opened.", OnDemand: true}})
}
