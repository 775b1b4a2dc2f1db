package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// formOf returns the names of the fields of an answer, and its texts with placeholders for those of
// the pod, without numbers.
func formOf(t *testing.T, m proto.Message, own ...string) []string {
	t.Helper()
	text, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	require.NoError(t, err)
	for i, word := range own {
		text = []byte(strings.ReplaceAll(string(text), word, "OWN"+strconv.Itoa(i)))
	}
	var value any
	require.NoError(t, json.Unmarshal(text, &value))
	var form []string
	var walk func(path string, value any)
	walk = func(path string, value any) {
		switch v := value.(type) {
		case map[string]any:
			for key, below := range v {
				walk(path+"."+key, below)
			}
		case []any:
			for i, below := range v {
				walk(path+"["+strconv.Itoa(i)+"]", below)
			}
		case string:
			if _, err := strconv.ParseUint(v, 10, 64); err == nil {
				v = "a number" // protojson's form of 64 bits
			}
			form = append(form, path+" = "+v)
		case nil:
			form = append(form, path+" is not there")
		default:
			form = append(form, path)
		}
	}
	walk("", value)
	slices.Sort(form)
	return form
}

// podMetrics returns all answers about the metrics of a pod.
func podMetrics(t *testing.T, n *harness.Node, pod *harness.Pod) map[string]*runtime.PodSandboxMetrics {
	t.Helper()
	find := func(all []*runtime.PodSandboxMetrics) *runtime.PodSandboxMetrics {
		i := slices.IndexFunc(all, func(m *runtime.PodSandboxMetrics) bool { return m.GetPodSandboxId() == pod.ID })
		require.GreaterOrEqual(t, i, 0)
		return all[i]
	}
	list, err := n.Runtime.ListPodSandboxMetrics(t.Context(), &runtime.ListPodSandboxMetricsRequest{})
	require.NoError(t, err)
	stream, err := n.Runtime.StreamPodSandboxMetrics(t.Context(), &runtime.StreamPodSandboxMetricsRequest{})
	require.NoError(t, err)
	var streamed []*runtime.PodSandboxMetrics
	for {
		sent, err := stream.Recv()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		streamed = append(streamed, sent.GetPodSandboxMetrics()...)
	}
	return map[string]*runtime.PodSandboxMetrics{"list": find(list.GetPodMetrics()), "stream": find(streamed)}
}

