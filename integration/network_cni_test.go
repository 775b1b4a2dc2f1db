package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestChains runs pods on chains of the reference plugins in each version of CNI, and restarts
// containerd: CHECK finds no problem, except behind plugins that move the route that bridge looks
// for.
func TestChains(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	removeWires := addWires(t, n, "10.95.1.1/24 fd00:95:1::1/64", "10.95.2.1/24", "10.95.5.1/24 fd00:95:5::1/64")
	pods := map[string]*harness.Pod{}
	subnet := 0
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		ipam := func() map[string]any {
			subnet++
			return map[string]any{"type": "host-local", "dataDir": ipamDir(n), "ranges": [][]map[string]string{{{"subnet": fmt.Sprintf("10.91.%d.0/24", subnet)}}}}
		}
		meta := []harness.Plugin{
			{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
			{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
			{"type": "tuning", "dataDir": filepath.Join(ipamDir(n), "tuning"), "mtu": 1400},
		}
		if version != "0.3.1" { // firewall doesn't support it
			meta = append(meta, harness.Plugin{"type": "firewall", "backend": "iptables"})
		}
		chains := map[string][]harness.Plugin{
			"bridge":   append([]harness.Plugin{{"type": "bridge", "bridge": fmt.Sprintf("br%d", subnet+1), "isGateway": true, "ipMasq": true, "ipam": ipam()}}, meta...),
			"ptp":      append([]harness.Plugin{{"type": "ptp", "ipMasq": true, "ipam": ipam()}}, meta[0]),
			"delegate": {delegated(n)},
		}
		if version == "1.1.0" {
			maps.Copy(chains, rareChains(t, n))
		}
		for name, chain := range sorted(chains) {
			require.NoError(t, n.SetChainOf(t.Context(), version, chain...))
			name = strings.ReplaceAll(name+"-"+version, ".", "-")
			pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig(name, func(c *runtime.PodSandboxConfig) {
				c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: int32(9000 + len(pods))}}
				c.Annotations["kubernetes.io/ingress-bandwidth"] = "8M"
			}))
			require.NoError(t, err, name)
			pods[name] = pod
		}
	}
	require.NoError(t, n.Restart(t.Context()))
	waitForChecks(t, n, 1)
	for name, pod := range sorted(pods) {
		t.Run(name, func(t *testing.T) {
			view := inspect(t, n, pod.ID)
			require.Equal(t, "Ready", view.GetSandbox().GetState())
			sbr, vrf := strings.HasPrefix(name, "sbr"), strings.HasPrefix(name, "vrf")
			if sbr || vrf {
				require.Contains(t, view.GetSandbox().GetError(), "Failed to find Gateway")
			} else {
				require.Empty(t, view.GetSandbox().GetError())
			}
			if !vrf { // only servers that ask for its link are reached by it
				startContainer(t, pod, "server", harness.Run("httpd", "-f", "-p", "[::]:80", "-h", "/www"))
				for _, ip := range podIPs(t, pod) {
					requirePage(t, n, net.JoinHostPort(ip, "80"))
				}
			}
			require.NoError(t, pod.StopAndRemove(t.Context()))
		})
	}
	require.Empty(t, reserved(t, n))
	require.Empty(t, limits(t, n))
	removeWires()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		after, err := n.Census(t.Context())
		require.NoError(c, err)
		for _, category := range []string{harness.NetNSMounts, harness.Mounts, harness.Ledger, harness.Processes, harness.Shims, harness.CNICache} {
			require.Equal(c, before[category], after[category], category)
		}
		for _, link := range after[harness.Links] {
			require.NotContains(c, link, "veth")
			require.NotContains(c, link, "ifb")
		}
		for _, rule := range after[harness.IPTables] {
			for _, pod := range pods {
				require.NotContains(c, rule, pod.ID)
			}
		}
	}, waitFor, tick)
}

