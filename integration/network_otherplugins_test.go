package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestOtherPlugins runs pods on CNI plugins of other projects: flannel's, and with PODFSM_FULL=1
// those that take minutes to build.
func TestOtherPlugins(t *testing.T) {
	agent := filepath.Join(t.TempDir(), "cilium.sock")
	n := harness.StartNode(t, harness.Config{Env: []string{"CILIUM_SOCK=" + agent}})
	install := func(name string) {
		program, err := harness.BuildPlugin(t.Context(), name)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(program, filepath.Join(n.Dir(), "cni/bin", name)))
	}
	install("flannel")
	t.Run("flannel", func(t *testing.T) { testFlannel(t, n) })
	if !full() {
		return
	}
	install("multus")
	t.Run("multus", func(t *testing.T) { testMultus(t, n) })
	t.Run("multus with networks", func(t *testing.T) { testMultusNetworks(t, n) })
	install("whereabouts")
	t.Run("whereabouts", func(t *testing.T) { testWhereabouts(t, n) })
	install("calico")
	t.Run("calico", func(t *testing.T) { testCalico(t, n) })
	install("cilium-cni")
	t.Run("cilium", func(t *testing.T) { testCilium(t, n, agent) })
}

// otherNetwork is a network of a plugin of another project.
type otherNetwork struct {
	version string // of CNI
	plugins []harness.Plugin
	state   string // the directory with the plugin's state for DEL
}

// requireLife runs a pod on a network through a failure, a restart of containerd and its removal.
func (want otherNetwork) requireLife(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig, inside func(*harness.Container)) {
	t.Helper()
	require.NoError(t, n.SetChainOf(t.Context(), want.version, want.plugins...))
	before := warmUp(t, n, harness.PodfsmHandler, config)

	require.NoError(t, n.SetChainOf(t.Context(), want.version, append(want.plugins, harness.Plugin{"type": "missing"})...))
	for range 2 {
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, config), `"missing"`)
		want.requireClean(t, n, before)
	}
	require.NoError(t, n.SetChainOf(t.Context(), want.version, want.plugins...))

	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
	require.NoError(t, err)
	checks := strings.Count(n.Log(), "checked ")
	require.NoError(t, n.Restart(t.Context()))
	waitForChecks(t, n, checks+1)
	view := inspect(t, n, pod.ID).GetSandbox()
	require.Equal(t, "Ready", view.GetState())
	require.Empty(t, view.GetError(), "CHECK finds nothing wrong")
	container := startContainer(t, pod, "server", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
	requirePage(t, n, view.GetIp()+":80")
	if inside != nil {
		inside(container)
	}
	require.NoError(t, pod.StopAndRemove(t.Context()))
	want.requireClean(t, n, before)
}

// requireClean requires that the node and the plugin's own directory are as before.
func (want otherNetwork) requireClean(t *testing.T, n *harness.Node, before harness.Census) {
	t.Helper()
	n.RequireClean(t, before)
	require.Empty(t, reserved(t, n))
	if want.state == "" {
		return
	}
	left, err := os.ReadDir(want.state)
	require.NoError(t, err)
	for _, entry := range left {
		require.True(t, entry.IsDir(), "%s is left", entry.Name())
	}
}

