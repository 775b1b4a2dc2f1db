package integration

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// endPods removes pods and waits until nothing is left of them.
func endPods(t *testing.T, n *harness.Node, k *kubelet.Kubelet, names ...string) {
	t.Helper()
	uids := map[string]bool{}
	for _, name := range names {
		uids[kubeletPods(t.Context(), t, k)[name].Metadata.UID] = true
		require.NoError(t, k.Remove(name))
	}
	requireEnd(t, n, uids)
}

// requireEnd waits until the sandboxes of some pods are gone. It removes stopped sandboxes at once,
// which the kubelet does once a minute.
func requireEnd(t *testing.T, n *harness.Node, uids map[string]bool) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
		require.NoError(c, err)
		for _, sandbox := range list.GetItems() {
			if !uids[sandbox.GetMetadata().GetUid()] {
				continue
			}
			if sandbox.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY {
				_, err := n.Runtime.RemovePodSandbox(t.Context(), &runtime.RemovePodSandboxRequest{PodSandboxId: sandbox.GetId()})
				require.NoError(c, err)
				continue
			}
			assert.Fail(c, "pod runs on", sandbox.GetMetadata().GetName())
		}
	}, kubeletWait, kubeletTick)
}

var (
	// kubeletWait bounds what the kubelet does, except for removals.
	kubeletWait = harness.Patience(60 * time.Second)
	// roundsWait bounds the removal of a pod: the kubelet removes sandboxes once a minute.
	roundsWait  = harness.Patience(2 * time.Minute)
	kubeletTick = 200 * time.Millisecond
)

// podfsmForAll makes podfsm the default handler: static pods can not name a RuntimeClass without an
// API server.
const podfsmForAll = `
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = "podfsm"
`

// timesAsked returns how many requests to run a pod with this prefix of its name are in
// containerd's log.
func timesAsked(n *harness.Node, prefix string) (count int) {
	for line := range strings.Lines(n.Log()) {
		_, about, ok := strings.Cut(line, `msg="RunPodSandbox for name:\"`+prefix)
		if ok && !strings.Contains(about, "failed, error") && !strings.Contains(about, "returns sandbox id") {
			count++
		}
	}
	return count
}

// requireSyncs waits until the kubelet has synced each of these pods again.
func requireSyncs(t *testing.T, k *kubelet.Kubelet, names ...string) {
	t.Helper()
	synced := map[string]int{}
	for _, name := range names {
		synced[name] = k.Syncs(name)
	}
	for _, name := range names {
		// The first sync may have begun before the call, and the second may have used an earlier
		// view.
		require.Eventually(t, func() bool { return k.Syncs(name) >= synced[name]+3 }, kubeletWait, kubeletTick, "syncs of %q", name)
	}
}

// startKubelet starts a kubelet that ends with the test. When the test has failed, the end of its log is shown.
func startKubelet(t *testing.T, n *harness.Node, settings map[string]any) *kubelet.Kubelet {
	t.Helper()
	k, err := kubelet.New(t.Context(), n, kubelet.Config{Settings: settings})
	require.NoError(t, err)
	t.Cleanup(func() {
		log := k.Log()
		err := k.Close(context.WithoutCancel(t.Context()))
		if t.Failed() { // pods may run on, and then it cannot clean up
			t.Logf("closing the kubelet: %v", err)
			n.KeepLog(t, "kubelet", log)
		} else if err != nil {
			t.Errorf("failed to close the kubelet: %v", err)
		}
	})
	return k
}

func kubeletPods(ctx context.Context, t require.TestingT, k *kubelet.Kubelet) map[string]*kubelet.Pod {
	pods, err := k.Pods(ctx)
	require.NoError(t, err)
	return pods
}

