package records

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

var begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// viewOf is a sandbox whose network was attached and detached, with these notes.
func viewOf(notes ...any) lifecycle.View {
	plan := &cni.Attachment{
		Networks: []cni.Network{{Name: "pods"}, {Name: "more"}},
		Plugins:  []cni.PluginState{{Type: "bridge"}, {Plugin: 1, Type: "portmap"}, {Network: 1, Type: "macvlan"}},
	}
	return lifecycle.View{
		Key:   journal.Key{Namespace: "k8s.io", ID: "s1"},
		Spec:  &Spec{Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: "default"}}},
		Steps: []lifecycle.StepView{{Name: "attach_network", Plan: plan, Notes: notes}},
		Acts: []lifecycle.Act{
			{Step: "attach_network", Kind: lifecycle.ActDo, Started: begin, Ended: begin.Add(time.Second), Err: errors.New("no \xff")},
			{Step: "attach_network", Kind: lifecycle.ActUndo, Started: begin.Add(2 * time.Second)},
		},
	}
}

func at(seconds int) time.Time { return begin.Add(time.Duration(seconds) * 100 * time.Millisecond) }

func words(acts []*podfsmv1.Act) (words []string) {
	for _, act := range acts {
		word := strings.TrimSpace(act.GetKind() + " " + act.GetPlugin())
		switch {
		case act.GetError() != "":
			word += "!"
		case act.GetDuration() == nil:
			word += "…"
		}
		words = append(words, word)
	}
	return words
}

func TestActsOfPlugins(t *testing.T) {
	acts := actsOf(viewOf(
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
	require.Equal(t, []string{"do!", "ADD pods/bridge", "ADD more/macvlan…", "ADD pods/portmap!", "undo…", "DEL pods/bridge", "DEL pods/portmap!"}, words(acts))
	require.Equal(t, "no \uFFFD", acts[0].GetError())
	require.Equal(t, time.Second, acts[0].GetDuration().AsDuration())
	require.Nil(t, acts[6].GetStartedAt())

	acts = actsOf(viewOf(
		&cni.Progress{Plugin: 1, Phase: cni.Adding, Command: "DEL", Error: "not now"},
		&cni.Progress{Plugin: 1, Phase: cni.Deleted, Command: "DEL", Began: at(21), Took: time.Millisecond},
	))
	require.Equal(t, []string{"do!", "undo…", "DEL pods/portmap"}, words(acts), "the last of one plugin's DELs counts")
}

func TestFailedStep(t *testing.T) {
	view := viewOf()
	require.Empty(t, failedStep(view))
	view.Transitions = []lifecycle.Transition{
		{Event: states.RollBack, Step: "attach_network", Err: errors.New("no luck")},
		{Event: states.OweCleanup, Step: "start_pause", Err: errors.New("no luck")},
		{Event: states.RollBack},
	}
	require.Equal(t, "attach_network", failedStep(view))
	require.Equal(t, "attach_network", Sandbox(view).GetFailedStep())
	require.Equal(t, "web", Transition(view).GetPodName())
	require.Equal(t, "roll_back", Transition(view).GetTransition().GetEvent())
}

func TestLongErrorsAreCut(t *testing.T) {
	text := Text(errors.New(strings.Repeat("x", maxText) + "ü"))
	require.Less(t, len(text), maxText+100)
	require.Contains(t, text, "(16386 bytes in all)")
}

func TestMatch(t *testing.T) {
	sandbox := func(id, namespace, name string) *podfsmv1.Sandbox {
		return &podfsmv1.Sandbox{Id: id, PodNamespace: namespace, PodName: name}
	}
	all := []*podfsmv1.Sandbox{sandbox("aa1", "default", "web"), sandbox("aa2", "default", "web"), sandbox("b1", "other", "web"), sandbox("web", "", ""), sandbox("c", "", "")}
	for ref, want := range map[string][]string{
		"default/web": {"aa1", "aa2"},
		"other/web":   {"b1"},
		"web":         {"web"},
		"aa":          {"aa1", "aa2"},
		"c":           {"c"},
	} {
		found, err := Match(ref, all)
		require.NoError(t, err)
		var ids []string
		for _, s := range found {
			ids = append(ids, s.GetId())
		}
		require.Equal(t, want, ids, ref)
	}
	for _, ref := range []string{"", "/", "x", "default/"} {
		_, err := Match(ref, all)
		require.Error(t, err, ref)
	}
}
