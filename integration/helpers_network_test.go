package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// bridge returns the configuration of a CNI plugin for a separate bridge with these subnets in this
// order.
func bridge(n *harness.Node, name string, subnets ...string) harness.Plugin {
	var ranges [][]map[string]string
	for _, subnet := range subnets {
		ranges = append(ranges, []map[string]string{{"subnet": subnet}})
	}
	return harness.Plugin{
		"type": "bridge", "bridge": name, "isGateway": true,
		"ipam": map[string]any{"type": "host-local", "dataDir": ipamDir(n), "ranges": ranges},
	}
}

func ipamDir(n *harness.Node) string { return filepath.Join(n.Dir(), "cni/ipam") }

func installPlugin(t *testing.T, n *harness.Node, name, script string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(n.Dir(), "cni/bin", name), []byte(script), 0o755))
}

// warmUp runs a pod so that the resources of a first pod exist, such as bridges and chains, and
// returns the census afterwards.
func warmUp(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) harness.Census {
	t.Helper()
	pod, err := n.RunPod(t.Context(), handler, config)
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	return before
}

// podIPs returns all addresses of a pod in CRI, the main one first.
func podIPs(t *testing.T, pod *harness.Pod) []string {
	t.Helper()
	status, err := pod.Status(t.Context())
	require.NoError(t, err)
	ips := []string{status.GetNetwork().GetIp()}
	for _, ip := range status.GetNetwork().GetAdditionalIps() {
		ips = append(ips, ip.GetIp())
	}
	return ips
}

// requirePage waits until a server answers on the node.
func requirePage(t *testing.T, n *harness.Node, address string) {
	t.Helper()
	var last error
	reached := func() bool {
		last = fetch(t.Context(), n, address)
		return last == nil
	}
	if !assert.Eventually(t, reached, waitFor, tick) {
		require.NoError(t, last)
	}
}

// reserved returns the addresses that host-local has given out.
func reserved(t *testing.T, n *harness.Node) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(ipamDir(n), "*/*"))
	require.NoError(t, err)
	var ips []string
	for _, file := range files {
		if net.ParseIP(filepath.Base(file)) != nil {
			ips = append(ips, filepath.Base(file))
		}
	}
	return ips
}

// pinOf returns where the network namespace of a pod is pinned.
func pinOf(n *harness.Node, pod *harness.Pod) string {
	return filepath.Join(n.Dir(), netNSDir, "podfsm-"+pod.ID)
}

// netNSDir is where a node's pods have their network namespaces.
const netNSDir = "state/io.containerd.grpc.v1.cri/netns"

// delegated is a chain of a plugin with a GC, which the reference plugins lack.
func delegated(n *harness.Node) harness.Plugin {
	return harness.Plugin{"type": "delegate", "delegate": n.DefaultChain()[0]}
}

// waitForChecks waits until this node has checked adopted pods a number of times.
func waitForChecks(t *testing.T, n *harness.Node, times int) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Count(n.Log(), "checked ") == times }, 3*waitFor, tick) // it is slow on purpose
}

// runAndRemove runs and removes a pod. Like the kubelet, it retries the removal, because a busy
// machine may exceed a deadline.
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

// networkName is the name of the node's own network.
func networkName(n *harness.Node) string { return filepath.Base(n.Dir()) }

// leak takes an address for an unknown container.
func leak(t *testing.T, n *harness.Node) string {
	t.Helper()
	const ip = "10.88.200.200"
	file := filepath.Join(ipamDir(n), networkName(n), ip)
	require.NoError(t, os.WriteFile(file, []byte(strings.Repeat("ab", 32)+"\r\neth0"), 0o600))
	return ip
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

// refuser is a CNI plugin that fails ADD.
const refuser = `#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.0.0", "code": 100, "msg": "refused"}'
exit 1
`

// agent is a CNI plugin that gives an address and, at DEL, does what the body says.
const agent = `#!/bin/sh
if [ "$CNI_COMMAND" = ADD ]; then
	echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "'$CNI_IFNAME'", "sandbox": "'$CNI_NETNS'"}], "ips": [{"address": "10.99.0.2/24", "interface": 0}]}'
	exit 0
fi
[ "$CNI_COMMAND" = DEL ] || exit 0
%s
`

// fetch tries for a moment only: a lost packet is sent again after a second or more.
func fetch(ctx context.Context, n *harness.Node, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		return err
	}
	resp, err := n.HTTP().Do(request)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err == nil && string(page) != harness.IndexPage {
		err = fmt.Errorf("%q", page)
	}
	return err
}

// twoHandler is a handler with its own CNI configuration.
const twoHandler = "podfsm-two"

// limits are the rates of the token bucket filters on the node, by type of link.
func limits(t *testing.T, n *harness.Node) map[string]uint64 {
	t.Helper()
	rates := map[string]uint64{}
	require.NoError(t, n.Inside(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, link := range links {
			qdiscs, err := netlink.QdiscList(link)
			if err != nil {
				return err
			}
			for _, qdisc := range qdiscs {
				if tbf, ok := qdisc.(*netlink.Tbf); ok {
					rates[link.Type()] = tbf.Rate
				}
			}
		}
		return nil
	}))
	return rates
}
