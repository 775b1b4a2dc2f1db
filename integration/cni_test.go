package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// delegated is a chain of a plugin that has a GC, which the reference plugins don't have.
func delegated(n *harness.Node) harness.Plugin {
	return harness.Plugin{"type": "delegate", "delegate": n.DefaultChain()[0]}
}

// TestChains runs pods on chains of the reference plugins in each version of CNI, and restarts containerd: CHECK finds nothing wrong
// with them.
func TestChains(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	removeWires := addWires(t, n, "10.95.1.1/24", "10.95.2.1/24", "10.95.5.1/24")
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
		if version != "0.3.1" { // which firewall doesn't know
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
		for name, chain := range chains {
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
	for name, pod := range pods {
		t.Run(name, func(t *testing.T) {
			view := inspect(t, n, pod.ID)
			require.Equal(t, "Ready", view.GetSandbox().GetState())
			require.Empty(t, view.GetSandbox().GetError())
			startContainer(t, pod, "server", harness.Run("httpd", "-f", "-p", "[::]:80", "-h", "/www"))
			requirePage(t, n, net.JoinHostPort(view.GetSandbox().GetIp(), "80"))
			require.NoError(t, pod.StopAndRemove(t.Context()))
		})
	}
	require.Empty(t, reserved(t, n))
	require.Empty(t, limits(t, n))
	removeWires()
	after, err := n.Census(t.Context())
	require.NoError(t, err)
	for _, category := range []string{harness.NetNSMounts, harness.Mounts, harness.Ledger, harness.Processes, harness.Shims, harness.CNICache} {
		require.Equal(t, before[category], after[category], category)
	}
	for _, link := range after[harness.Links] {
		require.NotContains(t, link, "veth")
		require.NotContains(t, link, "ifb")
	}
	for _, rule := range after[harness.IPTables] {
		for _, pod := range pods {
			require.NotContains(t, rule, pod.ID)
		}
	}
}

// rareChains are those whose first plugin is none of the usual, or that use nftables, or IPv6. Not every kernel has ipvlan.
func rareChains(t *testing.T, n *harness.Node) map[string][]harness.Plugin {
	t.Helper()
	ipamOf := func(subnet string) any { return bridge(n, "", subnet)["ipam"] }
	onNFTables := bridge(n, "brn", "10.95.3.0/24")
	onNFTables["ipMasq"], onNFTables["ipMasqBackend"] = true, "nftables"
	chains := map[string][]harness.Plugin{
		"macvlan":     {{"type": "macvlan", "master": "wire0", "mode": "bridge", "ipam": ipamOf("10.95.1.0/24")}},
		"host-device": {{"type": "host-device", "device": "wire1", "ipam": ipamOf("10.95.2.0/24")}},
		"nftables":    {onNFTables, {"type": "portmap", "backend": "nftables", "capabilities": map[string]bool{"portMappings": true}}},
		"ipv6":        {bridge(n, "br6", "fd00:95::/64"), {"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}},
		"dual-stack":  {bridge(n, "br46", "10.95.4.0/24", "fd00:95:4::/64"), {"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}},
	}
	if _, err := n.Command(t.Context(), "ip", "link", "add", "probe", "link", "wire2", "type", "ipvlan", "mode", "l2"); err == nil {
		_, err := n.Command(t.Context(), "ip", "link", "delete", "probe")
		require.NoError(t, err)
		chains["ipvlan"] = []harness.Plugin{{"type": "ipvlan", "master": "wire2", "mode": "l2", "ipam": ipamOf("10.95.5.0/24")}}
	}
	return chains
}

// addWires gives the node links that plugins can take for network cards. At their other ends is the node itself, with these addresses.
func addWires(t *testing.T, n *harness.Node, addresses ...string) (remove func()) {
	t.Helper()
	for i, address := range addresses {
		name := fmt.Sprintf("wire%d", i)
		for _, args := range [][]string{
			{"link", "add", name, "type", "veth", "peer", "name", name + "-host"},
			{"link", "set", name, "up"}, {"link", "set", name + "-host", "up"},
			{"address", "add", address, "dev", name + "-host"},
		} {
			_, err := n.Command(t.Context(), "ip", args...)
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

// waitForChecks waits until a daemon has checked the pods that it has adopted, the times-th of this node that does.
func waitForChecks(t *testing.T, n *harness.Node, times int) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Count(n.Log(), "podfsm: checked ") == times }, 3*waitFor, tick) // it is slow on purpose
}

// A pod whose network was damaged while containerd was down goes on as it is, and is pointed out.
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
		require.Contains(t, n.Log(), "is ready, but not as it should be")
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

// takeAddress takes the address of a pod's eth0 away.
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

// While the plugins of a handler's own networks say that they aren't ready, its pods are refused before anything is made. For the
// node's networks containerd's own condition says so, and the kubelet sends none.
func TestStatusOfNetworks(t *testing.T) {
	confDir := t.TempDir()
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  cni_conf_dir = %q
`, twoHandler, confDir)})
	// A node's first pod of this handler asks, and the answer counts for a while.
	writeNetworkOf(t, "1.1.0", confDir, networkName(n)+"-own", n.DefaultChain()[0])
	before := warmUp(t, n, twoHandler, n.PodConfig("pod"))
	require.NoError(t, n.Restart(t.Context()))

	require.NoError(t, n.Fault("bridge.STATUS", "error(the agent is starting)"))
	for range 3 {
		err := failRun(t, n, twoHandler, n.PodConfig("pod"))
		require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
		require.ErrorContains(t, err, `takes no pods now: plugin type="bridge"`)
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

// TestGC leaves addresses that nobody has, and restarts containerd: they go, and nothing else does.
func TestGC(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", delegated(n)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	// What the first pods of containerd's own leave.
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

	t.Run("keeps what is somebody's", func(t *testing.T) {
		ours := startPod(t, n, harness.PodfsmHandler, n.PodConfig("ours"))
		stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
		server := startContainer(t, stock, "server", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
		ips := slices.Concat(podIPs(t, ours), podIPs(t, stock))
		stray := leak(t, n)
		require.Contains(t, restart(t), "a CNI network was collected")
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
			// The plugin lives on: nothing is collected beside it.
			at := len(n.Log())
			require.NoError(t, n.Start(t.Context()))
			if handler == harness.StockHandler {
				require.Len(t, reserved(t, n), 2)
				require.Contains(t, n.Log()[at:], "is a CNI plugin that another daemon, or the one before this, has started")
				require.NoError(t, n.Kill(t.Context()))
				require.NoError(t, n.Faults.Release("delegate.ADD.after"))
				waitForPlugins(t, n)
				at = len(n.Log())
				require.NoError(t, n.Start(t.Context()))
				require.Contains(t, n.Log()[at:], "a CNI network was collected")
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
		require.Contains(t, n.Log()[at:], "the collection took more than 5s")
		waitForPlugins(t, n)
		require.Len(t, reserved(t, n), 1)
		require.NoError(t, n.Heal())
		restart(t)
	})
	n.RequireClean(t, before)
}

// libcniCache is where containerd's own pods are noted by libcni.
const libcniCache = "/var/lib/cni/results"

// leak takes an address for a container that nobody knows.
func leak(t *testing.T, n *harness.Node) string {
	t.Helper()
	const ip = "10.88.200.200"
	file := filepath.Join(ipamDir(n), networkName(n), ip)
	require.NoError(t, os.WriteFile(file, []byte(strings.Repeat("ab", 32)+"\r\neth0"), 0o600))
	return ip
}

// killInAdd kills containerd when a pod has its address and its plugin has not answered yet.
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

// waitForPlugins waits until no CNI plugin of the node runs.
func waitForPlugins(t *testing.T, n *harness.Node) {
	t.Helper()
	path := "CNI_PATH=" + filepath.Join(n.Dir(), "cni/bin")
	require.Eventually(t, func() bool {
		environs, err := filepath.Glob("/proc/[0-9]*/environ")
		require.NoError(t, err)
		return !slices.ContainsFunc(environs, func(file string) bool {
			environ, _ := os.ReadFile(file)
			return slices.Contains(strings.Split(string(environ), "\x00"), path)
		})
	}, waitFor, tick)
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

// The ledger is lost, with all that it knew of a pod's network. The pod can be stopped and removed, and its address is free again: by a
// DEL with the configuration of the day, or where there is none, by the next GC.
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

// TestHangingPlugin has an ADD that hangs, with children that hold its pipes, one of them in a session of its own.
func TestHangingPlugin(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  cni_add_timeout = "1s"
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
	require.ErrorContains(t, err, "no answer within 1s")
	pids, err := os.ReadFile(filepath.Join(dir, "pids"))
	require.NoError(t, err)
	require.Len(t, strings.Fields(string(pids)), 3)
	for _, pid := range strings.Fields(string(pids)) {
		// Where nobody reaps orphans, a zombie stays.
		if stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat")); err == nil {
			require.Contains(t, string(stat), ") Z ", "process %s lives", pid)
		}
	}
	require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	n.RequireClean(t, before)
}

// containerd is killed in the middle of ADD, whose plugin lives on and would take an address later: the next daemon ends it first.
func TestPluginOutlivesDaemon(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, point := range []string{"bridge.ADD", "host-local.ADD", "host-local.ADD.after", "bridge.ADD.after"} {
		t.Run(point, func(t *testing.T) {
			interrupt(t, n, point)
			require.NoError(t, n.Start(t.Context()))
			waitForPlugins(t, n) // nobody lets it go on
			require.NoError(t, n.Heal())
			n.RequireClean(t, before)
			require.Empty(t, reserved(t, n))
		})
	}
}

// The plugin in the middle of a chain fails at DEL: those before and behind it have freed what was theirs.
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
	debts := inspect(t, n, pod.ID).GetSandbox().GetDebts()
	require.NotEmpty(t, debts)
	require.Contains(t, debts[0].GetError(), `plugin type="tuning"`)
	require.NoError(t, n.Heal())
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// TestNetworkCycles has many pods come and go: no file, link or rule stays.
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

// runAndRemove has a pod come and go. As the kubelet does, it tries again to be rid of it, because a busy machine may be slower than
// a deadline.
func runAndRemove(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) error {
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
	if err != nil {
		return err
	}
	for range 3 {
		if err = pod.StopAndRemove(t.Context()); err == nil {
			return nil
		}
		t.Log(err)
	}
	return err
}

// networkName is that of the node's own network.
func networkName(n *harness.Node) string { return filepath.Base(n.Dir()) }
