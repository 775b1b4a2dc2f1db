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
	ours := start(sandboxEnv+"="+sandboxID, "CNI_NETNS="+dir+"/podfsm-"+sandboxID)
	start(sandboxEnv+"=s2", "CNI_NETNS="+dir+"-of-another/podfsm-s2")
	start(sandboxEnv + "=s3")
	start("CNI_NETNS=" + dir + "/cni-4")

	running, err := Plugins(dir + "/")
	require.NoError(t, err)
	require.True(t, slices.Contains(running, Running{Pid: ours, ID: sandboxID}), "%v", running)
	for _, r := range running {
		require.Equal(t, sandboxID, r.ID, "the others are nobody's, or another containerd's")
	}
	require.NoError(t, End(t.Context(), sandboxID, 0))
	running, err = Plugins(dir)
	require.NoError(t, err)
	require.NotContains(t, running, Running{Pid: ours, ID: sandboxID})
}