// The last release of the reference plugins with flannel's supports CNI up to 0.4.0.
func testFlannel(t *testing.T, n *harness.Node) {
	dir := t.TempDir()
	subnet := filepath.Join(dir, "subnet.env")
	plugins := []harness.Plugin{
		{
			"type": "flannel", "subnetFile": subnet, "dataDir": filepath.Join(dir, "state"),
			"ipam":     map[string]any{"dataDir": ipamDir(n)},
			"delegate": map[string]any{"bridge": "flannel0", "isDefaultGateway": true},
		},
		{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
	}
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	require.NoError(t, n.SetChainOf(t.Context(), "0.4.0", plugins...))
	require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("early")), "subnet.env", "flanneld hasn't written it yet")
	n.RequireClean(t, before)
	require.NoError(t, os.WriteFile(subnet, []byte("FLANNEL_NETWORK=10.92.0.0/16\nFLANNEL_SUBNET=10.92.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"), 0o644))
	for _, version := range []string{"0.3.1", "0.4.0"} {
		t.Run(version, func(t *testing.T) {
			otherNetwork{version, plugins, filepath.Join(dir, "state")}.requireLife(t, n, n.PodConfig("pod"), nil)
		})
	}
	t.Run("1.0.0", func(t *testing.T) {
		require.NoError(t, n.SetChainOf(t.Context(), "1.0.0", plugins...))
		before, err := n.Rest(t.Context())
		require.NoError(t, err)
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod")), "incompatible CNI versions")
		n.RequireClean(t, before)
	})
	t.Run("flanneld is gone", func(t *testing.T) {
		require.NoError(t, n.SetChainOf(t.Context(), "0.4.0", plugins...))
		before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		require.NoError(t, os.Remove(subnet))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})
}

// multus returns a chain of Multus with the node's own network as the first delegate.
func multus(n *harness.Node, version, dir, kubeconfig string) otherNetwork {
	conf := harness.Plugin{
		"type": "multus", "cniDir": dir, "binDir": filepath.Join(n.Dir(), "cni/bin"), "confDir": filepath.Join(dir, "none"),
		"capabilities": map[string]bool{"portMappings": true},
		"delegates":    []map[string]any{{"cniVersion": version, "name": "inner", "plugins": n.DefaultChain()}},
	}
	if kubeconfig != "" {
		conf["kubeconfig"] = kubeconfig
	}
	return otherNetwork{version, []harness.Plugin{conf}, dir}
}

func testMultus(t *testing.T, n *harness.Node) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			config := n.PodConfig("pod", func(c *runtime.PodSandboxConfig) {
				c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8090}}
			})
			multus(n, version, t.TempDir(), "").requireLife(t, n, config, func(*harness.Container) {
				requirePage(t, n, "127.0.0.1:8090")
			})
		})
	}
}

const attachmentDefinitions = "/apis/k8s.cni.cncf.io/v1/namespaces/default/network-attachment-definitions/"

// attachments stores a pod that requests networks, and the networks.
func (a *kubeAPI) attachments(t *testing.T, config *runtime.PodSandboxConfig, networks map[string]harness.Plugin) {
	t.Helper()
	names := make([]string, 0, len(networks))
	for name, plugin := range networks {
		plugin["name"], plugin["cniVersion"] = name, "1.0.0"
		conf, err := json.Marshal(plugin)
		require.NoError(t, err)
		a.put(attachmentDefinitions+name, map[string]any{
			"apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
			"metadata": map[string]any{"name": name, "namespace": "default"}, "spec": map[string]any{"config": string(conf)},
		})
		names = append(names, name)
	}
	pod := config.GetMetadata()
	a.put("/api/v1/namespaces/default/pods/"+pod.GetName(), map[string]any{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{
			"name": pod.GetName(), "namespace": "default", "uid": pod.GetUid(),
			"annotations": map[string]any{"k8s.v1.cni.cncf.io/networks": strings.Join(names, ",")},
		},
	})
}

