package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestGC leaves addresses without a pod, and restarts containerd: exactly these addresses are
// freed.
func TestGC(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", delegated(n)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	// The first pods of containerd's own controller leave these.
	pod, err := n.RunPod(t.Context(), harness.StockHandler, n.PodConfig("pod"))
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
	restart := func(t *testing.T) string {
		t.Helper()
		at := len(n.Log())
		require.NoError(t, n.Restart(t.Context()))
		return n.Log()[at:]
	}

	t.Run("keeps what is in use", func(t *testing.T) {
		ours := startPod(t, n, harness.PodfsmHandler, n.PodConfig("ours"))
		stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
		server := startContainer(t, stock, "server", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
		ips := slices.Concat(podIPs(t, ours), podIPs(t, stock))
		stray := leak(t, n)
		require.Contains(t, restart(t), "CNI GC of network completed")
		require.NotContains(t, reserved(t, n), stray)
		require.ElementsMatch(t, ips, reserved(t, n))
		require.Equal(t, "0\n", exec(t, server, "id", "-u"))
		requirePage(t, n, podIPs(t, stock)[0]+":80")
	})
	n.RequireClean(t, before)

	t.Run("keeps what was being made", func(t *testing.T) {
		for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
			killInAdd(t, n, handler)
			stray := leak(t, n)
			// While the plugin lives, the network is not collected.
			at := len(n.Log())
			require.NoError(t, n.Start(t.Context()))
			if handler == harness.StockHandler {
				require.Len(t, reserved(t, n), 2)
				require.Contains(t, n.Log()[at:], "is a CNI plugin of another daemon or of the previous one")
				require.NoError(t, n.Kill(t.Context()))
				require.NoError(t, n.Faults.Release("delegate.ADD.after"))
				waitForPlugins(t, n)
				at = len(n.Log())
				require.NoError(t, n.Start(t.Context()))
				require.Contains(t, n.Log()[at:], "CNI GC of network completed")
				require.Len(t, reserved(t, n), 1, "its pod may use it yet")
				require.NotContains(t, reserved(t, n), stray)
			}
			require.NoError(t, n.Heal())
			removePods(t, n)
			waitForPlugins(t, n)
			restart(t)
			n.RequireClean(t, before)
		}
	})

	t.Run("another runtime shares the network", func(t *testing.T) {
		stray := leak(t, n)
		entry := filepath.Join(libcniCache, networkName(n)+"-stranger-eth0")
		require.NoError(t, os.MkdirAll(libcniCache, 0o700))
		require.NoError(t, os.WriteFile(entry, fmt.Appendf(nil, `{"kind":"cniCacheV1","containerId":"stranger","networkName":%q,"ifName":"eth0"}`, networkName(n)), 0o600))
		defer os.Remove(entry)
		require.Contains(t, restart(t), `an attachment of container \"stranger\", which this containerd doesn't know`)
		require.Contains(t, reserved(t, n), stray)
		require.NoError(t, os.Remove(entry))

		pinned := filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/netns/podfsm-stranger")
		require.NoError(t, os.WriteFile(pinned, nil, 0o600))
		require.Contains(t, restart(t), "podfsm-stranger")
		require.Contains(t, reserved(t, n), stray)
		require.NoError(t, os.Remove(pinned))
		restart(t)
		require.Empty(t, reserved(t, n))
	})
	n.RequireClean(t, before)

	t.Run("killed in the middle, and hanging", func(t *testing.T) {
		leak(t, n)
		require.NoError(t, n.Fault("delegate.GC", "block"))
		require.NoError(t, n.Stop(t.Context()))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = n.Start(ctx)
		}()
		require.NoError(t, n.Faults.WaitReached(t.Context(), "delegate.GC", 1))
		require.NoError(t, n.Kill(t.Context()))
		cancel()
		<-done
		at := len(n.Log())
		require.NoError(t, n.Start(t.Context()), "containerd's start waits for a bounded time")
		require.Contains(t, n.Log()[at:], "CNI GC took more than 5s")
		waitForPlugins(t, n)
		require.Len(t, reserved(t, n), 1)
		require.NoError(t, n.Heal())
		restart(t)
	})
	n.RequireClean(t, before)

	t.Run("by host-local itself", func(t *testing.T) {
		require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", n.DefaultChain()...))
		stays := startPod(t, n, harness.PodfsmHandler, n.PodConfig("stays"))
		leak(t, n)
		require.Len(t, reserved(t, n), 2)
		restart(t)
		require.Equal(t, podIPs(t, stays), reserved(t, n))
	})
	n.RequireClean(t, before)
}

func TestGCOff(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  cni_gc = "off"
`})
	require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", delegated(n)))
	runOnce(t, n, n.PodConfig("pod"))
	stray := leak(t, n)
	require.NoError(t, n.Restart(t.Context()))
	require.Equal(t, []string{stray}, reserved(t, n))
}

// The ledger is lost, with everything about the network of a pod. The pod can be stopped and
// removed, and its address is freed: by a DEL with the current configuration, or without one, by
// the next GC.
func TestLostLedger(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	lose := func(t *testing.T) *harness.Pod {
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		ips := podIPs(t, pod)
		require.NoError(t, n.Stop(t.Context()))
		for _, dir := range []string{"root", "state"} {
			require.NoError(t, os.RemoveAll(filepath.Join(n.Dir(), dir, "io.containerd.podsandbox.controller.v1.podfsm")))
		}
		require.NoError(t, n.Start(t.Context()))
		require.Equal(t, "Quarantined", inspect(t, n, pod.ID).GetSandbox().GetState())
		require.Equal(t, ips, reserved(t, n), "the pod may use it yet")
		return pod
	}
	t.Run("DEL", func(t *testing.T) {
		before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
		require.NoError(t, err)
		pod := lose(t)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})
	t.Run("GC", func(t *testing.T) {
		chain := harness.Plugin{"type": "delegate", "delegate": bridge(n, "lost", "10.92.1.0/24")}
		require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", chain))
		before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		pod := lose(t)
		require.NoError(t, n.SetChain(t.Context()))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.Len(t, reserved(t, n), 1)
		require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", chain))
		require.NoError(t, n.Restart(t.Context()))
		n.RequireClean(t, before)
	})
}

// libcniCache is the directory in which libcni keeps the attachments of containerd's own pods.
const libcniCache = "/var/lib/cni/results"

// killInAdd kills containerd after a pod got its address and before its plugin has answered.
func killInAdd(t *testing.T, n *harness.Node, handler string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	require.NoError(t, n.Fault("delegate.ADD.after", "1*block"))
	go func() {
		defer close(done)
		_, _ = n.RunPod(ctx, handler, n.PodConfig("in-flight"))
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), "delegate.ADD.after", 1))
	require.NoError(t, n.Kill(t.Context()))
	cancel()
	<-done
}
