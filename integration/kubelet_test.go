package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

const (
	// kubeletWait is how long the kubelet may take for anything but its rare rounds.
	kubeletWait = 60 * time.Second
	// roundsWait is how long it may take until all of a pod is gone: it removes sandboxes once a minute.
	roundsWait  = 2 * time.Minute
	kubeletTick = 200 * time.Millisecond
)

// podfsmForAll makes podfsm the handler of all pods that name none: static pods can't name a RuntimeClass without an API server.
const podfsmForAll = `
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = "podfsm"
`

// manifests are the static pods. The private one is ready only when its server finds what its writer has written, and each liveness probe leaves
// a line. The crashing one exits with an error in its first two runs.
var manifests = map[string]string{
	"private": `
apiVersion: v1
kind: Pod
metadata: {name: private, namespace: default}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: pages, emptyDir: {}}
  - {name: probes, emptyDir: {medium: Memory}}
  containers:
  - name: server
    image: ` + harness.BusyboxImage + `
    imagePullPolicy: Never
    command: [httpd, -f, -p, "8080", -h, /pages]
    volumeMounts: [{name: pages, mountPath: /pages, readOnly: true}, {name: probes, mountPath: /probes}]
    readinessProbe: {httpGet: {path: /page, port: 8080}, periodSeconds: 1}
  - name: writer
    image: ` + harness.BusyboxImage + `
    imagePullPolicy: Never
    command: [sh, -c, "echo from writer > /pages/page && exec tail -f /dev/null"]
    volumeMounts: [{name: pages, mountPath: /pages}, {name: probes, mountPath: /probes}]
    livenessProbe: {exec: {command: [sh, -c, "echo alive >> /probes/alive"]}, periodSeconds: 1, timeoutSeconds: 10}
`,
	"crashing": `
apiVersion: v1
kind: Pod
metadata: {name: crashing, namespace: default}
spec:
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  volumes: [{name: runs, emptyDir: {}}]
  containers:
  - name: main
    image: ` + harness.BusyboxImage + `
    imagePullPolicy: Never
    command: [sh, -c, "echo run >> /runs/runs; [ $(wc -l < /runs/runs) -gt 2 ] || exit 1; exec tail -f /dev/null"]
    volumeMounts: [{name: runs, mountPath: /runs}]
    readinessProbe: {exec: {command: [sh, -c, "[ $(wc -l < /runs/runs) -gt 2 ]"]}, periodSeconds: 1}
`,
	"host-network": `
apiVersion: v1
kind: Pod
metadata: {name: host-network, namespace: default}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    image: ` + harness.BusyboxImage + `
    imagePullPolicy: Never
    command: [httpd, -f, -p, "8081", -h, /www]
    readinessProbe: {httpGet: {path: /, port: 8081}, periodSeconds: 1}
`,
}

