package integration

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// requireKeptWhileDegraded requires that the kubelet keeps its pods, and all their containers, over
// starts of containerd with a degraded podfsm.
func requireKeptWhileDegraded(t *testing.T, n *harness.Node, k *kubelet.Kubelet) {
	t.Helper()
	pods := look(t, n, k)
	requireKept := func() {
		t.Helper()
		requireReady(t, k, slices.Collect(maps.Keys(pods))...)
		require.Equal(t, pods, look(t, n, k), "no pod is recreated, no container restarted")
		requireProbes(t, n, pods["private"].Containers["server"].ID)
	}
	config := filepath.Join(n.Dir(), "config.toml")
	correct, err := os.ReadFile(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(config, append(slices.Clone(correct), kataTable...), 0o644))
	killAndStart(t, n, k)
	requireKept()
	require.Contains(t, n.Log(), "podfsm is degraded")
	require.NoError(t, os.WriteFile(config, correct, 0o644))

	// Without the ledger, the kubelet can't read the status of podfsm's pods, and leaves them alone.
	require.NoError(t, n.Kill(t.Context()))
	giveBack := replaced("root/"+pluginDir, "not a directory", 0o600)(t, n)
	logged := len(k.Log())
	require.NoError(t, n.Start(t.Context()))
	require.Eventually(t, func() bool {
		return strings.Count(k.Log()[logged:], "failed to query controller status: podfsm is degraded") >= 3*len(pods)
	}, kubeletWait, kubeletTick)
	requireProbes(t, n, pods["private"].Containers["server"].ID)
	require.NoError(t, n.Kill(t.Context()))
	giveBack()
	require.NoError(t, n.Start(t.Context()))
	requireSyncs(t, k, slices.Collect(maps.Keys(pods))...)
	requireKept()
}