// rareChains are chains with a rare plugin, with nftables, or with IPv6. Some kernels lack ipvlan
// or vrf.
func rareChains(t *testing.T, n *harness.Node) map[string][]harness.Plugin {
	t.Helper()
	onNFTables := bridge(n, "brn", "10.95.3.0/24")
	onNFTables["ipMasq"], onNFTables["ipMasqBackend"] = true, "nftables"
	on := func(kind, master, mode string, subnets ...string) []harness.Plugin {
		return []harness.Plugin{{"type": kind, "master": master, "mode": mode, "ipam": bridge(n, "", subnets...)["ipam"]}}
	}
	chains := map[string][]harness.Plugin{
		"macvlan":            on("macvlan", "wire0", "bridge", "10.95.1.0/24"),
		"macvlan-dual-stack": on("macvlan", "wire0", "bridge", "10.95.1.0/24", "fd00:95:1::/64"),
		"host-device":        {{"type": "host-device", "device": "wire1", "ipam": bridge(n, "", "10.95.2.0/24")["ipam"]}},
		"nftables":           {onNFTables, {"type": "portmap", "backend": "nftables", "capabilities": map[string]bool{"portMappings": true}}},
		"ipv6":               {bridge(n, "br6", "fd00:95::/64"), {"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}},
		"dual-stack":         {bridge(n, "br46", "10.95.4.0/24", "fd00:95:4::/64"), {"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}},
		"sbr":                {bridge(n, "brs", "10.95.6.0/24"), {"type": "sbr"}},
	}
	if knowsLink(t, n, "link", "wire2", "type", "ipvlan", "mode", "l2") {
		chains["ipvlan"] = on("ipvlan", "wire2", "l2", "10.95.5.0/24")
		chains["ipvlan-dual-stack"] = on("ipvlan", "wire2", "l2", "10.95.5.0/24", "fd00:95:5::/64")
	}
	if knowsLink(t, n, "type", "vrf", "table", "10") {
		chains["vrf"] = []harness.Plugin{bridge(n, "brv", "10.95.7.0/24"), {"type": "vrf", "vrfname": "blue"}}
	}
	return chains
}

// knowsLink reports whether the kernel can add a link.
func knowsLink(t *testing.T, n *harness.Node, link ...string) bool {
	t.Helper()
	if _, err := n.Command(t.Context(), "ip", append([]string{"link", "add", "probe"}, link...)...); err != nil {
		return false
	}
	_, err := n.Command(t.Context(), "ip", "link", "delete", "probe")
	require.NoError(t, err)
	return true
}

// addWires adds links to the node that plugins can use as network cards. The other ends are on the
// node, each with the addresses in one argument.
func addWires(t *testing.T, n *harness.Node, addresses ...string) (remove func()) {
	t.Helper()
	for i, all := range addresses {
		name := fmt.Sprintf("wire%d", i)
		for _, args := range [][]string{
			{"link", "add", name, "type", "veth", "peer", "name", name + "-host"},
			{"link", "set", name, "up"}, {"link", "set", name + "-host", "up"},
		} {
			_, err := n.Command(t.Context(), "ip", args...)
			require.NoError(t, err)
		}
		for _, address := range strings.Fields(all) {
			_, err := n.Command(t.Context(), "ip", "address", "add", address, "dev", name+"-host")
			require.NoError(t, err)
		}
	}
	return func() {
		t.Helper()
		for i := range addresses {
			_, err := n.Command(t.Context(), "ip", "link", "delete", fmt.Sprintf("wire%d", i))
			require.NoError(t, err)
		}
	}
}

// A pod whose network was damaged while containerd was down stays as it is, and is reported.
func TestCheckAfterRestart(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	t.Run("pods", func(t *testing.T) {
		sound := startPod(t, n, harness.PodfsmHandler, n.PodConfig("sound"))
		damaged := startPod(t, n, harness.PodfsmHandler, n.PodConfig("damaged"))
		startPod(t, n, harness.PodfsmHandler, n.PodConfig("host-net", harness.HostNetwork()))
		address := takeAddress(t, inspect(t, n, damaged.ID).GetSandbox().GetNetnsPath())
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		waitForChecks(t, n, 1)

		view := inspect(t, n, damaged.ID)
		require.Equal(t, "Ready", view.GetSandbox().GetState())
		require.Contains(t, view.GetSandbox().GetError(), `check of step attach_network of pod "default/damaged" failed: plugin type="bridge"`)
		require.Equal(t, "attach_network", view.GetSteps()[4].GetName())
		require.Equal(t, "done", view.GetSteps()[4].GetStatus())
		require.Contains(t, view.GetSteps()[4].GetError(), "failed (check)")
		require.Contains(t, view.GetSteps()[4].GetDetail()["plugins"], "/bridge=")
		require.Empty(t, inspect(t, n, sound.ID).GetSandbox().GetError())
		now, err := damaged.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, now.GetState())
		require.Contains(t, n.Log(), "CNI CHECK failed, sandbox left running")
		giveAddress(t, inspect(t, n, damaged.ID).GetSandbox().GetNetnsPath(), address)
	})
	n.RequireClean(t, before)

	t.Run("one that hangs gives way", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Fault("bridge.CHECK", "block"))
		require.NoError(t, n.Start(t.Context()))
		require.NoError(t, n.Faults.WaitReached(t.Context(), "bridge.CHECK", 1))
		begun := time.Now()
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.Less(t, time.Since(begun), 10*time.Second, "a check has 30")
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})
}

// takeAddress removes the address from eth0 of a pod.
func takeAddress(t *testing.T, netns string) *netlink.Addr {
	t.Helper()
	var address netlink.Addr
	require.NoError(t, ns.WithNetNSPath(netns, func(ns.NetNS) error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		all, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		address = all[0]
		return netlink.AddrDel(link, &address)
	}))
	return &address
}

