package integration

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// parityOf runs the scenario by a handler.
func parityOf(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) facts {
	t.Helper()
	a := &answers{facts: facts{}, t: t}
	ctx := t.Context()
	a.own(n.Dir(), "NODE")
	a.own(n.Name(), "NODE")
	events, err := n.Events(ctx)
	require.NoError(t, err)
	pod, err := n.RunPod(ctx, handler, config)
	require.NoError(t, err)
	a.own(pod.ID, "POD")
	ip, err := pod.IP(ctx)
	require.NoError(t, err)
	a.own(ip, "IP")
	a.addPod("running", n, pod)

	main, err := pod.StartContainer(ctx, "main")
	require.NoError(t, err)
	a.own(main.ID, "MAIN")
	a.addEvents("running", events, pod, main.ID, runtime.ContainerEventType_CONTAINER_STARTED_EVENT)
	a.addProcesses(n, pod, main)
	containerStatus, err := n.Runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: main.ID, Verbose: true})
	a.note("container", containerStatus, err)
	a.update("updated", n, pod, 64)

	require.NoError(t, n.Stop(ctx))
	require.NoError(t, n.Start(ctx))
	a.addPod("restarted", n, pod)
	a.update("updated again", n, pod, 32)
	events, err = n.Events(ctx)
	require.NoError(t, err)

	a.note("stop", &runtime.StopPodSandboxResponse{}, pod.Stop(ctx))
	a.addPod("stopped", n, pod)
	a.note("stop again", &runtime.StopPodSandboxResponse{}, pod.Stop(ctx))
	_, err = pod.StartContainer(ctx, "late")
	a.note("late container", &runtime.CreateContainerResponse{}, err)
	_, err = n.Runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: pod.ID})
	a.note("late forward", &runtime.PortForwardResponse{}, err)
	a.note("remove", &runtime.RemovePodSandboxResponse{}, pod.Remove(ctx))
	a.note("remove again", &runtime.RemovePodSandboxResponse{}, pod.Remove(ctx))
	a.note("stop removed", &runtime.StopPodSandboxResponse{}, pod.Stop(ctx))
	a.addPod("removed", n, pod)
	a.addEvents("removed", events, pod, pod.ID, runtime.ContainerEventType_CONTAINER_DELETED_EVENT)
	return a.normal()
}

// deliberateAnswers are the intended differences between the answers about a stock pod and about a
// podfsm pod, as listed in docs/reference/parity.md. Any other difference fails.
var deliberateAnswers = map[string]*regexp.Regexp{
	"the loopback is set up without a plugin, so it is in no plugin's result": regexp.MustCompile(`\.(cniResult|CNIResult)\.Interfaces\.lo\.`),
	"the runtime makes the pod's user namespace, none is there before":        regexp.MustCompile(`\.runtimeSpec\.linux\.namespaces\[\d\]\.path$`),
	"pause has less than a container": regexp.MustCompile( // never more, see TestContainersLikeStock
		`\.runtimeSpec\.(mounts|process\.capabilities|linux\.(maskedPaths|readonlyPaths|seccomp|resources\.devices))[.[]|^pause (mount /|CapBnd)`),
	"a refusal has a code that says why": regexp.MustCompile(`^late forward error$`),
}

// A caller of the CRI can't distinguish a podfsm pod from a stock pod, except for
// deliberateAnswers.
func TestAnswersLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet))) // any network will do, and this one is fast
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	seen := map[string]bool{}
	for _, tc := range plainShapes {
		t.Run(tc.name, func(t *testing.T) {
			config := n.PodConfig("pod", tc.option)
			stock, ours := parityOf(t, n, harness.StockHandler, config), parityOf(t, n, harness.PodfsmHandler, config)
			require.Greater(t, len(stock), 200)
			for path, values := range stock.diff(ours) {
				why, ok := deliberately(path)
				seen[why] = true
				if !ok {
					t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
				}
			}
		})
	}
	for why := range deliberateAnswers {
		require.True(t, seen[why], "there is no such difference any more: %s", why)
	}
	n.RequireClean(t, before)
}

