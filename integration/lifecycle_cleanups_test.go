package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// noAgent is the body of a plugin whose agent is gone.
const noAgent = `echo '{"cniVersion": "1.0.0", "code": 11, "msg": "dial unix /run/agent.sock: connection refused"}'; exit 1`

// An operator can write off a cleanup that would block the stop of a pod forever. A drain can
// complete then.
func TestPendingCleanups(t *testing.T) {
	t.Parallel()
	n, before := warmNode(t)
	// running is a pod behind the bridge and the agent, whose DEL does what the body says.
	running := func(t *testing.T, name, body string) *harness.Pod {
		t.Helper()
		installPlugin(t, n, "agent", fmt.Sprintf(agent, body))
		require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "agent"})...))
		return runPod(t, n, n.PodConfig(name))
	}
	ends := func(t *testing.T, args ...string) {
		t.Helper()
		stdout, stderr, code := cli(t, n, append([]string{"cleanups"}, args...)...)
		require.Zero(t, code, "%s%s", stdout, stderr)
		require.Contains(t, stdout, "the cleanup is completed")
	}

	t.Run("a plugin is uninstalled while pods run", func(t *testing.T) {
		pod := running(t, "uninstalled", "exit 0")
		require.NoError(t, os.Remove(filepath.Join(n.Dir(), "cni/bin/agent")))
		require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
		err := pod.Stop(t.Context())
		require.ErrorContains(t, err, `failed to find plugin "agent"`)
		require.ErrorContains(t, err, "`podfsm cleanups` on the node")
		require.Empty(t, reserved(t, n), "the bridge's DEL was made")
		stdout, stderr, code := cli(t, n, "cleanups", "retry", "default/uninstalled")
		require.Equal(t, 2, code, stderr)
		require.Contains(t, stdout, `failed to find plugin "agent"`)
		_, stderr, code = cli(t, n, "cleanups", "write-off", "default/uninstalled", "--plugin", "bridge", "--reason", "a mistake")
		require.Equal(t, 4, code)
		require.Contains(t, stderr, networkName(n)+"/agent")
		ends(t, "write-off", "default/uninstalled", "--plugin", "agent", "--reason", "it is gone for good")

		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		require.NoError(t, pod.Stop(t.Context()))
		stdout, _, _ = cli(t, n, "timeline", "uninstalled")
		require.Regexp(t, `(?m)^Written off\n`+networkName(n)+`/agent DEL, \S+ ago: it is gone for good$`, stdout)
		require.NoError(t, pod.Remove(t.Context()))
	})

	t.Run("a plugin's agent is gone, and the node is drained", func(t *testing.T) {
		pod := running(t, "drained", noAgent)
		stdout, stderr, code := cli(t, n, "drain", "--config=/dev/null", "--force", "--wait=1s")
		require.Equal(t, 2, code, stdout)
		require.Contains(t, stderr, "connection refused")
		require.Contains(t, stderr, "1 have a pending cleanup: remove its cause and run `podfsm cleanups retry`, or give it up by `podfsm cleanups write-off`")
		ends(t, "write-off", pod.ID[:13], "--all", "--reason", "the agent is gone")
		stdout, stderr, code = cli(t, n, "drain", "--config=/dev/null", "--force", "--wait=1m")
		require.Zero(t, code, "%s%s", stdout, stderr)
		_, stderr, code = cli(t, n, "drain", "--config=/dev/null", "--cancel")
		require.Zero(t, code, stderr)
		require.Contains(t, n.Log(), "cleanup written off")
	})

	t.Run("a kill comes between a DEL and its record", func(t *testing.T) {
		cache := filepath.Join(t.TempDir(), "cache")
		require.NoError(t, os.WriteFile(cache, nil, 0o600))
		pod := running(t, "killed", fmt.Sprintf(`rm %s && kill -9 $PPID && exit 0
echo '{"cniVersion": "1.0.0", "code": 999, "msg": "no cache of this pod"}'; exit 1`, cache))
		require.Error(t, pod.Stop(t.Context()), "the daemon died")
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		err := pod.Stop(t.Context())
		require.ErrorContains(t, err, "no cache of this pod")
		require.ErrorContains(t, err, "an earlier try was interrupted by a restart of containerd, and may have succeeded")
		ends(t, "write-off", "default/killed", "--plugin", networkName(n)+"/agent", "--reason", "its cache is gone, so it has succeeded")
		require.NoError(t, pod.StopAndRemove(t.Context()))
	})

	t.Run("retried after the cause is gone", func(t *testing.T) {
		pod := running(t, "retried", noAgent)
		require.ErrorContains(t, pod.Stop(t.Context()), "connection refused")
		installPlugin(t, n, "agent", fmt.Sprintf(agent, "exit 0"))
		stdout, stderr, code := cli(t, n, "cleanups", "retry", "default/retried")
		if !strings.Contains(stderr, "pending cleanup") { // the automatic retry may come first
			require.Zero(t, code, "%s%s", stdout, stderr)
			require.Contains(t, stdout, "the cleanup is completed")
		}
		_, stderr, code = cli(t, n, "cleanups", "retry", "default/retried")
		require.Equal(t, 4, code)
		require.Contains(t, stderr, `no sandbox with a pending cleanup matches "default/retried"`)
		require.NoError(t, pod.StopAndRemove(t.Context()))
	})

	require.NoError(t, os.Remove(filepath.Join(n.Dir(), "cni/bin/agent")))
	require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	n.RequireClean(t, before)
}