func giveAddress(t *testing.T, netns string, address *netlink.Addr) {
	t.Helper()
	require.NoError(t, ns.WithNetNSPath(netns, func(ns.NetNS) error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, address)
	}))
}

// While the plugins of a handler's own networks are not ready, its pods are refused before anything
// is made. For the networks of the node, the kubelet does not send pods because of containerd's
// condition.
func TestStatusOfNetworks(t *testing.T) {
	t.Parallel()
	confDir := t.TempDir()
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  cni_conf_dir = %q
`, twoHandler, confDir)})
	// The first pod of this handler asks, and the answer counts for a while.
	writeNetworkOf(t, "1.1.0", confDir, networkName(n)+"-own", n.DefaultChain()[0])
	before := warmUp(t, n, twoHandler, n.PodConfig("pod"))
	require.NoError(t, n.Restart(t.Context()))

	require.NoError(t, n.Fault("bridge.STATUS", "error(the agent is starting)"))
	for range 3 {
		err := failRun(t, n, twoHandler, n.PodConfig("pod"))
		require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
		require.ErrorContains(t, err, `accepts no pods now: plugin type="bridge"`)
		require.ErrorContains(t, err, "the agent is starting")
		n.RequireClean(t, before)
	}
	hits, err := n.Faults.Hits("bridge.STATUS")
	require.NoError(t, err)
	require.Less(t, hits, 3, "an answer counts for a while")

	require.NoError(t, n.Heal())
	require.Eventually(t, func() bool {
		pod, err := n.RunPod(t.Context(), twoHandler, n.PodConfig("pod"))
		return err == nil && pod.StopAndRemove(t.Context()) == nil
	}, waitFor, tick)
	n.RequireClean(t, before)

	t.Run("the node's own", func(t *testing.T) {
		require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", n.DefaultChain()...))
		require.True(t, networkReady(t, n))
		require.NoError(t, n.Fault("bridge.STATUS", "error(the agent is starting)"))
		require.False(t, networkReady(t, n))
		require.NoError(t, n.Heal())
		require.True(t, networkReady(t, n))
	})
}

func networkReady(t *testing.T, n *harness.Node) bool {
	t.Helper()
	resp, err := n.Runtime.Status(t.Context(), &runtime.StatusRequest{})
	require.NoError(t, err)
	for _, condition := range resp.GetStatus().GetConditions() {
		if condition.GetType() == runtime.NetworkReady {
			return condition.GetStatus()
		}
	}
	t.Fatal("there is no such condition")
	return false
}

func writeNetworkOf(t *testing.T, version, dir, name string, plugins ...harness.Plugin) {
	t.Helper()
	list, err := json.Marshal(map[string]any{"cniVersion": version, "name": name, "plugins": plugins})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, name+".conflist"), list, 0o644))
}

// TestHangingPlugin runs an ADD that hangs, with children that hold its pipes. One of them has its
// own session.
func TestHangingPlugin(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  cni_add_timeout = "5s"
`})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	dir := t.TempDir()
	installPlugin(t, n, "hanger", fmt.Sprintf(`#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
echo $$ >> %[1]s/pids
sh -c 'echo $$ >> %[1]s/pids; sleep 600' &
setsid sh -c 'echo $$ >> %[1]s/pids; sleep 600' &
sleep 600
`, dir))
	require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "hanger"})...))
	err = failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	require.ErrorContains(t, err, `plugin type="hanger"`)
	require.ErrorContains(t, err, "no answer within 5s")
	pids, err := os.ReadFile(filepath.Join(dir, "pids"))
	require.NoError(t, err)
	require.Len(t, strings.Fields(string(pids)), 3)
	for _, pid := range strings.Fields(string(pids)) {
		// Where nothing reaps orphans, a zombie stays.
		if stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat")); err == nil {
			require.Contains(t, string(stat), ") Z ", "process %s lives", pid)
		}
	}
	require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	n.RequireClean(t, before)
}