// requireReady waits until the kubelet has exactly these pods, all ready.
func requireReady(t *testing.T, k *kubelet.Kubelet, names ...string) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		pods := kubeletPods(t.Context(), c, k)
		require.ElementsMatch(c, names, slices.Collect(maps.Keys(pods)))
		for name, pod := range pods {
			require.True(c, pod.Ready(), name)
		}
	}, kubeletWait, kubeletTick)
}

// podView is what must not change for a pod whose containers continue to run.
type podView struct {
	ID         string
	IP         string
	CreatedAt  int64
	Containers map[string]containerView
}

type containerView struct {
	ID                               string
	State                            runtime.ContainerState
	CreatedAt, StartedAt, FinishedAt int64
	Restarts                         int
}

// look returns all pods by name, as CRI and the kubelet see them, and requires that both agree.
func look(t *testing.T, n *harness.Node, k *kubelet.Kubelet) map[string]podView {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	views := map[string]podView{}
	for name, pod := range kubeletPods(t.Context(), t, k) {
		views[name] = lookAt(t, n, pod)
	}
	require.Len(t, list.GetItems(), len(views), "one sandbox a pod")
	return views
}

// lookAt returns a pod as CRI and the kubelet see it. It requires that both agree, and that the pod
// has one sandbox, of its first attempt.
func lookAt(t *testing.T, n *harness.Node, pod *kubelet.Pod) podView {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{
		Filter: &runtime.PodSandboxFilter{LabelSelector: map[string]string{"io.kubernetes.pod.uid": pod.Metadata.UID}},
	})
	require.NoError(t, err)
	require.Len(t, list.GetItems(), 1, "sandboxes of pod %q", pod.Name())
	resp, err := n.Runtime.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: list.GetItems()[0].GetId()})
	require.NoError(t, err)
	status := resp.GetStatus()
	require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
	require.Zero(t, status.GetMetadata().GetAttempt())
	require.Equal(t, status.GetNetwork().GetIp(), pod.Status.PodIP)
	view := podView{ID: status.GetId(), IP: pod.Status.PodIP, CreatedAt: status.GetCreatedAt(), Containers: map[string]containerView{}}
	for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		view.Containers[c.Name] = lookAtContainer(t, n, c)
	}
	for _, c := range pod.Status.ContainerStatuses {
		require.Equal(t, runtime.ContainerState_CONTAINER_RUNNING, view.Containers[c.Name].State)
	}
	return view
}

func lookAtContainer(t *testing.T, n *harness.Node, c kubelet.ContainerStatus) containerView {
	t.Helper()
	id := strings.TrimPrefix(c.ContainerID, "containerd://")
	resp, err := n.Runtime.ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: id})
	require.NoError(t, err)
	status := resp.GetStatus()
	require.Equal(t, uint32(c.RestartCount), status.GetMetadata().GetAttempt())
	return containerView{
		ID: id, State: status.GetState(),
		CreatedAt: status.GetCreatedAt(), StartedAt: status.GetStartedAt(), FinishedAt: status.GetFinishedAt(),
		Restarts: c.RestartCount,
	}
}

// requireGone fails while anything is left of any pod.
func requireGone(ctx context.Context, t require.TestingT, n *harness.Node, k *kubelet.Kubelet) {
	require.Empty(t, kubeletPods(ctx, t, k))
	sandboxes, err := n.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Empty(t, sandboxes.GetItems())
	containers, err := n.Runtime.ListContainers(ctx, &runtime.ListContainersRequest{})
	require.NoError(t, err)
	require.Empty(t, containers.GetContainers())
	left, err := k.Leftovers()
	require.NoError(t, err)
	require.Empty(t, left)
}

func containerPid(t *testing.T, n *harness.Node, id string) int {
	t.Helper()
	resp, err := n.Runtime.ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: id, Verbose: true})
	require.NoError(t, err)
	var info struct{ Pid int }
	require.NoError(t, json.Unmarshal([]byte(resp.GetInfo()["info"]), &info))
	require.NotZero(t, info.Pid)
	return info.Pid
}
