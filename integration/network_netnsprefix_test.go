package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// An operator configures the names of namespaces, and changes the setting while pods run: those
// keep their names, and can be removed.
func TestNetNSPrefix(t *testing.T) {
	const option = "netns_prefix = 'cni-'"
	n := harness.StartNode(t, harness.Config{TOML: "[plugins.'io.containerd.podsandbox.controller.v1.podfsm']\n" + option})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	early, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("early"))
	require.NoError(t, err)
	earlyPath := netNSOf(t, early)
	require.Equal(t, "cni-"+early.ID, filepath.Base(earlyPath))
	require.FileExists(t, earlyPath)

	config := filepath.Join(n.Dir(), "config.toml")
	text, err := os.ReadFile(config)
	require.NoError(t, err)
	require.Contains(t, string(text), option)
	require.NoError(t, os.WriteFile(config, []byte(strings.Replace(string(text), option, "netns_prefix = 'podfsm-'", 1)), 0o644))
	require.NoError(t, n.Restart(t.Context()))

	require.Equal(t, earlyPath, netNSOf(t, early))
	require.Equal(t, "ok\n", exec(t, startContainer(t, early, "main"), "echo", "ok"))
	late, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("late"))
	require.NoError(t, err)
	require.Equal(t, "podfsm-"+late.ID, filepath.Base(netNSOf(t, late)))
	for _, pod := range []*harness.Pod{early, late} {
		require.NoError(t, pod.StopAndRemove(t.Context()))
	}
	require.NoFileExists(t, earlyPath)
	n.RequireClean(t, before)
}

// netNSOf returns the path of a pod's network namespace, as crictl shows it.
func netNSOf(t *testing.T, pod *harness.Pod) string {
	t.Helper()
	info, err := pod.Info(t.Context())
	require.NoError(t, err)
	a := &answers{facts: facts{}, t: t}
	a.add("", []byte(info["info"]))
	for path, value := range a.facts {
		if strings.HasSuffix(path, ".path") && strings.Contains(value, "/netns/") {
			return value
		}
	}
	t.Fatalf("no network namespace in %s", info["info"])
	return ""
}