// The kubelet runs pods on podfsm as on any other runtime, and when containerd is killed and comes back, it has nothing to do. Nor does
// it notice that a pod which asks for no user namespace gets one.
func TestKubelet(t *testing.T) {
	t.Parallel() // kubelets mostly wait
	n, before := startNodeWithPool(t, harness.Config{Handlers: []string{autoHandler}, TOML: podfsmForAll + usersOf(harness.PodfsmHandler, `
		mode = "auto"
		unmappable = "host"`)})
	k := startKubelet(t, n, deployedSettings(t))

	for name, manifest := range manifests {
		require.NoError(t, k.Run(name, manifest))
	}
	names := slices.Collect(maps.Keys(manifests))
	requireReady(t, k, names...)
	pods := look(t, n, k)
	requireAsInManifests(t, n, k, pods)
	requireProbes(t, n, pods["private"].Containers["server"].ID)

	api := func() {
		requireForward(t, n, k, "private", 8080, "/page", "from writer\n")
		requireSummary(t, k, "private", 1, "server", "writer")
	}
	api()
	killAndStart(t, n, k)
	requireReady(t, k, names...)
	api()
	require.Equal(t, pods, look(t, n, k), "no pod is recreated, no container restarted")
	requireProbes(t, n, pods["private"].Containers["server"].ID)

	crashed := pods["crashing"].Containers["main"]
	require.NoError(t, unix.Kill(containerPid(t, n, crashed.ID), unix.SIGKILL))
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		pod := kubeletPods(t.Context(), c, k)["crashing"]
		require.NotNil(c, pod)
		require.Len(c, pod.Status.ContainerStatuses, 1)
		require.Equal(c, crashed.Restarts+1, pod.Status.ContainerStatuses[0].RestartCount)
		require.True(c, pod.Ready())
	}, kubeletWait, kubeletTick)
	now := look(t, n, k)["crashing"]
	now.Containers = pods["crashing"].Containers
	require.Equal(t, pods["crashing"], now, "the container of an adopted pod is restarted in it")

	for name := range manifests {
		require.NoError(t, k.Remove(name))
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) { requireGone(t.Context(), c, n, k) }, roundsWait, kubeletTick)
	require.NoError(t, k.Close(t.Context()))
	n.RequireClean(t, before)
}

// A kubelet whose calls time out before the network is there asks again, with the same attempt, and gets the one sandbox that was made. Pain 2.
func TestKubeletOnASlowNode(t *testing.T) {
	t.Parallel() // kubelets mostly wait
	n := harness.StartNode(t, harness.Config{TOML: podfsmForAll})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	k := startKubelet(t, n, map[string]any{"runtimeRequestTimeout": "2s"}) // RunPodSandbox gets twice of it
	require.NoError(t, n.Fault("bridge.ADD", "delay(11000)"))              // enough for three calls
	require.NoError(t, k.Run("private", manifests["private"]))
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		pod := kubeletPods(t.Context(), c, k)["private"]
		require.NotNil(c, pod)
		require.True(c, pod.Ready())
	}, kubeletWait, kubeletTick)

	look(t, n, k) // requires attempt 0, and one sandbox
	hits, err := n.Faults.Hits("bridge.ADD")
	require.NoError(t, err)
	require.Equal(t, 1, hits, "nor was there ever another")
	require.Contains(t, k.Log(), "DeadlineExceeded")
	require.NotContains(t, k.Log(), "is reserved")
	require.Greater(t, strings.Count(n.Log(), "a caller has gone before its pod was ready"), 0)
	require.Greater(t, timesAsked(n, "private-"), 1, "the kubelet did ask again")

	endPods(t, n, k, "private")
	require.EventuallyWithT(t, func(c *assert.CollectT) { requireGone(t.Context(), c, n, k) }, kubeletWait, kubeletTick)
	require.NoError(t, k.Close(t.Context()))
	require.NoError(t, n.Heal())
	n.RequireClean(t, before)
}

// timesAsked is how often containerd's log says that it was asked to run a pod whose name begins with prefix.
func timesAsked(n *harness.Node, prefix string) (count int) {
	for line := range strings.Lines(n.Log()) {
		_, about, ok := strings.Cut(line, `msg="RunPodSandbox for name:\"`+prefix)
		if ok && !strings.Contains(about, "failed, error") && !strings.Contains(about, "returns sandbox id") {
			count++
		}
	}
	return count
}

