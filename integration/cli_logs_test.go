package integration

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/traces"
)

// logged returns the lines of the engine and the front from an offset of the log on.
func logged(t *testing.T, n *harness.Node, from int) (lines []line) {
	t.Helper()
	for text := range strings.Lines(n.Log()[from:]) {
		var l line
		if json.Unmarshal([]byte(text), &l) != nil {
			continue // before containerd has read its configuration
		}
		if l["pod"] != nil { // containerd's own lines have other fields
			lines = append(lines, l)
		}
	}
	return lines
}

func messages(lines []line) (all []string) {
	for _, l := range lines {
		all = append(all, l["level"].(string)+" "+l["msg"].(string))
	}
	return all
}

func TestLogs(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, Traces: true, TOML: "[debug]\nformat = \"json\"\n"})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("all is well", func(t *testing.T) {
		from := len(n.Log())
		ctx, id := traces.NewContext(t.Context())
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		lines := logged(t, n, from)
		require.Empty(t, loud(lines), "a pod that starts is no news")
		for _, step := range steps {
			moved := slices.IndexFunc(lines, func(l line) bool { return l["msg"] == "transition "+step })
			require.NotEqual(t, -1, moved, "no line of %s", step)
			l := lines[moved]
			require.Equal(t, "default/pod", l["pod"])
			require.Equal(t, pod.ID, l["sandbox"])
			require.Equal(t, step, l["step"])
			require.Equal(t, id, l["trace_id"])
			require.IsType(t, 0.0, l["seconds"])
			require.NotEmpty(t, l["from"])
			require.NotEmpty(t, l["to"])
			require.Equal(t, 1, strings.Count(strings.Join(messages(lines), "\n")+"\n", "transition "+step+"\n"), "once")
		}
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.Empty(t, loud(logged(t, n, from)))
	})

	t.Run("a failure", func(t *testing.T) {
		from := len(n.Log())
		require.NoError(t, n.Fault("bridge.ADD", "1*error(injected)"))
		ctx, id := traces.NewContext(t.Context())
		_, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
		require.ErrorContains(t, err, "injected")
		require.NoError(t, n.Heal())
		lines := loud(logged(t, n, from))
		require.Equal(t, []string{"warning step failed"}, messages(lines), "one line")
		l := lines[0]
		require.Equal(t, "default/pod", l["pod"])
		require.Regexp(t, "^[0-9a-f]{64}$", l["sandbox"])
		require.Equal(t, "attach_network", l["step"])
		require.Equal(t, "do", l["operation"])
		require.Equal(t, "error", l["outcome"])
		require.Equal(t, id, l["trace_id"])
		require.Contains(t, l["error"], "injected")
		require.NotEmpty(t, l["error_type"])
		require.Positive(t, l["seconds"])
	})

	t.Run("a pending cleanup", func(t *testing.T) {
		from := len(n.Log())
		require.NoError(t, n.Fault("bridge.ADD", "1*error(injected)"))
		require.NoError(t, n.Fault("capture_netns.undo.before", "2*error(still busy)"))
		_, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
		require.ErrorContains(t, err, "the cleanup is pending")
		n.RequireClean(t, before) // the third try succeeds
		require.Eventually(t, func() bool { return strings.Contains(n.Log()[from:], "pending cleanup completed") }, waitFor, tick)
		require.NoError(t, n.Heal())
		lines := loud(logged(t, n, from))
		require.Equal(t, []string{
			"warning step failed", // the CNI plugin
			"warning step failed", // the undo
			"warning cleanup failed, retrying",
			"warning step failed", // the second try
			"info pending cleanup completed",
		}, messages(lines))
		require.Equal(t, "undo", lines[1]["operation"])
		require.Equal(t, "capture_netns", lines[1]["step"])
		require.Equal(t, "RolledBack", lines[2]["goal"])
		require.InDelta(t, 1.125, lines[2]["retry_in"], 0.125)
		require.EqualValues(t, 2, lines[4]["attempt"])
		for _, l := range lines {
			require.Equal(t, lines[0]["sandbox"], l["sandbox"])
			require.Equal(t, "default/pod", l["pod"])
		}
	})

	t.Run("a restart", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("kept"))
		require.NoError(t, err)
		leaveBehind(t.Context(), t, n, "bridge.ADD", n.PodConfig("interrupted"))
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Heal())
		from := len(n.Log())
		require.NoError(t, n.Start(t.Context()))
		var lines []line // about single sandboxes, not about podfsm itself
		require.Eventually(t, func() bool {
			lines = slices.DeleteFunc(loud(logged(t, n, from)), func(l line) bool { return l["sandbox"] == nil })
			return len(lines) > 0
		}, waitFor, tick)
		require.Equal(t, []string{"info sandbox recovered after the restart"}, messages(lines))
		require.Equal(t, "default/interrupted", lines[0]["pod"])
		require.Equal(t, "rolled_back", lines[0]["outcome"])
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})
}
