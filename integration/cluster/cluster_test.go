package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

var (
	// wait bounds what the cluster does, except for removals.
	wait = harness.Patience(2 * time.Minute)
	// roundsWait bounds the removal of a pod: the kubelet removes sandboxes once a minute.
	roundsWait = harness.Patience(3 * time.Minute)
	tick       = harness.Patience(200 * time.Millisecond)
)

// The handlers of podfsm that map pods without hostUsers: false. Each has a RuntimeClass of its
// name.
const (
	autoHandler = "podfsm-auto"
	nodeHandler = "podfsm-node"
)

// Host ids outside of kubelet.IDs.
const (
	nodeWide  = 2_000_000_000
	poolStart = 3_000_000_000
)

var config = harness.Config{
	Handlers: []string{autoHandler, nodeHandler},
	TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = "podfsm"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns_pool]
  ranges = [{host_id = %d, size = 6553600}]
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.podfsm-auto]
  mode = "auto"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.podfsm-node]
  mode = "node"
  node_wide_uid_mapping = {container_id = 0, host_id = %d, size = 65536}
  node_wide_gid_mapping = {container_id = 0, host_id = %[2]d, size = 65536}
`, poolStart, nodeWide),
}

// podfsm runs the pods of a Kubernetes cluster, with each kubelet: workloads are deployed, updated,
// reached and inspected, containerd is killed, and the node is drained. In the end nothing is left.
func TestCluster(t *testing.T) {
	programs, err := harness.BuildCluster(t.Context())
	require.NoError(t, err)
	older, err := harness.BuildKubelet(t.Context())
	require.NoError(t, err)
	for _, executable := range []string{filepath.Join(programs, "kubelet"), older} {
		version := versionOf(t, executable)
		t.Run("kubelet "+version, func(t *testing.T) {
			if harness.Patience(1) == 1 { // a slow machine has enough to do with one cluster
				t.Parallel()
			}
			c, before := start(t, programs, executable)
			c.requireVersions(t, versionOf(t, filepath.Join(programs, "kube-apiserver")), version)
			c.kubectlWith(t, runtimeClasses, "apply", "-f", "-")

			t.Run("workloads", func(t *testing.T) {
				for _, w := range workloads {
					t.Run(w.name, func(t *testing.T) {
						t.Parallel() // they mostly wait
						w.run(t, c.namespace(t, w.name))
					})
				}
			})
			t.Run("no failures", c.requireNoFailures)
			t.Run("network fails", c.requireOneEvent)
			t.Run("containerd killed", c.requireNothingChangesByKill)
			t.Run("drain", c.requireDrain)
			if !t.Failed() { // pods that have failed may never go
				c.requireEnd(t, before)
			}
		})
	}
}

// cluster is a cluster of one node.
type cluster struct {
	*OneNode
	node *harness.Node
}

// start returns a cluster with a ready node, and the census of the node without pods. The cluster
// ends with the test. A failed test shows the end of each log.
func start(t *testing.T, programs, executable string) (*cluster, harness.Census) {
	t.Helper()
	n := harness.StartNode(t, config)
	// The first pod makes resources that stay: the file of the id pool, and the iptables chains for
	// ports.
	withPort := func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{{ContainerPort: 8080, HostPort: 8080}}
	}
	first, err := n.RunPod(t.Context(), autoHandler, n.PodConfig("first", harness.HostUsers(), withPort))
	require.NoError(t, err)
	require.NoError(t, first.StopAndRemove(t.Context()))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	c := &cluster{node: n}
	c.OneNode, err = New(t.Context(), n, programs, executable)
	require.NoError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the ends of the control plane's logs:\n%s", c.LogTails(30))
		}
		assert.NoError(t, c.ControlPlane.Close(context.WithoutCancel(t.Context())))
	})
	t.Cleanup(func() {
		log := c.Kubelet.Log()
		err := c.Kubelet.Close(context.WithoutCancel(t.Context()))
		if t.Failed() { // pods may run on, and then it cannot clean up
			t.Logf("closing the kubelet: %v", err)
			n.KeepLog(t, "kubelet", log)
		} else if err != nil {
			t.Errorf("failed to close the kubelet: %v", err)
		}
	})
	c.wait(t, "node/"+kubelet.NodeName, "create")
	c.wait(t, "node/"+kubelet.NodeName, "condition=Ready")
	return c, before
}

// versionOf returns the version that a program of Kubernetes reports.
func versionOf(t *testing.T, executable string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), executable, "--version").Output()
	require.NoError(t, err)
	return strings.TrimPrefix(strings.TrimSpace(string(out)), "Kubernetes ")
}

// requireVersions requires the versions of the cluster, and logs them.
func (c *cluster) requireVersions(t *testing.T, server, kubelet string) {
	t.Helper()
	var version struct{ ServerVersion struct{ GitVersion string } }
	c.getJSON(t, &version, "version")
	require.Equal(t, server, version.ServerVersion.GitVersion)

	var nodes corev1.NodeList
	c.getJSON(t, &nodes, "get", "nodes")
	require.Len(t, nodes.Items, 1)
	info := nodes.Items[0].Status.NodeInfo
	require.Equal(t, kubelet, info.KubeletVersion)
	require.True(t, strings.HasPrefix(info.ContainerRuntimeVersion, "containerd://"), info.ContainerRuntimeVersion)
	t.Logf("kube-apiserver %s, kubelet %s, %s", server, info.KubeletVersion, info.ContainerRuntimeVersion)
}

// harmless are the reasons of warnings in a healthy cluster: probes run before servers listen, the
// containers of a job fail on purpose, and the machine lacks some features.
var harmless = []string{"Unhealthy", "BackOff", "CgroupV1", "InvalidDiskCapacity"}

// slow matches the warning of a kubelet that waits for the API server and tries again.
var slow = regexp.MustCompile(`failed to sync (configmap|secret) cache: timed out waiting for the condition`)

// requireNoFailures requires that the cluster has no other warnings than harmless ones.
func (c *cluster) requireNoFailures(t *testing.T) {
	var events corev1.EventList
	c.getJSON(t, &events, "get", "events", "--all-namespaces", "--field-selector=type=Warning")
	for _, e := range events.Items {
		if !slices.Contains(harmless, e.Reason) && !slow.MatchString(e.Message) {
			t.Errorf("%s of %s %s/%s: %s", e.Reason, e.InvolvedObject.Kind, e.InvolvedObject.Namespace, e.InvolvedObject.Name, e.Message)
		}
	}
}

// A pod whose network fails has one event, which names the step and counts the tries. It runs after
// the network was repaired.
func (c *cluster) requireOneEvent(t *testing.T) {
	ns := c.namespace(t, "network-fails")
	require.NoError(t, c.node.Fault("portmap.ADD", "error(no luck)"))
	ns.apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: unlucky}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    `+image+`
    command: [tail, -f, /dev/null]
`)
	failures := func(t require.TestingT) []corev1.Event {
		var events corev1.EventList
		ns.getJSON(t, &events, "get", "events", "--field-selector=reason=FailedCreatePodSandBox")
		return events.Items
	}
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		events := failures(t)
		require.NotEmpty(t, events)
		require.Greater(t, events[0].Count, int32(2))
	}, wait, tick)
	require.NoError(t, c.node.Heal())
	ns.wait(t, "pod/unlucky", "condition=Ready")
	events := failures(t)
	require.Len(t, events, 1)
	require.Contains(t, events[0].Message, `step attach_network of pod "network-fails/unlucky" failed`)
	require.Contains(t, events[0].Message, "no luck")
}

