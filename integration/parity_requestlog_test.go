package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// makeRequests makes a request of each kind that a daemon logs during the life of a pod, both
// successful and failing ones. It returns the offset of their log.
func makeRequests(t *testing.T, n *harness.Node, handler string) (from int) {
	t.Helper()
	ctx := t.Context()
	from = len(n.Log())
	pod, err := n.RunPod(ctx, handler, n.PodConfig("pod", harness.HostUsers()))
	require.NoError(t, err)
	main, err := pod.StartContainer(ctx, "main")
	require.NoError(t, err)
	for _, call := range validRequests(ctx, n, pod, main) {
		require.NoError(t, call())
	}
	for _, call := range invalidRequests(ctx, n, handler) {
		require.Error(t, call())
	}
	return from
}

// validRequests are requests of each kind that succeed in this order.
func validRequests(ctx context.Context, n *harness.Node, pod *harness.Pod, main *harness.Container) []func() error {
	return []func() error{
		func() error {
			return call(ctx, n.Runtime.ExecSync, &runtime.ExecSyncRequest{ContainerId: main.ID, Cmd: []string{"true"}})
		},
		func() error {
			return call(ctx, n.Runtime.Exec, &runtime.ExecRequest{ContainerId: main.ID, Cmd: []string{"sh"}, Stdout: true})
		},
		func() error {
			return call(ctx, n.Runtime.Attach, &runtime.AttachRequest{ContainerId: main.ID, Stdout: true})
		},
		func() error {
			return call(ctx, n.Runtime.PortForward, &runtime.PortForwardRequest{PodSandboxId: pod.ID, Port: []int32{80, 443}})
		},
		func() error {
			return call(ctx, n.Runtime.ReopenContainerLog, &runtime.ReopenContainerLogRequest{ContainerId: main.ID})
		},
		func() error {
			return call(ctx, n.Runtime.UpdateContainerResources, &runtime.UpdateContainerResourcesRequest{
				ContainerId: main.ID, Linux: &runtime.LinuxContainerResources{CpuShares: 3},
			})
		},
		func() error {
			return call(ctx, n.Runtime.UpdatePodSandboxResources, &runtime.UpdatePodSandboxResourcesRequest{
				PodSandboxId: pod.ID, Resources: &runtime.LinuxContainerResources{CpuShares: 3},
			})
		},
		func() error { return call(ctx, n.Runtime.UpdateRuntimeConfig, &runtime.UpdateRuntimeConfigRequest{}) },
		func() error {
			return call(ctx, n.Runtime.StopContainer, &runtime.StopContainerRequest{ContainerId: main.ID})
		},
		func() error {
			return call(ctx, n.Runtime.RemoveContainer, &runtime.RemoveContainerRequest{ContainerId: main.ID})
		},
		func() error { return pod.Stop(ctx) },
		func() error { return pod.Stop(ctx) },
		func() error { return pod.Remove(ctx) },
		func() error { return pod.Remove(ctx) },
	}
}

// invalidRequests are requests that fail.
func invalidRequests(ctx context.Context, n *harness.Node, handler string) []func() error {
	unknownID := strings.Repeat("0", 64)
	badWidth := n.PodConfig("pod", harness.HostUsers(), func(c *runtime.PodSandboxConfig) {
		c.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "wide"}
	})
	return []func() error{
		func() error {
			_, err := n.RunPod(ctx, handler, badWidth)
			return err
		},
		func() error {
			return call(ctx, n.Runtime.PodSandboxStatus, &runtime.PodSandboxStatusRequest{PodSandboxId: unknownID})
		},
		func() error {
			return call(ctx, n.Runtime.ContainerStatus, &runtime.ContainerStatusRequest{ContainerId: unknownID})
		},
		func() error {
			return call(ctx, n.Runtime.StartContainer, &runtime.StartContainerRequest{ContainerId: unknownID})
		},
		func() error {
			return call(ctx, n.Runtime.PortForward, &runtime.PortForwardRequest{PodSandboxId: unknownID})
		},
		func() error {
			return call(ctx, n.Runtime.CreateContainer, &runtime.CreateContainerRequest{
				PodSandboxId: unknownID, Config: &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "main"}},
			})
		},
		func() error {
			return call(ctx, n.Images.PullImage, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "127.0.0.1:1/none:1"}})
		},
	}
}

// call calls a method of the CRI and returns its error.
func call[Req, Resp any](ctx context.Context, method func(context.Context, Req, ...grpc.CallOption) (Resp, error), r Req) error {
	_, err := method(ctx, r)
	return err
}

