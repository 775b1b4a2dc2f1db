package show

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/leaks"
)

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

func TestLeaksOf(t *testing.T) {
	a, b := leaks.Thing{Kind: leaks.NetNS, ID: strings.Repeat("a", 64)}, leaks.Thing{Kind: leaks.NetNS, ID: strings.Repeat("b", 64)}
	all := []leaks.Thing{a, b}
	for _, tc := range []struct {
		sandboxes []string
		want      []leaks.Thing
	}{
		{nil, all},
		{[]string{a.ID}, []leaks.Thing{a}},
		{[]string{b.ID[:ShortID]}, []leaks.Thing{b}},
		{[]string{a.ID, b.ID}, all},
		{[]string{strings.Repeat("c", 64)}, []leaks.Thing{}},
	} {
		found, err := LeaksOf(all, tc.sandboxes)
		require.NoError(t, err)
		require.Equal(t, tc.want, found)
	}
	_, err := LeaksOf(all, []string{a.ID, "bbb"})
	require.True(t, errdefs.IsInvalidArgument(err))
}
