package integration

import (
	"context"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// requireRestarts ends and starts the kubelet while pods run: they continue to run, the kubelet
// knows them, and it sees what has ended in the meantime.
func requireRestarts(t *testing.T, n *harness.Node, k *kubelet.Kubelet) {
	ctx := t.Context()
	for _, users := range kindsOfUsers {
		kubectlExec(t, n, k, "mounted-"+users.name, "root", "sh", "-c", "echo kept > /memory/kept")
	}
	pods, mounts := look(t, n, k), mountsOf(t, n)
	names := slices.Collect(maps.Keys(pods))
	requireSame := func() {
		t.Helper()
		requireReady(t, k, names...)
		requireSyncs(t, k, names...)
		require.Equal(t, pods, look(t, n, k), "no pod is recreated, no container restarted")
		require.Equal(t, mounts, mountsOf(t, n), "no volume is mounted again")
		for _, users := range kindsOfUsers {
			require.Equal(t, "kept\n", kubectlExec(t, n, k, "mounted-"+users.name, "root", "cat", "/memory/kept"))
			requireServed(t, n, k, users)
		}
	}

	require.NoError(t, k.Stop(ctx))
	require.NoError(t, k.Start(ctx))
	requireSame()

	require.NoError(t, k.Kill(ctx))
	require.NoError(t, n.Kill(ctx))
	require.NoError(t, n.Start(ctx))
	require.NoError(t, k.Start(ctx))
	requireSame()

	// The kubelet ends while pods are created. It asks again, and gets the creations under way.
	require.NoError(t, n.Fault("bridge.ADD", "block"))
	late := runPods(t, n, k, "late")
	soon, cancel := context.WithTimeout(ctx, kubeletWait)
	defer cancel()
	require.NoError(t, n.Faults.WaitReached(soon, "bridge.ADD", len(late)))
	require.NoError(t, k.Kill(ctx))
	require.NoError(t, k.Start(ctx))
	for _, name := range late {
		require.Eventually(t, func() bool {
			return timesAsked(n, name+"-") > 1
		}, kubeletWait, kubeletTick)
	}
	require.NoError(t, n.Faults.Release("bridge.ADD"))
	requireReady(t, k, append(late, names...)...)
	hits, err := n.Faults.Hits("bridge.ADD")
	require.NoError(t, err)
	require.Equal(t, len(late), hits)
	for name, pod := range look(t, n, k) { // of attempt 0, and each has one sandbox
		if !slices.Contains(late, name) {
			require.Equal(t, pods[name], pod)
		}
	}
	require.NoError(t, n.Heal())

	t.Run("what has ended meanwhile", func(t *testing.T) { requireEndsSeen(t, n, k) })
}

// requireEndsSeen lets pods, containers and sandboxes end while the kubelet is down.
func requireEndsSeen(t *testing.T, n *harness.Node, k *kubelet.Kubelet) {
	before, pods := look(t, n, k), kubeletPods(t.Context(), t, k)
	require.NoError(t, k.Kill(t.Context()))
	removed := map[string]bool{}
	for _, users := range kindsOfUsers {
		require.NoError(t, k.Remove("served-"+users.name))
		removed[pods["served-"+users.name].Metadata.UID] = true
		delete(pods, "served-"+users.name)
		require.NoError(t, unix.Kill(containerPid(t, n, before["prepared-"+users.name].Containers["app"].ID), unix.SIGKILL))
		pause, err := n.FindPod(before["mounted-"+users.name].ID, nil).Pid(t.Context())
		require.NoError(t, err)
		require.NoError(t, unix.Kill(pause, unix.SIGKILL))
	}
	require.NoError(t, k.Start(t.Context()))
	requireEnd(t, n, removed)
	names := slices.Collect(maps.Keys(pods))
	requireSyncs(t, k, names...)
	requireReady(t, k, names...)

	for _, users := range kindsOfUsers {
		_, err := n.Dial(t.Context(), "tcp", users.hostAddress())
		require.ErrorIs(t, err, unix.ECONNREFUSED, "the port is the node's again")

		name := "prepared-" + users.name
		was, is := before[name], lookAt(t, n, kubeletPods(t.Context(), t, k)[name])
		require.Equal(t, was.Containers["app"].Restarts+1, is.Containers["app"].Restarts)
		is.Containers["app"] = was.Containers["app"]
		require.Equal(t, was, is, "only the container that had ended was restarted")

		name = "mounted-" + users.name
		list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": pods[name].Metadata.UID},
			State:         &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY},
		}})
		require.NoError(t, err)
		require.Len(t, list.GetItems(), 1)
		require.Equal(t, uint32(1), list.GetItems()[0].GetMetadata().GetAttempt(), "the one whose pause has ended is made again")
		for _, container := range kubeletPods(t.Context(), t, k)[name].Status.ContainerStatuses {
			require.Equal(t, 1, container.RestartCount, "%q in the pod's next sandbox", container.Name)
		}
		require.Equal(t, "kept\n", kubectlExec(t, n, k, name, "root", "cat", "/memory/kept"))
	}
}

// mountsOf returns the mounts of pods on the node.
func mountsOf(t *testing.T, n *harness.Node) []string {
	t.Helper()
	census, err := n.Census(t.Context())
	require.NoError(t, err)
	return append(census[harness.Mounts], census[harness.NetNSMounts]...)
}