// containerd is killed during the update of a deployment, and starts some time later. The update
// completes, and no other pod changes or notices.
func (c *cluster) requireNothingChangesByKill(t *testing.T) {
	c.waitSettled(t)
	before := c.look(t)

	c.namespaceOf("deployment").kubectl(t, "rollout", "restart", "deployment/web")
	logged := len(c.Kubelet.Log())
	require.NoError(t, c.node.Kill(t.Context()))
	require.Eventually(t, func() bool { return strings.Contains(c.Kubelet.Log()[logged:], "connection refused") }, wait, tick)
	require.NoError(t, c.node.Start(t.Context()))
	c.waitSyncs(t)
	c.namespaceOf("deployment").rolledOut(t, "deployment/web")

	c.waitSettled(t)
	after := c.look(t)
	for _, views := range []map[string]podView{before, after} {
		maps.DeleteFunc(views, func(pod string, _ podView) bool { return strings.HasPrefix(pod, "deployment/") })
	}
	require.Equal(t, before, after, "no pod is recreated, no container restarted")
	for _, w := range workloads {
		if w.works != nil {
			w.works(t, c.namespaceOf(w.name))
		}
	}
}

// All pods except for daemons leave a drained node, and return after kubectl uncordon.
func (c *cluster) requireDrain(t *testing.T) {
	deployment, daemons := c.namespaceOf("deployment"), c.namespaceOf("daemonset")
	before := daemons.pods(t)
	c.kubectl(t, "drain", kubelet.NodeName, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout="+wait.String())
	for _, pod := range deployment.pods(t) {
		require.Empty(t, pod.Spec.NodeName)
	}
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		var left []string
		for _, s := range c.sandboxes(t) {
			left = append(left, s.GetMetadata().GetNamespace())
		}
		assert.Equal(t, []string{"daemonset"}, left)
	}, roundsWait, tick)

	c.kubectl(t, "uncordon", kubelet.NodeName)
	deployment.rolledOut(t, "deployment/web")
	require.Equal(t, uids(before), uids(daemons.pods(t)))
}

