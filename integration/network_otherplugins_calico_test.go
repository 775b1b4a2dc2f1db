package integration

import (
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// calicoNode is what Calico's plugin needs on its node and in its cluster.
type calicoNode struct {
	nodename   string // the file that calico/node writes when it has started
	kubeconfig string
}

// calicoPod is the path of the test's pod in the API server.
const calicoPod = "/api/v1/namespaces/default/pods/pod"

// startAPI starts an API server with the pods of the test and of the harness, and writes its
// kubeconfig.
func (c calicoNode) startAPI(t *testing.T, n *harness.Node) *kubeAPI {
	t.Helper()
	api := startKubeAPI(t, n)
	require.NoError(t, os.Rename(api.kubeconfig, c.kubeconfig))
	api.put("/apis/crd.projectcalico.org/v1/clusterinformations/default", map[string]any{
		"apiVersion": "crd.projectcalico.org/v1", "kind": "ClusterInformation",
		"metadata": map[string]any{"name": "default"}, "spec": map[string]any{"datastoreReady": true},
	})
	api.put("/api/v1/namespaces/default", map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": "default"}})
	for _, pod := range []string{calicoPod, path.Join(path.Dir(calicoPod), "warm-up")} {
		api.put(pod, map[string]any{
			"apiVersion": "v1", "kind": "Pod", "spec": map[string]any{"nodeName": n.Name()},
			"metadata": map[string]any{"name": path.Base(pod), "namespace": "default", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
		})
	}
	return api
}

// network returns a chain of Calico's plugin with addresses of host-local.
func (c calicoNode) network(n *harness.Node, version string) otherNetwork {
	return otherNetwork{version: version, plugins: []harness.Plugin{
		{
			"type": "calico", "nodename_file": c.nodename, "datastore_type": "kubernetes", "policy": map[string]string{"type": "k8s"},
			"kubernetes": map[string]string{"kubeconfig": c.kubeconfig},
			"ipam":       bridge(n, "", "10.97.1.0/24", "fd00:97::/64")["ipam"],
		},
		{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
	}}
}

// Calico's plugin keeps the addresses of pods in the API server, and asks it at ADD and at DEL.
func testCalico(t *testing.T, n *harness.Node) {
	// The pods' gateway. On other nodes the host's default route has proxy ARP answer for it.
	_, err := n.Command(t.Context(), "ip", "address", "add", "169.254.1.1/32", "dev", "lo")
	require.NoError(t, err)
	dir := t.TempDir()
	c := calicoNode{filepath.Join(dir, "nodename"), filepath.Join(dir, "kubeconfig")}
	require.NoError(t, os.WriteFile(c.nodename, []byte(n.Name()), 0o644))
	startAPI := func() *kubeAPI { return c.startAPI(t, n) } // until the end of the test, not of a subtest
	api := startAPI()
	for _, version := range []string{"0.3.1", "1.0.0"} {
		t.Run(version, func(t *testing.T) {
			c.network(n, version).requireLife(t, n, n.PodConfig("pod"), func(*harness.Container) {
				require.Contains(t, api.annotations(calicoPod)["cni.projectcalico.org/podIPs"], "10.97.1.")
			})
			require.Empty(t, api.annotations(calicoPod)["cni.projectcalico.org/podIPs"])
		})
	}
	chain := c.network(n, "1.0.0")
	require.NoError(t, n.SetChainOf(t.Context(), chain.version, chain.plugins...))
	before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	requirePending := func(t *testing.T, cleanups int) {
		t.Helper()
		require.Eventually(t, func() bool { // a cleanup isn't pending during a retry
			stdout, stderr, code := cli(t, n, "cleanups")
			require.Contains(t, []int{0, 2}, code, stderr)
			return strings.Count(stdout, `plugin type="calico"`) == cleanups
		}, waitFor, tick)
	}

	t.Run("the agent of the node has not started", func(t *testing.T) {
		require.NoError(t, os.Remove(c.nodename))
		for range 3 {
			require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod")),
				c.nodename+": no such file or directory: check that the calico/node container is running and has mounted /var/lib/calico/")
		}
		requirePending(t, 3)
		require.NoError(t, os.WriteFile(c.nodename, []byte(n.Name()), 0o644))
		runOnce(t, n, n.PodConfig("pod", attempt(1)))
		require.NoError(t, n.Restart(t.Context()))
		chain.requireClean(t, n, before)
	})
	t.Run("the API server is gone at ADD", func(t *testing.T) {
		require.NoError(t, api.server.Close())
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod")), "error getting ClusterInformation")
		requirePending(t, 1)
		stdout, stderr, code := cli(t, n, "cleanups", "write-off", "default/pod", "--plugin", "calico", "--reason", "ADD has made nothing")
		require.Zero(t, code, "%s%s", stdout, stderr)
		chain.requireClean(t, n, before)
		api = startAPI()
	})
	t.Run("the API server is gone at DEL", func(t *testing.T) {
		pod := runPod(t, n, n.PodConfig("pod"))
		require.NoError(t, api.server.Close())
		err := pod.Stop(t.Context())
		require.ErrorContains(t, err, "connection refused")
		require.ErrorContains(t, err, "`podfsm cleanups` on the node")
		requirePending(t, 1)
		api = startAPI()
		runOnce(t, n, n.PodConfig("pod", attempt(1)))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		chain.requireClean(t, n, before)
	})
	t.Run("the API server is gone for good", func(t *testing.T) {
		pod := runPod(t, n, n.PodConfig("pod"))
		ips := podIPs(t, pod)
		require.NoError(t, api.server.Close())
		require.ErrorContains(t, pod.Stop(t.Context()), "connection refused")
		stdout, stderr, code := cli(t, n, "cleanups", "write-off", pod.ID, "--plugin", "calico", "--reason", "the cluster is gone")
		require.Zero(t, code, "%s%s", stdout, stderr)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.ElementsMatch(t, ips, reserved(t, n), "Calico has run no IPAM plugin")
		for _, ip := range ips {
			require.NoError(t, os.Remove(filepath.Join(ipamDir(n), n.Name(), ip)))
		}
		startAPI()
		runOnce(t, n, n.PodConfig("pod", attempt(1)))
		chain.requireClean(t, n, before)
	})
}
