package show

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
)

var begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// viewOf is a sandbox whose network was attached and detached, with these notes.
func viewOf(notes ...any) lifecycle.View {
	plan := &cni.Attachment{
		Networks: []cni.Network{{Name: "pods"}, {Name: "more"}},
		Plugins:  []cni.PluginState{{Type: "bridge"}, {Plugin: 1, Type: "portmap"}, {Network: 1, Type: "macvlan"}},
	}
	return lifecycle.View{
		Key:   ledger.Key{Namespace: "k8s.io", ID: "s1"},
		Spec:  &records.Spec{Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: "default"}}},
		Steps: []lifecycle.StepView{{Name: "attach_network", Plan: plan, Notes: notes}},
		Tries: []lifecycle.Try{
			{Step: "attach_network", Operation: lifecycle.OperationDo, Started: begin, Ended: begin.Add(time.Second), Err: errors.New("no \xff")},
			{Step: "attach_network", Operation: lifecycle.OperationUndo, Started: begin.Add(2 * time.Second)},
		},
	}
}

func at(seconds int) time.Time { return begin.Add(time.Duration(seconds) * 100 * time.Millisecond) }

func words(tries []*podfsmv1.Try) (words []string) {
	for _, try := range tries {
		word := strings.TrimSpace(try.GetKind() + " " + try.GetPlugin())
		switch {
		case try.GetError() != "":
			word += "!"
		case try.GetDuration() == nil:
			word += "…"
		}
		words = append(words, word)
	}
	return words
}

func TestActsOfPlugins(t *testing.T) {
	tries := triesOf(viewOf(
		&cni.Progress{Phase: cni.Adding, Command: "ADD", Began: at(1)},
		&cni.Progress{Network: 1, Phase: cni.Adding, Command: "ADD", Began: at(2)},
		&cni.Progress{Phase: cni.Added, Command: "ADD", Began: at(1), Took: time.Millisecond},
		&cni.Progress{Plugin: 1, Phase: cni.Adding, Command: "ADD", Began: at(3)},
		&cni.Progress{Plugin: 1, Phase: cni.Adding, Command: "ADD", Began: at(3), Took: time.Millisecond, Error: "no luck"},
		&cni.Progress{Plugin: 1, Phase: cni.Adding, Command: "DEL", Error: "not now"},
		&cni.Progress{Phase: cni.Deleted, Command: "DEL", Began: at(21), Took: time.Millisecond},
		&cni.Progress{Phase: cni.Added}, // of a version that noted no times
		&cni.Progress{Network: 7, Command: "ADD"},
		"no note of ours",
	))
	require.Equal(t, []string{"do!", "ADD pods/bridge", "ADD more/macvlan…", "ADD pods/portmap!", "undo…", "DEL pods/bridge", "DEL pods/portmap!"}, words(tries))
	require.Equal(t, "no \uFFFD", tries[0].GetError())
	require.Equal(t, time.Second, tries[0].GetDuration().AsDuration())
	require.Nil(t, tries[6].GetStartedAt())

	tries = triesOf(viewOf(
		&cni.Progress{Plugin: 1, Phase: cni.Adding, Command: "DEL", Error: "not now"},
		&cni.Progress{Plugin: 1, Phase: cni.Deleted, Command: "DEL", Began: at(21), Took: time.Millisecond},
	))
	require.Equal(t, []string{"do!", "undo…", "DEL pods/portmap"}, words(tries), "the last of one plugin's DELs counts")
}