// Networks that pods request by annotation, with the API server up, down, and down without the
// state of Multus.
func testMultusNetworks(t *testing.T, n *harness.Node) {
	api := startKubeAPI(t, n)
	config := n.PodConfig("pod")
	blue := map[string]harness.Plugin{"blue": bridge(n, "blue", "10.93.1.0/24")}
	api.attachments(t, config, blue)
	dir := t.TempDir()
	chain := multus(n, "1.0.0", dir, api.kubeconfig)
	chain.requireLife(t, n, config, func(c *harness.Container) {
		require.Contains(t, exec(t, c, "ip", "-4", "address", "show", "net1"), " 10.93.1.")
	})
	before, err := n.Rest(t.Context())
	require.NoError(t, err)

	t.Run("one network refuses", func(t *testing.T) {
		installPlugin(t, n, "refuser", refuser)
		api.attachments(t, config, map[string]harness.Plugin{"red": {"type": "refuser"}})
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, config), "refused")
		chain.requireClean(t, n, before)
	})
	t.Run("a plugin is missing", func(t *testing.T) {
		// Multus runs it at DEL, too, and fails. The pod can be tried again meanwhile.
		api.attachments(t, config, map[string]harness.Plugin{"red": {"type": "absent"}})
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, config), "absent")
		waitPending(t, n, "default/pod")
		api.attachments(t, config, blue)
		runOnce(t, n, config)
		installPlugin(t, n, "absent", "#!/bin/sh\n")
		require.NoError(t, n.Restart(t.Context()))
		chain.requireClean(t, n, before)
	})
	t.Run("no such network", func(t *testing.T) {
		api.attachments(t, config, blue)
		api.drop(attachmentDefinitions + "blue")
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, config), "blue")
		chain.requireClean(t, n, before)
	})

	api.attachments(t, config, blue)
	cached, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
	require.NoError(t, err)
	require.NoError(t, api.server.Close())
	t.Run("the API server is gone at DEL", func(t *testing.T) {
		require.NoError(t, cached.StopAndRemove(t.Context()))
		chain.requireClean(t, n, before)
	})
	t.Run("the API server is gone at ADD", func(t *testing.T) {
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, config), "connection refused")
		chain.requireClean(t, n, before)
	})
	t.Run("its cache is gone at DEL", func(t *testing.T) {
		local := multus(n, "1.0.0", dir, "")
		require.NoError(t, n.SetChainOf(t.Context(), local.version, local.plugins...))
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
		require.NoError(t, err)
		ips := podIPs(t, pod)
		require.NoError(t, os.Remove(filepath.Join(dir, pod.ID)))
		require.NoError(t, pod.StopAndRemove(t.Context()), "Multus says that all is done")
		require.Equal(t, ips, reserved(t, n), "it has called no delegate")
		require.NoError(t, os.Remove(filepath.Join(ipamDir(n), "inner", ips[0])))
	})
}

// whereabouts keeps its addresses in the API server.
func testWhereabouts(t *testing.T, n *harness.Node) {
	api := startKubeAPI(t, n)
	conf := filepath.Join(t.TempDir(), "whereabouts.conf")
	require.NoError(t, os.WriteFile(conf, fmt.Appendf(nil, `{"kubernetes": {"kubeconfig": %q}, "enable_overlapping_ranges": false}`, api.kubeconfig), 0o600))
	plugins := []harness.Plugin{{
		"type": "bridge", "bridge": "where0", "isGateway": true,
		"ipam": map[string]any{"type": "whereabouts", "configuration_path": conf, "range": "10.94.1.0/24", "gateway": "10.94.1.1", "exclude": []string{"10.94.1.1/32"}},
	}}
	allocations := func() int {
		api.mu.Lock()
		defer api.mu.Unlock()
		var given int
		for path, object := range api.objects {
			if strings.Contains(path, "/ippools/") {
				spec, _ := object["spec"].(map[string]any)
				all, _ := spec["allocations"].(map[string]any)
				given += len(all)
			}
		}
		return given
	}
	for _, version := range []string{"0.3.1", "1.0.0"} {
		t.Run(version, func(t *testing.T) {
			otherNetwork{version: version, plugins: plugins}.requireLife(t, n, n.PodConfig(fmt.Sprint("pod-", strings.ReplaceAll(version, ".", "-"))),
				func(*harness.Container) { require.Equal(t, 1, allocations()) })
			require.Zero(t, allocations())
		})
	}
	t.Run("its kubeconfig is gone at DEL", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		away := api.kubeconfig + ".away"
		require.NoError(t, os.Rename(api.kubeconfig, away))
		require.ErrorContains(t, pod.Stop(t.Context()), "kubeconfig")
		waitPending(t, n, pod.ID)
		require.NoError(t, os.Rename(away, api.kubeconfig))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.Zero(t, allocations())
	})
}
