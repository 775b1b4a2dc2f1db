package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

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

// The kubelet runs pods on podfsm as on any other runtime. After a kill and a start of containerd,
// it has nothing to do. It does not notice that a pod without hostUsers: false gets a user
// namespace.
func TestKubelet(t *testing.T) {
	t.Parallel() // kubelets mostly wait
	n, before := startNodeWithPool(t, harness.Config{Handlers: []string{autoHandler}, TOML: podfsmForAll + usersOf(harness.PodfsmHandler, `
		mode = "auto"
		unmappable = "host"`)})
	k := startKubelet(t, n, deployedSettings(t))

	for name, manifest := range sorted(manifests) {
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
	requireKeptWhileDegraded(t, n, k)

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

	for name := range sorted(manifests) {
		require.NoError(t, k.Remove(name))
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) { requireGone(t.Context(), c, n, k) }, roundsWait, kubeletTick)
	require.NoError(t, k.Close(t.Context()))
	n.RequireClean(t, before)
}

// A kubelet whose calls time out before the network is attached asks again with the same attempt,
// and gets the only sandbox.
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
	require.Greater(t, strings.Count(n.Log(), "pod creation continues after its caller's deadline"), 0)
	require.Greater(t, timesAsked(n, "private-"), 1, "the kubelet did ask again")

	endPods(t, n, k, "private")
	require.EventuallyWithT(t, func(c *assert.CollectT) { requireGone(t.Context(), c, n, k) }, kubeletWait, kubeletTick)
	require.NoError(t, k.Close(t.Context()))
	require.NoError(t, n.Heal())
	n.RequireClean(t, before)
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

// killAndStart kills and starts containerd, and waits until the kubelet has noticed both and has
// synced every pod.
func killAndStart(t *testing.T, n *harness.Node, k *kubelet.Kubelet) {
	t.Helper()
	logged := len(k.Log())
	require.NoError(t, n.Kill(t.Context()))
	require.Eventually(t, func() bool { return strings.Contains(k.Log()[logged:], "connection refused") }, kubeletWait, kubeletTick)
	require.NoError(t, n.Start(t.Context()))

	requireSyncs(t, k, slices.Collect(maps.Keys(manifests))...)
}

// requireProbes waits until the kubelet has probed the writer once more, as the other container
// sees in the shared volume.
func requireProbes(t *testing.T, n *harness.Node, server string) {
	t.Helper()
	before := execIn(t.Context(), t, n, server, "cat", "/probes/alive")
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		require.Greater(c, execIn(t.Context(), c, n, server, "cat", "/probes/alive"), before)
	}, kubeletWait, kubeletTick)
}

// deployedSettings are the settings of deploy/kubelet.yaml, except for those that depend on the
// machine.
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

func execIn(ctx context.Context, t require.TestingT, n *harness.Node, id string, command ...string) string {
	resp, err := n.Runtime.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: command})
	require.NoError(t, err)
	require.Zero(t, resp.GetExitCode(), "%q: %s", command, resp.GetStderr())
	return string(resp.GetStdout())
}