// containerd is killed during ADD. The plugin lives on and would take an address later, so the next
// daemon kills it first.
func TestPluginOutlivesDaemon(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, point := range []string{"bridge.ADD", "host-local.ADD", "host-local.ADD.after", "bridge.ADD.after"} {
		t.Run(point, func(t *testing.T) {
			interrupt(t, n, point)
			require.NoError(t, n.Start(t.Context()))
			waitForPlugins(t, n) // the plugin stays blocked
			require.NoError(t, n.Heal())
			n.RequireClean(t, before)
			require.Empty(t, reserved(t, n))
		})
	}
}

// The DEL of the plugin in the middle of a chain fails: the plugins before and behind it have freed
// their resources.
func TestMiddleOfChainFails(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	bridge, portmap := n.DefaultChain()[0], n.DefaultChain()[1]
	require.NoError(t, n.SetChain(t.Context(), bridge, harness.Plugin{"type": "tuning"}, portmap))
	config := n.PodConfig("pod", func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080}}
	})
	before := warmUp(t, n, harness.PodfsmHandler, config)
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
	require.NoError(t, err)
	require.NoError(t, n.Fault("tuning.DEL", "error(not today)"))
	require.ErrorContains(t, pod.Stop(t.Context()), "not today")
	require.Empty(t, reserved(t, n))
	census, err := n.Census(t.Context())
	require.NoError(t, err)
	require.Equal(t, before[harness.IPTables], census[harness.IPTables])
	require.Equal(t, before[harness.Links], census[harness.Links])
	pending := waitPending(t, n, pod.ID).GetPendingCleanups()
	require.NotEmpty(t, pending)
	require.Contains(t, pending[0].GetError(), `plugin type="tuning"`)
	require.NoError(t, n.Heal())
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// TestNetworkCycles runs and removes many pods: no file, link or rule stays.
func TestNetworkCycles(t *testing.T) {
	cycles := 24
	if full() {
		cycles = 1000
	}
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(),
		harness.Plugin{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
		harness.Plugin{"type": "tuning", "dataDir": filepath.Join(ipamDir(n), "tuning"), "mtu": 1400},
		harness.Plugin{"type": "firewall", "backend": "iptables"})...))
	config := func(i int64) *runtime.PodSandboxConfig {
		return n.PodConfig(fmt.Sprint("pod-", i), func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: int32(10000 + i)}}
			c.Annotations["kubernetes.io/ingress-bandwidth"] = "8M"
			c.Annotations["kubernetes.io/egress-bandwidth"] = "8M"
		})
	}
	before := warmUp(t, n, harness.PodfsmHandler, config(0))
	var done atomic.Int64
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for i := done.Add(1); i <= int64(cycles); i = done.Add(1) {
				if err := runAndRemove(t, n, config(i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	workers.Wait()
	require.Empty(t, limits(t, n))
	n.RequireClean(t, before)
}
