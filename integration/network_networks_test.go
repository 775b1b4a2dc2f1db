package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// recorder is a CNI plugin that writes the first request of each command to files named after
// itself and the command, and answers ADD with a fake interface.
const recorder = `#!/bin/sh
file=%s/$(basename "$0").$CNI_COMMAND
[ -e "$file" ] && exit
cat > "$file"
env | grep ^CNI_ > "$file.env"
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "'$CNI_IFNAME'", "sandbox": "'$CNI_NETNS'"}], "ips": [{"address": "10.99.0.2/24", "interface": 0}]}'
`

// writeNetwork writes a network into a directory of CNI configuration.
func writeNetwork(t *testing.T, dir, name string, plugins ...harness.Plugin) {
	t.Helper()
	list, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": name, "plugins": plugins})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, name+".conflist"), list, 0o644))
}

func TestNetworks(t *testing.T) {
	t.Parallel()
	confDir := t.TempDir()
	startNode := func() *harness.Node {
		return harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  cni_conf_dir = %q
  cni_max_conf_num = 2
`, twoHandler, confDir)})
	}
	n := startNode()
	for _, tc := range []struct {
		name string
		test func(*testing.T, *harness.Node)
	}{
		{"port mappings", testPortMappings},
		{"UDP port of a replaced pod", testUDPPortOfAReplacedPod},
		{"bandwidth", testBandwidth},
		{"requests like stock's", testRequestsLikeStock},
		{"two networks of a handler", func(t *testing.T, n *harness.Node) { testTwoNetworks(t, n, confDir) }},
		{"another configuration at DEL", testAnotherConfiguration},
		{"no configuration at DEL", testNoConfiguration},
		{"ADD and DEL fail", testAddAndDelFail},
		{"DEL doesn't find", testDelNotFound},
	} {
		if !t.Run(tc.name, func(t *testing.T) { tc.test(t, n) }) {
			n = startNode() // a clean node for the other tests
		}
		require.NoError(t, n.Heal())
		require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	}
	t.Run("stock, for comparison", func(t *testing.T) { testStock(t, n) })
}

func testPortMappings(t *testing.T, n *harness.Node) {
	config := n.PodConfig("web", func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{
			{ContainerPort: 80, HostPort: 8080},
			{ContainerPort: 80, HostPort: 8081, HostIp: harness.Gateway},
			{ContainerPort: 81}, // not published
		}
	})
	before := warmUp(t, n, harness.PodfsmHandler, config)
	t.Run("pod", func(t *testing.T) {
		pod := startPod(t, n, harness.PodfsmHandler, config)
		startContainer(t, pod, "server", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
		for _, address := range []string{harness.Gateway + ":8080", "127.0.0.1:8080", harness.Gateway + ":8081"} {
			requirePage(t, n, address)
		}
		_, err := n.Dial(t.Context(), "tcp", "127.0.0.1:8081")
		require.Error(t, err, "a mapping for one address of the node")
	})
	_, err := n.Dial(t.Context(), "tcp", harness.Gateway+":8080")
	require.Error(t, err)
	n.RequireClean(t, before)
}

func testBandwidth(t *testing.T, n *harness.Node) {
	require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()[0],
		harness.Plugin{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}}))
	config := n.PodConfig("slow", func(c *runtime.PodSandboxConfig) {
		c.Annotations["kubernetes.io/ingress-bandwidth"] = "8M"
		c.Annotations["kubernetes.io/egress-bandwidth"] = "16M"
	})
	before := warmUp(t, n, harness.PodfsmHandler, config)
	t.Run("pod", func(t *testing.T) {
		startPod(t, n, harness.PodfsmHandler, config)
		require.Equal(t, map[string]uint64{"veth": 1e6, "ifb": 2e6}, limits(t, n), "bytes a second")
	})
	require.Empty(t, limits(t, n))
	n.RequireClean(t, before)
}

// podfsm gives plugins the same input as containerd.
func testRequestsLikeStock(t *testing.T, n *harness.Node) {
	capabilities := map[string]bool{}
	for _, name := range []string{"portMappings", "bandwidth", "dns", "cgroupPath", "ipRanges", "io.kubernetes.cri.pod-annotations"} {
		capabilities[name] = true
	}
	require.NoError(t, n.SetChain(t.Context(), harness.Plugin{"type": "recorder", "capabilities": capabilities}))
	config := n.PodConfig("pod", func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1", Protocol: runtime.Protocol_UDP}}
		c.Annotations["kubernetes.io/ingress-bandwidth"] = "10M"
	})
	stock, ours := requests(t, n, harness.StockHandler, config), requests(t, n, harness.PodfsmHandler, config)
	require.Equal(t, stock, ours)

	for field, want := range map[string]string{
		"ADD.env.CNI_ARGS.K8S_POD_NAME":              "pod",
		"ADD.env.CNI_CONTAINERID":                    "ID",
		"ADD.env.CNI_NETNS":                          "NETNS",
		"ADD.runtimeConfig.bandwidth.IngressRate":    "1e+07",
		"ADD.runtimeConfig.cgroupPath":               config.GetLinux().GetCgroupParent(),
		"ADD.runtimeConfig.dns.Servers":              "10.96.0.10",
		"ADD.runtimeConfig.portMappings[0].HostPort": "8080",
		"DEL.prevResult.ips[0].address":              "10.99.0.2/24",
		"DEL.runtimeConfig.portMappings[0].Protocol": "udp",
		"ADD.runtimeConfig.io.kubernetes.cri.pod-annotations.kubernetes.io/config.source": "api",
	} {
		require.Equal(t, want, ours[field], field)
	}
	require.NotContains(t, slices.Collect(maps.Keys(ours)), "ADD.runtimeConfig.ipRanges", "nothing in CRI gives one")
}

var netNSPath = regexp.MustCompile(`[^ ]*/netns/(podfsm-ID|cni-[0-9a-f-]{36})`)

// requests returns the requests that the recorder got for a pod, without what differs from pod to
// pod.
func requests(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) facts {
	t.Helper()
	dir := t.TempDir()
	installPlugin(t, n, "recorder", fmt.Sprintf(recorder, dir))
	pod, err := n.RunPod(t.Context(), handler, config)
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(t.Context()))

	seen := facts{}
	for _, command := range []string{"ADD", "DEL"} {
		request, err := os.ReadFile(filepath.Join(dir, "recorder."+command))
		require.NoError(t, err)
		seen.add(t, command, json.RawMessage(request))
		env, err := os.ReadFile(filepath.Join(dir, "recorder."+command+".env"))
		require.NoError(t, err)
		for _, variable := range strings.Fields(string(env)) {
			name, value, _ := strings.Cut(variable, "=")
			if name != "CNI_ARGS" {
				seen[command+".env."+name] = value
				continue
			}
			for _, pair := range strings.Split(value, ";") {
				key, value, _ := strings.Cut(pair, "=")
				seen[command+".env.CNI_ARGS."+key] = value
			}
		}
	}
	for field, value := range seen {
		seen[field] = netNSPath.ReplaceAllString(strings.ReplaceAll(value, pod.ID, "ID"), "NETNS")
	}
	return seen
}

func testTwoNetworks(t *testing.T, n *harness.Node, confDir string) {
	writeNetwork(t, confDir, "a", bridge(n, "bra", "10.90.1.0/24"))
	writeNetwork(t, confDir, "b", bridge(n, "brb", "10.90.2.0/24"))
	writeNetwork(t, confDir, "c", harness.Plugin{"type": "one-too-many"})
	config := n.PodConfig("pod")
	before := warmUp(t, n, twoHandler, config)

	t.Run("pod", func(t *testing.T) {
		pod := startPod(t, n, twoHandler, config)
		container := startContainer(t, pod, "main")
		require.Equal(t, []string{"10.90.1.3"}, podIPs(t, pod), "those of eth0")
		require.Contains(t, exec(t, container, "ip", "-4", "address", "show", "eth0"), " 10.90.1.3/24 ")
		require.Contains(t, exec(t, container, "ip", "-4", "address", "show", "eth1"), " 10.90.2.3/24 ")
		require.NotContains(t, exec(t, container, "ip", "link"), "eth2")
		exec(t, container, "ping", "-c1", "10.90.2.1")
	})
	n.RequireClean(t, before)

	t.Run("at the same time", func(t *testing.T) {
		require.NoError(t, n.Fault("bridge.ADD", "block"))
		done := make(chan error, 1)
		go func() {
			pod, err := n.RunPod(t.Context(), twoHandler, config)
			if err == nil {
				err = pod.StopAndRemove(t.Context())
			}
			done <- err
		}()
		soon, cancel := context.WithTimeout(t.Context(), waitFor)
		defer cancel()
		both := n.Faults.WaitReached(soon, "bridge.ADD", 2)
		require.NoError(t, n.Heal())
		require.NoError(t, <-done)
		require.NoError(t, both)
	})
	n.RequireClean(t, before)

	t.Run("one fails", func(t *testing.T) {
		require.True(t, attachedBeside(t, n, confDir, twoHandler, config), "the other is attached, and detached again")
	})
	n.RequireClean(t, before)
}

// attachedBeside fails the first of two networks of a directory, and reports whether the second one
// was tried.
func attachedBeside(t *testing.T, n *harness.Node, confDir, handler string, config *runtime.PodSandboxConfig) bool {
	t.Helper()
	dir := t.TempDir()
	installPlugin(t, n, "refuser", refuser)
	installPlugin(t, n, "recorder", fmt.Sprintf(recorder, dir))
	writeNetwork(t, confDir, "a", harness.Plugin{"type": "refuser"})
	writeNetwork(t, confDir, "b", harness.Plugin{"type": "recorder"})
	require.ErrorContains(t, failRun(t, n, handler, config), "refused")
	added, err := filepath.Glob(filepath.Join(dir, "recorder.ADD"))
	require.NoError(t, err)
	deleted, err := filepath.Glob(filepath.Join(dir, "recorder.DEL"))
	require.NoError(t, err)
	require.Equal(t, len(added), len(deleted))
	return len(added) > 0
}

// DEL uses the configuration of ADD, whatever the current one is.
func testAnotherConfiguration(t *testing.T, n *harness.Node) {
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "new", "10.90.3.0/24")))
	runOnce(t, n, n.PodConfig("pod"))
	require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	early, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("early"))
	require.NoError(t, err)

	require.NoError(t, n.SetChain(t.Context(), bridge(n, "new", "10.90.3.0/24")))
	late, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("late"))
	require.NoError(t, err)
	require.Contains(t, podIPs(t, late)[0], "10.90.3.")
	require.ElementsMatch(t, slices.Concat(podIPs(t, early), podIPs(t, late)), reserved(t, n))

	require.NoError(t, early.StopAndRemove(t.Context()))
	require.Equal(t, podIPs(t, late), reserved(t, n))
	require.NoError(t, late.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// containerd#8774
func testNoConfiguration(t *testing.T, n *harness.Node) {
	before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
	require.NoError(t, err)
	require.NoError(t, n.SetChain(t.Context()))
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// containerd#12130
func testAddAndDelFail(t *testing.T, n *harness.Node) {
	before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))

	t.Run("never", func(t *testing.T) {
		require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
		for range 3 {
			require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod")), `"missing"`)
			n.RequireClean(t, before)
		}
		require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	})

	t.Run("at first", func(t *testing.T) {
		require.NoError(t, n.Fault("portmap.ADD", "1*error(no mapping)"))
		require.NoError(t, n.Fault("portmap.DEL", "error(no mapping to remove)"))
		err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		require.ErrorContains(t, err, "no mapping")
		require.ErrorContains(t, err, "no mapping to remove")
		require.Empty(t, reserved(t, n), "the plugins before it in the chain are deleted all the same")
		waitPending(t, n, "default/pod")
		require.NoError(t, n.Heal())
		n.RequireClean(t, before) // the next try is automatic
	})
}

// go-cni#102
func testDelNotFound(t *testing.T, n *harness.Node) {
	before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
	require.NoError(t, err)
	ips := podIPs(t, pod)

	require.NoError(t, n.Fault("bridge.DEL", "error(ippool not found)"))
	require.ErrorContains(t, pod.Stop(t.Context()), "ippool not found")
	require.ErrorContains(t, pod.Remove(t.Context()), "ippool not found")
	require.Equal(t, ips, reserved(t, n))
	waitPending(t, n, pod.ID)
	_, err = pod.Status(t.Context())
	require.NoError(t, err, "the pod stays until its cleanup has completed")

	require.NoError(t, n.Heal())
	require.NoError(t, pod.StopAndRemove(t.Context()), "what the kubelet does next")
	require.Empty(t, reserved(t, n))
	n.RequireClean(t, before)
}

// testStock shows the effect of the same faults on stock pods, and leaves what they leave.
func testStock(t *testing.T, n *harness.Node) {
	t.Run("no configuration at DEL", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), harness.StockHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		require.NoError(t, n.SetChain(t.Context()))
		require.ErrorContains(t, pod.Stop(t.Context()), "cni plugin not initialized")
		require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
		require.NoError(t, pod.StopAndRemove(t.Context()))
	})
	t.Run("ADD and DEL fail", func(t *testing.T) {
		require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
		for tries := range 3 {
			require.ErrorContains(t, failRun(t, n, harness.StockHandler, n.PodConfig("pod")), `"missing"`)
			require.Len(t, reserved(t, n), tries+1, "each try keeps an address")
		}
		require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	})
	t.Run("DEL doesn't find", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), harness.StockHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		ip := podIPs(t, pod)[0]
		require.NoError(t, n.Fault("bridge.DEL", "error(ippool not found)"))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.Contains(t, reserved(t, n), ip)
	})
}

// TestNetworkSettings tests the settings for all pods of a node with pods of both handlers.
func TestNetworkSettings(t *testing.T) {
	t.Parallel()
	const v4, v6 = "10.90.4.0/24", "fd00:90::/64"
	for _, tc := range []struct {
		serially   bool
		preference string
		v4First    string // family of the main address where the plugin gives the IPv4 address first
		v6First    string // and where it gives the IPv6 address first
	}{
		{false, "", "4", "4"},
		{true, "ipv6", "6", "6"},
		{false, "cni", "4", "6"},
	} {
		t.Run(fmt.Sprintf("ip_pref %q, setup_serially %t", tc.preference, tc.serially), func(t *testing.T) {
			n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.cni]
  max_conf_num = 2
  setup_serially = %t
  ip_pref = %q
`, tc.serially, tc.preference)})
			require.NoError(t, n.SetChain(t.Context(), bridge(n, "dual", v4, v6)))
			before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
			require.NoError(t, err)
			for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
				require.NoError(t, n.SetChain(t.Context(), bridge(n, "dual", v4, v6)))
				t.Run(handler+" IPv4 first", func(t *testing.T) { requireDualStack(t, n, handler, tc.v4First) })
				require.NoError(t, n.SetChain(t.Context(), bridge(n, "dual", v6, v4)))
				t.Run(handler+" IPv6 first", func(t *testing.T) { requireDualStack(t, n, handler, tc.v6First) })
				n.RequireClean(t, before)
			}
			require.NoError(t, n.SetChain(t.Context()))
			besides := attachedBeside(t, n, n.CNIConfDir(), harness.PodfsmHandler, n.PodConfig("pod"))
			require.Equal(t, !tc.serially, besides, "a network is attached beside one that fails")
		})
	}
}

// requireDualStack requires that a server in a pod is reachable by both addresses, and that the
// main one is of this family.
func requireDualStack(t *testing.T, n *harness.Node, handler, first string) {
	t.Helper()
	pod := startPod(t, n, handler, n.PodConfig("pod"))
	startContainer(t, pod, "server", harness.Run("httpd", "-f", "-p", "[::]:80", "-h", "/www"))
	ips := podIPs(t, pod)
	require.Len(t, ips, 2)
	main := "6"
	if net.ParseIP(ips[0]).To4() != nil {
		main = "4"
	}
	require.Equal(t, first, main, "main address of %v", ips)
	for _, ip := range ips {
		requirePage(t, n, net.JoinHostPort(ip, "80"))
	}
}