// requireEnd deletes everything and requires that nothing is left.
func (c *cluster) requireEnd(t *testing.T, before harness.Census) {
	t.Helper()
	c.kubectl(t, "delete", "namespaces", "--selector="+label, "--timeout="+roundsWait.String())
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		assert.Empty(t, c.sandboxes(t))
		left, err := c.Kubelet.Leftovers()
		assert.NoError(t, err)
		assert.Empty(t, left)
	}, roundsWait, tick)
	require.NoError(t, c.Kubelet.Close(t.Context()))
	require.NoError(t, c.Close(t.Context()))
	c.node.RequireClean(t, before)
}

// podView is what must not change for a pod whose containers continue to run.
type podView struct {
	UID        string
	Phase      corev1.PodPhase
	Sandbox    string
	Created    int64 // when the sandbox was created
	State      runtime.PodSandboxState
	IP         string
	Containers map[string]corev1.ContainerStatus
}

// look returns all pods as namespace/name, each with its only sandbox. It requires that no other
// sandbox exists.
func (c *cluster) look(t require.TestingT) map[string]podView {
	sandboxes := map[string][]*runtime.PodSandbox{}
	for _, s := range c.sandboxes(t) {
		sandboxes[s.GetMetadata().GetUid()] = append(sandboxes[s.GetMetadata().GetUid()], s)
	}
	views := map[string]podView{}
	for _, pod := range c.pods(t) {
		name, uid := pod.Namespace+"/"+pod.Name, string(pod.UID)
		require.Len(t, sandboxes[uid], 1, "sandboxes of pod %q", name)
		s := sandboxes[uid][0]
		delete(sandboxes, uid)
		require.Zero(t, s.GetMetadata().GetAttempt(), name)
		view := podView{
			UID: uid, Phase: pod.Status.Phase, Sandbox: s.GetId(), Created: s.GetCreatedAt(), State: s.GetState(), IP: pod.Status.PodIP,
			Containers: map[string]corev1.ContainerStatus{},
		}
		for _, status := range slices.Concat(pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses) {
			view.Containers[status.Name] = status
		}
		views[name] = view
	}
	require.Empty(t, sandboxes, "sandboxes of no pod")
	return views
}

// waitSettled waits until each pod has exactly one sandbox in the state of the pod, and all running
// pods are ready.
func (c *cluster) waitSettled(t *testing.T) {
	t.Helper()
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		for name, pod := range c.look(t) {
			switch pod.Phase {
			case corev1.PodSucceeded:
				require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, pod.State, name)
			default:
				require.Equal(t, corev1.PodRunning, pod.Phase, name)
				require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, pod.State, name)
				for _, status := range pod.Containers {
					require.True(t, status.Ready || status.State.Terminated != nil, "%s of %s", status.Name, name)
				}
			}
		}
	}, roundsWait, tick)
}

// waitSyncs waits until the kubelet has synced each running pod again.
func (c *cluster) waitSyncs(t *testing.T) {
	t.Helper()
	before := c.Kubelet.AllSyncs()
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		now := c.Kubelet.AllSyncs()
		for _, pod := range c.pods(t) {
			if pod.Status.Phase == corev1.PodRunning {
				name := pod.Namespace + "/" + pod.Name
				// The first sync may have begun before the call, and the second may have used an
				// earlier view.
				require.GreaterOrEqual(t, now[name], before[name]+3, name)
			}
		}
	}, wait, tick)
}

func (c *cluster) sandboxes(t require.TestingT) []*runtime.PodSandbox {
	list, err := c.node.Runtime.ListPodSandbox(context.Background(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	return list.GetItems()
}

func (c *cluster) pods(t require.TestingT) []corev1.Pod {
	var pods corev1.PodList
	c.getJSON(t, &pods, "get", "pods", "--all-namespaces")
	return pods.Items
}

// uids returns the pods' uids in order.
func uids(pods []corev1.Pod) []string {
	var ids []string
	for _, pod := range pods {
		ids = append(ids, string(pod.UID))
	}
	slices.Sort(ids)
	return ids
}

func (c *cluster) kubectl(t require.TestingT, args ...string) string {
	return c.kubectlWith(t, "", args...)
}

// kubectlWith runs kubectl with this stdin. On failure, the test fails with the stderr of kubectl.
func (c *cluster) kubectlWith(t require.TestingT, stdin string, args ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*roundsWait)
	defer cancel()
	out, err := c.Kubectl(ctx, stdin, args...)
	require.NoError(t, err)
	return out
}

func (c *cluster) getJSON(t require.TestingT, value any, args ...string) {
	require.NoError(t, json.Unmarshal([]byte(c.kubectl(t, append(args, "--output=json")...)), value))
}

// wait waits until a condition of kubectl wait is true of an object.
func (c *cluster) wait(t require.TestingT, object, what string, args ...string) {
	c.kubectl(t, append([]string{"wait", object, "--for=" + what, "--timeout=" + wait.String()}, args...)...)
}