func requireAsInManifests(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pods map[string]podView) {
	t.Helper()
	for name, pod := range pods {
		require.Equal(t, "Ready", inspect(t, n, pod.ID).GetSandbox().GetState(), "podfsm runs %q", name)
	}
	require.Len(t, pods["private"].Containers, 2)
	for name, container := range pods["private"].Containers {
		require.Zero(t, container.Restarts, name)
		var inside, outside, length uint32
		_, err := fmt.Sscan(execIn(t.Context(), t, n, container.ID, "cat", "/proc/self/uid_map"), &inside, &outside, &length)
		require.NoError(t, err)
		require.Zero(t, inside, name)
		require.GreaterOrEqual(t, outside, uint32(65536), name)
		require.Equal(t, uint32(65536), length, name)
		require.Equal(t, "from writer\n", execIn(t.Context(), t, n, container.ID, "cat", "/pages/page"), name)
	}

	crashing := pods["crashing"].Containers["main"]
	require.Equal(t, 2, crashing.Restarts)
	require.GreaterOrEqual(t, mappingOf(t, containerPid(t, n, crashing.ID)), uint32(poolStart), "a range of the pool")
	require.Equal(t, "0\n", execIn(t.Context(), t, n, crashing.ID, "stat", "-c", "%u", "/runs/runs"))

	require.Zero(t, mappingOf(t, containerPid(t, n, pods["host-network"].Containers["server"].ID)), "the node's user namespace")
	require.Empty(t, pods["host-network"].IP) // without an API server the kubelet names none for such a pod, and probes localhost
	require.Contains(t, execIn(t.Context(), t, n, pods["host-network"].Containers["server"].ID, "ls", "/sys/class/net"), "cni0")
}

// killAndStart returns when the kubelet has noticed that containerd was killed, and has looked again at every pod after its start.
func killAndStart(t *testing.T, n *harness.Node, k *kubelet.Kubelet) {
	t.Helper()
	logged := len(k.Log())
	require.NoError(t, n.Kill(t.Context()))
	require.Eventually(t, func() bool { return strings.Contains(k.Log()[logged:], "connection refused") }, kubeletWait, kubeletTick)
	require.NoError(t, n.Start(t.Context()))

	requireSyncs(t, k, slices.Collect(maps.Keys(manifests))...)
}

// requireSyncs returns when the kubelet has looked again at each of these pods.
func requireSyncs(t *testing.T, k *kubelet.Kubelet, names ...string) {
	t.Helper()
	synced := map[string]int{}
	for _, name := range names {
		synced[name] = k.Syncs(name)
	}
	for _, name := range names {
		// The first may have begun before, and the second with what was seen before.
		require.Eventually(t, func() bool { return k.Syncs(name) >= synced[name]+3 }, kubeletWait, kubeletTick, "syncs of %q", name)
	}
}

// requireProbes returns when the kubelet has probed the writer once more, as its neighbour sees in the volume they share.
func requireProbes(t *testing.T, n *harness.Node, server string) {
	t.Helper()
	before := execIn(t.Context(), t, n, server, "cat", "/probes/alive")
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		require.Greater(c, execIn(t.Context(), c, n, server, "cat", "/probes/alive"), before)
	}, kubeletWait, kubeletTick)
}

// deployedSettings are those that deploy/kubelet.yaml has for a node, but for what differs with the machine.
func deployedSettings(t *testing.T) map[string]any {
	t.Helper()
	text, err := os.ReadFile("../deploy/kubelet.yaml")
	require.NoError(t, err)
	var settings map[string]any
	require.NoError(t, yaml.Unmarshal(text, &settings))
	for _, key := range []string{"containerRuntimeEndpoint", "cgroupDriver"} {
		require.Contains(t, settings, key)
		delete(settings, key)
	}
	return settings
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

// requireReady returns when the kubelet has these pods, all ready, and no other.
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

// podView is what must not change of a pod whose containers run on.
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

// look returns all pods by name, as CRI and the kubelet see them, and requires that these agree.
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

// lookAt returns a pod as CRI and the kubelet see it, and requires that these agree, and that it has one sandbox, of its first attempt.
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

func execIn(ctx context.Context, t require.TestingT, n *harness.Node, id string, command ...string) string {
	resp, err := n.Runtime.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: command})
	require.NoError(t, err)
	require.Zero(t, resp.GetExitCode(), "%q: %s", command, resp.GetStderr())
	return string(resp.GetStdout())
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
