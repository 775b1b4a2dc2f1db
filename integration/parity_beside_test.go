package integration

import (
	"encoding/json"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// A stock pod beside a podfsm pod is untouched: containerd's own service runs it, on the same
// network, and podfsm does not list it.
func TestStockPodBeside(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.StockHandler)
	require.NoError(t, err)

	t.Run("pods", func(t *testing.T) {
		ours := startPod(t, n, harness.PodfsmHandler, n.PodConfig("ours"))
		stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
		def := startPod(t, n, "", n.PodConfig("default-handler"))

		list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
		require.NoError(t, err)
		require.Len(t, list.GetSandboxes(), 1)
		require.Equal(t, ours.ID, list.GetSandboxes()[0].GetId())

		server := startContainer(t, stock, "server", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
		visitor := startContainer(t, ours, "visitor")
		ip, err := stock.IP(t.Context())
		require.NoError(t, err)
		require.NotEmpty(t, ip)
		require.Equal(t, harness.IndexPage, exec(t, visitor, "wget", "-qO-", "http://"+ip+"/"))

		// Stopping podfsm pods leaves the stock pods as they are, and vice versa.
		require.NoError(t, ours.StopAndRemove(t.Context()))
		for _, pod := range []*harness.Pod{stock, def} {
			status, err := pod.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
		}
		require.Equal(t, "0\n", exec(t, server, "id", "-u"))
	})
	n.RequireClean(t, before)
}

// The answers about a podfsm pod and a stock pod with the same configuration have the same form.
func TestStatusLooksLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})

	type seen struct {
		status *runtime.PodSandboxStatus
		info   map[string]any
	}
	look := func(handler string) seen {
		pod := startPod(t, n, handler, n.PodConfig("pod-"+handler))
		resp, err := n.Runtime.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: pod.ID, Verbose: true})
		require.NoError(t, err)
		var info map[string]any
		require.NoError(t, json.Unmarshal([]byte(resp.GetInfo()["info"]), &info))
		return seen{resp.GetStatus(), info}
	}
	ours, stock := look(harness.PodfsmHandler), look(harness.StockHandler)

	require.Equal(t, keys(stock.info), keys(ours.info))
	for _, key := range []string{"processStatus", "netNamespaceClosed", "image", "snapshotter", "runtimeType"} {
		require.Equal(t, stock.info[key], ours.info[key], key)
	}
	for _, result := range []any{stock.info["cniResult"], ours.info["cniResult"]} {
		// Not all keys: stock's include the name of the veth, and "lo", which ours isn't made by a plugin.
		require.Contains(t, result.(map[string]any)["Interfaces"], "eth0")
	}
	require.Equal(t, keys(stock.info["config"].(map[string]any)), keys(ours.info["config"].(map[string]any)))
	require.Equal(t, keys(stock.info["runtimeSpec"].(map[string]any)), keys(ours.info["runtimeSpec"].(map[string]any)))
	require.Equal(t, stock.status.GetLinux().GetNamespaces().GetOptions().GetNetwork(), ours.status.GetLinux().GetNamespaces().GetOptions().GetNetwork())
	require.NotZero(t, ours.status.GetCreatedAt())
}

// keys returns the names in a JSON object, to compare forms.
func keys(object map[string]any) []string {
	return slices.Sorted(maps.Keys(object))
}