// The stats of a pod have the form of a stock pod's, and the network numbers are those that the pod
// itself sees.
func TestStatsLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("pods", func(t *testing.T) {
		run := func(handler, name string, options ...harness.PodOption) (*harness.Pod, *harness.Container) {
			pod := startPod(t, n, handler, n.PodConfig(name, options...))
			return pod, startContainer(t, pod, "main")
		}
		for _, tc := range []struct {
			name   string
			option harness.PodOption
		}{
			{"userns", func(*runtime.PodSandboxConfig) {}},
			{"hostnet", harness.HostNetwork()},
		} {
			ours, inOurs := run(harness.PodfsmHandler, tc.name+"-ours", tc.option)
			stock, inStock := run(harness.StockHandler, tc.name+"-stock", tc.option)
			ownOf := func(pod *harness.Pod, main *harness.Container) []string {
				return []string{pod.ID, main.ID, pod.Config.GetMetadata().GetName()}
			}
			require.EventuallyWithT(t, func(c *assert.CollectT) { // the usage of cores takes two samples, a second apart
				for _, pod := range []*harness.Pod{ours, stock} {
					stats := podStats(t, n, pod)["alone"].GetLinux()
					require.NotNil(c, stats.GetCpu().GetUsageNanoCores())
				}
			}, waitFor, tick)
			want := podStats(t, n, stock)
			for asked, got := range podStats(t, n, ours) {
				require.Equal(t, formOf(t, want[asked], ownOf(stock, inStock)...), formOf(t, got, ownOf(ours, inOurs)...), "%s: stats of %s", tc.name, asked)
			}
			wantMetrics := podMetrics(t, n, stock)
			for asked, got := range podMetrics(t, n, ours) {
				require.Equal(t, formOf(t, wantMetrics[asked], ownOf(stock, inStock)...), formOf(t, got, ownOf(ours, inOurs)...), "%s: metrics of %s", tc.name, asked)
			}
		}
	})
	t.Run("figures", func(t *testing.T) {
		pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("busy"))
		main := startContainer(t, pod, "main", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
		ip, err := pod.IP(t.Context())
		require.NoError(t, err)
		inside := func(counter string) uint64 {
			text := exec(t, main, "cat", "/sys/class/net/eth0/statistics/"+counter)
			count, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
			require.NoError(t, err)
			return count
		}
		check := func() {
			requirePage(t, n, ip)
			received, sent := inside("rx_bytes"), inside("tx_packets")
			require.NotZero(t, received)
			for asked, stats := range podStats(t, n, pod) {
				network := stats.GetLinux().GetNetwork()
				require.Equal(t, "eth0", network.GetDefaultInterface().GetName())
				require.Len(t, network.GetInterfaces(), 1)
				require.GreaterOrEqual(t, network.GetDefaultInterface().GetRxBytes().GetValue(), received, asked)
				require.LessOrEqual(t, network.GetDefaultInterface().GetRxBytes().GetValue(), inside("rx_bytes"), asked)
			}
			for asked, metrics := range podMetrics(t, n, pod) {
				at := slices.IndexFunc(metrics.GetMetrics(), func(m *runtime.Metric) bool {
					return m.GetName() == "container_network_transmit_packets_total"
				})
				require.GreaterOrEqual(t, at, 0)
				require.GreaterOrEqual(t, metrics.GetMetrics()[at].GetValue().GetValue(), sent, asked)
				require.LessOrEqual(t, metrics.GetMetrics()[at].GetValue().GetValue(), inside("tx_packets"), asked)
			}
		}
		check()
		require.NoError(t, n.Stop(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		check()
	})
	n.RequireClean(t, before)
}

// endCgroup removes the cgroups of a process in every hierarchy.
func endCgroup(t *testing.T, pid int) {
	t.Helper()
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	require.NoError(t, err)
	for line := range strings.Lines(strings.TrimSpace(string(own))) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		hierarchy := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(fields[1], "name="))
		if _, err := os.Stat("/sys/fs/cgroup/unified"); fields[1] == "" && err == nil {
			hierarchy = "/sys/fs/cgroup/unified"
		}
		require.NotEqual(t, "/", fields[2])
		require.NoError(t, os.WriteFile(filepath.Join(hierarchy, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
		require.Eventually(t, func() bool {
			err := unix.Rmdir(filepath.Join(hierarchy, fields[2]))
			return err == nil || errors.Is(err, unix.ENOENT)
		}, waitFor, tick, "%s", line)
	}
}

// Pods and containers without stats do not hide those of others: a pod without its own cgroup, of
// either handler, a container whose cgroup is gone, and an ended container.
func TestFiguresOfOthers(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{})
	noParent := func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = "" }
	whole := startPod(t, n, harness.PodfsmHandler, n.PodConfig("whole"))
	startContainer(t, whole, "main")
	startPod(t, n, harness.PodfsmHandler, n.PodConfig("no-parent", noParent))
	startPod(t, n, harness.StockHandler, n.PodConfig("no-parent-stock", noParent))
	lossy := startPod(t, n, harness.PodfsmHandler, n.PodConfig("lossy"))
	kept, lost := startContainer(t, lossy, "kept"), startContainer(t, lossy, "lost")
	ended := startContainer(t, lossy, "ended", harness.Run("true"))
	require.Zero(t, waitExit(t, ended))
	pid, err := lost.Pid(t.Context())
	require.NoError(t, err)
	endCgroup(t, pid)

	stats := map[string]bool{}
	list, err := n.Runtime.ListPodSandboxStats(t.Context(), &runtime.ListPodSandboxStatsRequest{})
	require.NoError(t, err)
	for _, one := range list.GetStats() {
		stats[one.GetAttributes().GetId()] = true
	}
	require.True(t, stats[whole.ID] && stats[lossy.ID], "%v", stats)
	stream, err := n.Runtime.StreamPodSandboxStats(t.Context(), &runtime.StreamPodSandboxStatsRequest{})
	require.NoError(t, err)
	sent, err := stream.Recv()
	require.NoError(t, err)
	require.Len(t, sent.GetPodSandboxStats(), len(stats))

	for asked, metrics := range podMetrics(t, n, lossy) {
		var containers []string
		for _, c := range metrics.GetContainerMetrics() {
			containers = append(containers, c.GetContainerId())
		}
		require.Contains(t, containers, kept.ID, asked)
	}
	for asked, metrics := range podMetrics(t, n, whole) {
		require.Len(t, metrics.GetContainerMetrics(), 1, asked)
	}
}
