package cni

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPlugins(t *testing.T) {
	dir := t.TempDir()
	start := func(env ...string) (pid int) {
		cmd, finish := plugin(t, env...)
		t.Cleanup(func() {
			finish()
			_ = cmd.Wait()
		})
		return cmd.Process.Pid
	}
	ours := start(sandboxEnv+"=s1", "CNI_NETNS="+dir+"/podfsm-s1")
	start(sandboxEnv+"=s2", "CNI_NETNS="+dir+"-of-another/podfsm-s2")
	start(sandboxEnv + "=s3")
	start("CNI_NETNS=" + dir + "/cni-4")

	running, err := Plugins(dir + "/")
	require.NoError(t, err)
	require.True(t, slices.Contains(running, Running{Pid: ours, ID: "s1"}), "%v", running)
	for _, r := range running {
		require.Equal(t, "s1", r.ID, "the others are nobody's, or another containerd's")
	}
	require.NoError(t, End(t.Context(), "s1", 0))
	running, err = Plugins(dir)
	require.NoError(t, err)
	require.NotContains(t, running, Running{Pid: ours, ID: "s1"})
}