// differing are the texts that differ from pod to pod, with placeholders.
var differing = []struct {
	pattern *regexp.Regexp
	name    string
}{
	{regexp.MustCompile(`[0-9a-f]{64}`), "ID"},
	{regexp.MustCompile(`http://127\.0\.0\.1:\d+/[a-z]+/[\w-]+`), "URL"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`), "TIME"},
	{regexp.MustCompile(`seconds:\d+ +nanos:\d+`), "TIME"},
	{regexp.MustCompile(`\bpid([:=])\d+`), "pid${1}PID"},
	{regexp.MustCompile(` +`), " "}, // protobuf's texts have one or two, by chance
}

// told returns the lines of a log from an offset on, without what differs.
func told(n *harness.Node, from int, wanted func(line) bool) (texts []string) {
	for text := range strings.Lines(n.Log()[from:]) {
		var l line
		if json.Unmarshal([]byte(text), &l) != nil || !wanted(l) {
			continue // a shim's own lines are text
		}
		delete(l, "time")
		var fields []string
		for _, name := range slices.Sorted(maps.Keys(l)) {
			fields = append(fields, fmt.Sprintf("%s=%v", name, l[name]))
		}
		text := strings.ReplaceAll(strings.Join(fields, " "), n.Dir(), "NODE")
		for _, own := range differing {
			text = own.pattern.ReplaceAllString(text, own.name)
		}
		texts = append(texts, text)
	}
	return texts
}

// isRequest reports whether a line is about a request: it begins with the name of the method.
func isRequest(l line) bool {
	message := l["msg"].(string)
	methods := []string{"Portforward", "TearDown network"}
	for _, desc := range []grpc.ServiceDesc{runtime.RuntimeService_ServiceDesc, runtime.ImageService_ServiceDesc} {
		for _, method := range desc.Methods {
			methods = append(methods, method.MethodName)
		}
	}
	return slices.ContainsFunc(methods, func(method string) bool { return strings.HasPrefix(message, method) })
}

// runError matches the error of a pod that doesn't run. It has podfsm's step, which containerd
// lacks.
var runError = regexp.MustCompile(`^error=.* level=error msg=RunPodSandbox`)

// withoutRunErrors are lines without it.
func withoutRunErrors(texts []string) (rest []string) {
	for _, text := range texts {
		rest = append(rest, runError.ReplaceAllString(text, "error=ERROR level=error msg=RunPodSandbox"))
	}
	return rest
}

// networkCounts are how many networks of pods containerd's own metrics have counted.
func networkCounts(t *testing.T, n *harness.Node) (created, deleted int) {
	t.Helper()
	resp, err := n.HTTP().Get("http://" + harness.MetricsAddress + "/v1/metrics")
	require.NoError(t, err)
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	require.NoError(t, err)
	count := func(name string) int {
		require.Len(t, families[name].GetMetric(), 1, name)
		return int(families[name].GetMetric()[0].GetHistogram().GetSampleCount())
	}
	return count("containerd_cri_sandbox_create_network_seconds"), count("containerd_cri_sandbox_delete_network_seconds")
}

// Operators' alerts read the log. A pod of another handler has the lines that it has with an unmodified containerd, all of them, and a
// podfsm pod has those of the requests. Their dashboards count networks, too.
func TestLogLikeStock(t *testing.T) {
	const jsonLog = "[debug]\nformat = \"json\"\n"
	stock := harness.StartNode(t, harness.Config{Daemon: harness.Stock, TOML: jsonLog})
	n := harness.StartNode(t, harness.Config{TOML: jsonLog})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	unmodified := makeRequests(t, stock, harness.StockHandler)
	beside := makeRequests(t, n, harness.StockHandler)
	require.EventuallyWithT(t, func(c *assert.CollectT) { // lines on shims come when they like
		isLoud := func(l line) bool {
			chance := strings.HasPrefix(l["msg"].(string), "collecting metrics for") // of a shim that ends just then
			return !chance && len(loud([]line{l})) > 0
		}
		want, got := told(stock, unmodified, isLoud), told(n, beside, isLoud)
		slices.Sort(want)
		slices.Sort(got)
		assert.Equal(c, want, got)
	}, waitFor, 100*time.Millisecond)
	created, deleted := networkCounts(t, n)
	ours := makeRequests(t, n, harness.PodfsmHandler)
	nowCreated, nowDeleted := networkCounts(t, n)
	require.Equal(t, 1, nowCreated-created, "containerd's metric counts the pod")
	require.Equal(t, 1, nowDeleted-deleted, "likewise")
	want := withoutRunErrors(told(stock, unmodified, isRequest))
	require.Greater(t, len(want), 40)
	require.Equal(t, want, withoutRunErrors(told(n, ours, isRequest)))
	n.RequireClean(t, before)
}