// Pods without a handler are podfsm's if its handler is the default one, and a caller sees no other
// difference from a stock node.
func TestDefaultHandlerLikeStock(t *testing.T) {
	told := map[string]facts{}
	for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
		n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = %q
`, handler)})
		require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
		before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
		require.NoError(t, err)
		told[handler] = parityOf(t, n, "", n.PodConfig("pod"))
		n.RequireClean(t, before)

		resp, err := n.Runtime.Status(t.Context(), &runtime.StatusRequest{})
		require.NoError(t, err)
		for _, of := range resp.GetRuntimeHandlers() {
			told[handler]["features of "+of.GetName()] = of.GetFeatures().String()
		}
		pod := startPod(t, n, "", n.PodConfig("whose"))
		_, err = n.Sandboxes().Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: pod.ID})
		require.Equal(t, handler == harness.PodfsmHandler, err == nil, "%v", err)
	}
	for path, values := range told[harness.StockHandler].diff(told[harness.PodfsmHandler]) {
		if _, ok := deliberately(path); !ok {
			t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
		}
	}
}

func deliberately(path string) (why string, ok bool) {
	for why, paths := range deliberateAnswers {
		if paths.MatchString(path) {
			return why, true
		}
	}
	return "", false
}

// Unread events are kept for the next subscriber. They have the state of the time when they were made.
func TestLateEventsLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	pods, ips := map[string]*harness.Pod{}, map[string]string{}
	for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
		pods[handler], err = n.RunPod(t.Context(), handler, n.PodConfig("pod", harness.HostUsers()))
		require.NoError(t, err)
		ips[handler], err = pods[handler].IP(t.Context())
		require.NoError(t, err)
		require.NoError(t, pods[handler].StopAndRemove(t.Context()))
	}
	events, err := n.Events(t.Context())
	require.NoError(t, err)
	defer events.Close()
	all, err := events.WaitFor(t.Context(), func(all []*runtime.ContainerEventResponse) bool {
		return len(harness.OfType(all, pods[harness.PodfsmHandler].ID, runtime.ContainerEventType_CONTAINER_DELETED_EVENT)) > 0
	})
	require.NoError(t, err)
	lateOf := func(handler string) facts {
		a := &answers{facts: facts{}, t: t}
		a.own(pods[handler].ID, "POD")
		for _, kind := range []runtime.ContainerEventType{runtime.ContainerEventType_CONTAINER_CREATED_EVENT, runtime.ContainerEventType_CONTAINER_STARTED_EVENT} {
			of := harness.OfType(all, pods[handler].ID, kind)
			require.Len(t, of, 1)
			require.Equal(t, ips[handler], of[0].GetPodSandboxStatus().GetNetwork().GetIp(), "%s by %s", kind, handler)
			of[0].PodSandboxStatus.Network = nil
			a.note(kind.String(), of[0], nil)
		}
		return a.normal()
	}
	require.Equal(t, lateOf(harness.StockHandler), lateOf(harness.PodfsmHandler))
	n.RequireClean(t, before)
}

// The kubelet asks for the features of the node, and runs a pod with a user namespace only if its
// handler has the feature.
func TestRuntimeStatus(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Traces: true})
	resp, err := n.Runtime.Status(t.Context(), &runtime.StatusRequest{Verbose: true})
	require.NoError(t, err)
	for _, condition := range resp.GetStatus().GetConditions() {
		if slices.Contains([]string{runtime.RuntimeReady, runtime.NetworkReady}, condition.GetType()) {
			require.True(t, condition.GetStatus(), "%s: %s", condition.GetType(), condition.GetMessage())
		}
	}
	features := map[string]*runtime.RuntimeHandlerFeatures{}
	for _, handler := range resp.GetRuntimeHandlers() {
		features[handler.GetName()] = handler.GetFeatures()
	}
	require.True(t, features[harness.PodfsmHandler].GetUserNamespaces())
	require.Equal(t, features[harness.StockHandler].String(), features[harness.PodfsmHandler].String())

	// podfsm's own info about a pod is beside that of containerd.
	pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	info, err := pod.Info(t.Context())
	require.NoError(t, err)
	var own struct {
		State       string
		TraceID     string
		Transitions []struct {
			At    time.Time
			Event string
			To    string
		}
		Steps map[string]struct{ Status string }
	}
	require.NoError(t, json.Unmarshal([]byte(info["podfsm"]), &own))
	require.Equal(t, "Ready", own.State)
	require.Regexp(t, "^[0-9a-f]{32}$", own.TraceID)
	require.Equal(t, "Ready", own.Transitions[len(own.Transitions)-1].To)
	require.Equal(t, "done", own.Steps["attach_network"].Status)
}
