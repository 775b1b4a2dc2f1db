package integration

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// shortUnclaimed shortens the time for which podfsm waits for a claim. On a busy machine, a test
// still has time to look at a finished sandbox.
const shortUnclaimed = `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  unclaimed_timeout = "5s"
`

// A finished sandbox that no caller has claimed is removed. A sandbox that any call has shown
// stays, because the kubelet uses what it sees.
func TestUnclaimed(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{TOML: shortUnclaimed})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	seeStatus := func(t *testing.T, id string) {
		status, err := n.Runtime.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: id[:20]})
		require.NoError(t, err)
		require.Equal(t, id, status.GetStatus().GetId())
	}
	seen := []struct {
		name string
		look func(t *testing.T, id string)
	}{
		{"a list", func(t *testing.T, id string) {
			list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
			require.NoError(t, err)
			require.Len(t, list.GetItems(), 1)
			require.Equal(t, id, list.GetItems()[0].GetId())
		}},
		{"a streamed list", func(t *testing.T, id string) {
			stream, err := n.Runtime.StreamPodSandboxes(t.Context(), &runtime.StreamPodSandboxesRequest{})
			require.NoError(t, err)
			list, err := stream.Recv()
			require.NoError(t, err)
			require.Len(t, list.GetPodSandboxes(), 1)
			require.Equal(t, id, list.GetPodSandboxes()[0].GetId())
		}},
		{"a status", seeStatus},
	}
	for _, by := range seen {
		t.Run(by.name+" keeps it", func(t *testing.T) {
			shown := n.PodConfig("shown")
			id := leaveFinished(t, n, shown)
			by.look(t, id)
			requireVanishes(t, n, n.PodConfig("unseen")) // which was finished later
			sandbox, ok := find(t, n, shown)
			require.True(t, ok)
			require.Equal(t, "Ready", sandbox.GetState())
			pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, shown)
			require.NoError(t, err, "who didn't get it may still")
			require.Equal(t, id, pod.ID)
			requireOnly(t, n, pod)
			require.NoError(t, pod.StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}

	t.Run("an event keeps it", func(t *testing.T) {
		events, err := n.Events(t.Context())
		require.NoError(t, err)
		shown := n.PodConfig("shown")
		id := leaveFinished(t, n, shown)
		_, err = events.WaitFor(t.Context(), func(all []*runtime.ContainerEventResponse) bool {
			return len(harness.OfType(all, id, runtime.ContainerEventType_CONTAINER_STARTED_EVENT)) > 0
		})
		require.NoError(t, err)
		events.Close()
		requireVanishes(t, n, n.PodConfig("unseen"))
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, shown)
		require.NoError(t, err)
		require.Equal(t, id, pod.ID)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("after a restart", func(t *testing.T) {
		shown, unseen, wanted := n.PodConfig("shown"), n.PodConfig("unseen"), n.PodConfig("wanted")
		id := leaveFinished(t, n, shown)
		seeStatus(t, id)
		leaveFinished(t, n, unseen)
		taken := leaveFinished(t, n, wanted)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))

		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, wanted)
		require.NoError(t, err)
		require.Equal(t, taken, pod.ID, "the retry has it")
		require.NoError(t, pod.StopAndRemove(t.Context()))
		requireGoes(t, n, unseen)
		sandbox, ok := find(t, n, shown)
		require.True(t, ok)
		require.Equal(t, "Ready", sandbox.GetState())
		pod, err = n.RunPod(t.Context(), harness.PodfsmHandler, shown)
		require.NoError(t, err)
		require.Equal(t, id, pod.ID)
		_, err = n.RunPod(t.Context(), harness.PodfsmHandler, shown)
		require.Equal(t, codes.AlreadyExists, status.Code(err), "now it is taken: %v", err)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})
}

// requireVanishes leaves a finished pod and waits until it is gone.
func requireVanishes(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) {
	t.Helper()
	id := leaveFinished(t, n, config)
	requireGoes(t, n, config)
	require.Equal(t, "Removed", inspect(t, n, id).GetSandbox().GetState())
}

func requireGoes(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, ok := find(t, n, config)
		return !ok
	}, waitFor, tick)
}
