package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// ciliumQueue is the directory in which Cilium's plugin queues DELs while its agent is down.
const ciliumQueue = "/var/run/cilium/deleteQueue"

// ciliumGateway is the address of the node in Cilium's network: the gateway of its pods.
const ciliumGateway = "10.98.1.1"

// startCiliumAgent serves the part of the API of Cilium's agent that its plugin uses, until it is
// closed. The socket of a closed agent stays. Instead of loading BPF programs, the agent adds
// kernel routes to the pods.
func startCiliumAgent(t *testing.T, n *harness.Node, socket string) *http.Server {
	t.Helper()
	require.NoError(t, os.RemoveAll(socket))
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	api := http.NewServeMux()
	answer := func(code int, object any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(object)
		}
	}
	api.HandleFunc("GET /v1/config", answer(http.StatusOK, map[string]any{"status": map[string]any{
		"datapathMode": "veth", "ipam-mode": "delegated-plugin", "deviceMTU": 1500, "routeMTU": 1450,
		"addressing": map[string]any{"ipv4": map[string]any{"enabled": true, "ip": ciliumGateway}},
	}}))
	api.HandleFunc("GET /v1/endpoint/{id}/healthz", answer(http.StatusOK, map[string]any{"overallHealth": "OK"}))
	api.HandleFunc("DELETE /v1/endpoint/{id}", answer(http.StatusOK, nil))
	api.HandleFunc("PUT /v1/endpoint/{id}", func(w http.ResponseWriter, r *http.Request) {
		var endpoint struct {
			Link       string `json:"interface-name"`
			Addressing struct{ IPv4 string }
		}
		err := json.NewDecoder(r.Body).Decode(&endpoint)
		if err == nil {
			address, _, _ := strings.Cut(endpoint.Addressing.IPv4, "/")
			_, err = n.Command(r.Context(), "ip", "route", "replace", address, "dev", endpoint.Link)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		answer(http.StatusCreated, map[string]any{})(w, r)
	})
	server := &http.Server{Handler: api}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l) // until it is closed
	}()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return server
}

// ciliumQueued returns the queued DELs.
func ciliumQueued(t *testing.T) (ids []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(ciliumQueue, "*.delete"))
	require.NoError(t, err)
	for _, file := range files {
		id, err := os.ReadFile(file)
		require.NoError(t, err)
		ids = append(ids, string(id))
	}
	return ids
}

// Cilium's plugin calls its agent at ADD. At DEL it writes a file if the agent is down.
func testCilium(t *testing.T, n *harness.Node, socket string) {
	require.NoDirExists(t, filepath.Dir(ciliumQueue), "there is a Cilium on this machine")
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(filepath.Dir(ciliumQueue))) })
	_, err := n.Command(t.Context(), "ip", "address", "add", ciliumGateway+"/32", "dev", "lo")
	require.NoError(t, err)
	agent := startCiliumAgent(t, n, socket)
	network := func(version string) otherNetwork {
		return otherNetwork{version: version, plugins: []harness.Plugin{
			{"type": "cilium-cni", "ipam": bridge(n, "", "10.98.1.0/24")["ipam"]},
			{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
		}}
	}
	for _, version := range []string{"1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) { network(version).requireLife(t, n, n.PodConfig("pod"), nil) })
	}
	chain := network("1.0.0")
	require.NoError(t, n.SetChainOf(t.Context(), chain.version, chain.plugins...))
	before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	require.Empty(t, ciliumQueued(t))

	t.Run("the agent is gone at CHECK and DEL", func(t *testing.T) {
		pod := runPod(t, n, n.PodConfig("pod"))
		require.NoError(t, agent.Close())
		require.NoError(t, n.Restart(t.Context()))
		require.Eventually(t, func() bool { return strings.Contains(n.Log(), "CNI plugin can't check the pod now") }, 3*waitFor, tick)
		view := inspect(t, n, pod.ID).GetSandbox()
		require.Equal(t, "Ready", view.GetState())
		require.Empty(t, view.GetError(), "that says nothing of the pod")
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.Equal(t, []string{"cni-attachment-id:" + pod.ID + ":eth0"}, ciliumQueued(t))
		chain.requireClean(t, n, before)
	})
	t.Run("the agent is gone at ADD", func(t *testing.T) {
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod")), "unable to connect to Cilium agent")
		require.Len(t, ciliumQueued(t), 2, "the rollback's DEL, too")
		chain.requireClean(t, n, before)
	})
	t.Run("the agent is gone for so long that the queue is full", func(t *testing.T) {
		agent = startCiliumAgent(t, n, socket)
		pod := runPod(t, n, n.PodConfig("pod"))
		require.NoError(t, agent.Close())
		for i := range 256 {
			require.NoError(t, os.WriteFile(filepath.Join(ciliumQueue, fmt.Sprintf("%d.delete", i)), nil, 0o644))
		}
		require.ErrorContains(t, pod.Stop(t.Context()), "too many entries")
		startCiliumAgent(t, n, socket)
		runOnce(t, n, n.PodConfig("pod", attempt(1)))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		chain.requireClean(t, n, before)
	})
}
