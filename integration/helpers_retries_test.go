package integration

import (
	"context"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// impatient is the deadline of a caller that leaves before its pod is ready.
const impatient = time.Second

// joined counts the callers that wait for a creation that is under way.
const joined = `podfsm_sandbox_creation_retries_total{outcome="joined"}`

// runFor runs a pod with a deadline, as the kubelet does.
func runFor(t *testing.T, n *harness.Node, handler string, patience time.Duration, config *runtime.PodSandboxConfig) (*harness.Pod, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return n.RunPod(ctx, handler, config)
}

// leaveBehind requests a pod whose creation blocks at a point, and leaves before it is ready.
func leaveBehind(ctx context.Context, t *testing.T, n *harness.Node, point string, config *runtime.PodSandboxConfig) {
	t.Helper()
	require.NoError(t, n.Fault(point, "1*block"))
	gone := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, err := n.RunPod(ctx, harness.PodfsmHandler, config)
		gone <- err
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
	if point == "bridge.ADD" { // the runtime runs in parallel, and ends
		require.Eventually(t, func() bool {
			sandbox, _ := find(t, n, config)
			return sandbox.GetState() == "NetNSCaptured"
		}, waitFor, tick)
	}
	cancel()
	require.Equal(t, codes.Canceled, status.Code(<-gone))
}

// leaveFinished leaves a finished pod that no caller has claimed, and returns its id. It makes no
// CRI call for that.
func leaveFinished(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) string {
	t.Helper()
	leaveBehind(t.Context(), t, n, "bridge.ADD", config)
	require.NoError(t, n.Faults.Release("bridge.ADD"))
	var id string
	require.Eventually(t, func() bool {
		sandbox, _ := find(t, n, config)
		id = sandbox.GetId()
		// podfsm reports the state a moment before containerd's service has the sandbox.
		return id != "" && regexp.MustCompile("sandbox waits to be claimed.*"+id).MatchString(n.Log())
	}, waitFor, tick)
	require.NoError(t, n.Heal())
	return id
}

// find asks podfsm's own API for the sandbox of a pod, which does not claim the sandbox.
func find(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) (*podfsmv1.Sandbox, bool) {
	t.Helper()
	list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	for _, sandbox := range list.GetSandboxes() {
		if sandbox.GetPodName() == config.GetMetadata().GetName() {
			return sandbox, true
		}
	}
	return nil, false
}

// requireOnly requires that exactly one sandbox exists, and that it works.
func requireOnly(t *testing.T, n *harness.Node, pod *harness.Pod) {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetItems(), 1)
	require.Equal(t, pod.ID, list.GetItems()[0].GetId())
	require.Len(t, reserved(t, n), 1, "one address")
	container := startContainer(t, pod, "main")
	require.Equal(t, pod.Config.GetHostname()+"\n", exec(t, container, "hostname"))
}
