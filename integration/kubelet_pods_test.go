package integration

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/remotecommand"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// kindOfUsers is how a pod gets its users: ids of its own from the kubelet, or those of the node.
type kindOfUsers struct {
	name      string // ends the names of its pods
	hostUsers bool
	hostPort  int // of its served pod
}

var kindsOfUsers = []kindOfUsers{{"private", false, 18080}, {"host", true, 18081}}

// hostAddress is the address on which the node serves the ports of its pod.
func (u kindOfUsers) hostAddress() string {
	return net.JoinHostPort(harness.Gateway, strconv.Itoa(u.hostPort))
}

// grace is the grace period of ending pods in seconds.
const grace = 5

// specs are the static pods for each kind of users: they have init containers, volumes, probes,
// ports, late containers, and a slow end.
var specs = map[string]string{
	// The first init container fails at first.
	"prepared": `
  terminationGracePeriodSeconds: 1
  volumes: [{name: order, emptyDir: {}}]
  initContainers:
  - name: first
    image: $BUSYBOX
    command: [sh, -c, "cat /proc/self/uid_map; echo first >> /order/order; [ $(wc -l < /order/order) -gt 1 ]"]
    volumeMounts: [{name: order, mountPath: /order}]
  - name: sidecar
    image: $BUSYBOX
    restartPolicy: Always
    command: [sh, -c, "echo sidecar >> /order/order; exec httpd -f -p 8080 -h /order"]
    volumeMounts: [{name: order, mountPath: /order}]
    startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}
  - name: second
    image: $BUSYBOX
    command: [sh, -c, "wget -q -O - http://127.0.0.1:8080/order && echo second >> /order/order"]
    volumeMounts: [{name: order, mountPath: /order}]
  containers:
  - name: app
    image: $BUSYBOX
    command: [sh, -c, "cat /proc/self/uid_map; echo app >> /order/order; exec tail -f /dev/null"]
    volumeMounts: [{name: order, mountPath: /order}]
`,
	"mounted": `
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 2000}
  volumes:
  - {name: disk, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  - name: info
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: below/name, fieldRef: {fieldPath: metadata.name}}
  - {name: group, downwardAPI: {defaultMode: 0440, items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
  - {name: host, hostPath: {path: $DIR, type: Directory}}
  containers:
  - name: root
    image: $BUSYBOX
    command: [tail, -f, /dev/null]
    volumeMounts: &mounts
    - {name: disk, mountPath: /disk}
    - {name: disk, mountPath: /below, subPath: a/b}
    - {name: memory, mountPath: /memory}
    - {name: info, mountPath: /info}
    - {name: group, mountPath: /group}
    - {name: host, mountPath: /host}
    - {name: host, mountPath: /host-ro, readOnly: true}
  - name: user
    image: $BUSYBOX
    command: [tail, -f, /dev/null]
    securityContext: {runAsUser: 1000, runAsGroup: 1000}
    volumeMounts: *mounts
`,
	// Each container says who it is in this run, and stays ready and alive for as long as what it has in /tmp works. On a busy node the kubelet
	// has asked a container that was just restarted whether it lives, before its startup probe had succeeded: one failure doesn't count.
	"probed": `
  terminationGracePeriodSeconds: 1
  containers:
  - name: http
    image: $BUSYBOX
    command: [sh, -c, "cat /proc/sys/kernel/random/uuid; touch /tmp/ready /tmp/live; exec httpd -f -p 8001 -h /tmp"]
    startupProbe: {httpGet: {path: /live, port: 8001}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}
    readinessProbe: {httpGet: {path: /ready, port: 8001}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
    livenessProbe: {httpGet: {path: /live, port: 8001}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 3}
  - name: tcp
    image: $BUSYBOX
    command: [sh, -c, "cat /proc/sys/kernel/random/uuid; nc -ll -p 8002 -e true & echo $! > /tmp/ready; nc -ll -p 8003 -e true & echo $! > /tmp/live; wait"]
    startupProbe: {tcpSocket: {port: 8003}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}
    readinessProbe: {tcpSocket: {port: 8002}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
    livenessProbe: {tcpSocket: {port: 8003}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 3}
  - name: exec
    image: $BUSYBOX
    command: [sh, -c, "cat /proc/sys/kernel/random/uuid; touch /tmp/ready /tmp/live; exec tail -f /dev/null"]
    startupProbe: {exec: {command: [test, -e, /tmp/live]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}
    readinessProbe: {exec: {command: [test, -e, /tmp/ready]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
    livenessProbe: {exec: {command: [test, -e, /tmp/live]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 3}
`,
	"served": `
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    image: $BUSYBOX
    command: [httpd, -f, -p, "8080", -h, /www]
    ports: [{containerPort: 8080, hostPort: $HOST_PORT}]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
  - name: listener
    image: $BUSYBOX
    stdin: true
    command: [sh, -c, "echo listening; while read word; do echo heard $word; done"]
`,
	"late": `
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: $BUSYBOX, command: [tail, -f, /dev/null]}]
`,
	// Both containers note SIGTERM. The tidy one ends a second later, the stubborn one notes that
	// it lives on.
	"ending": `
  terminationGracePeriodSeconds: $GRACE
  volumes: [{name: host, hostPath: {path: $DIR, type: Directory}}]
  containers:
  - name: tidy
    image: $BUSYBOX
    command: [sh, -c, "end() { echo TERM >> /host/tidy; sleep 1; echo ended >> /host/tidy; exit 3; }; trap end TERM; touch /tmp/up; while :; do sleep 0.1; done"]
    volumeMounts: [{name: host, mountPath: /host}]
    readinessProbe: {exec: {command: [test, -e, /tmp/up]}, periodSeconds: 1, timeoutSeconds: 10}
    lifecycle: {preStop: {exec: {command: [sh, -c, "echo preStop >> /host/tidy"]}}}
  - name: stubborn
    image: $BUSYBOX
    command: [sh, -c, "trap 'cat /proc/uptime > /host/TERM' TERM; touch /tmp/up; while :; do cat /proc/uptime > /host/next; mv /host/next /host/alive; sleep 0.1; done"]
    volumeMounts: [{name: host, mountPath: /host}]
    readinessProbe: {exec: {command: [test, -e, /tmp/up]}, periodSeconds: 1, timeoutSeconds: 10}
`,
}

// hostDir is the directory of the node that is a pod's volume.
func hostDir(n *harness.Node, name string) string { return filepath.Join(n.Dir(), "host", name) }

// runPods runs a static pod per kind of users and spec, and returns the names of the pods.
func runPods(t *testing.T, n *harness.Node, k *kubelet.Kubelet, wanted ...string) []string {
	t.Helper()
	var names []string
	for _, spec := range wanted {
		for _, users := range kindsOfUsers {
			name := spec + "-" + users.name
			names = append(names, name)
			require.NoError(t, os.MkdirAll(hostDir(n, name), 0o755))
			manifest := strings.NewReplacer(
				"$NAME", name, "$HOST_USERS", strconv.FormatBool(users.hostUsers), "$HOST_PORT", strconv.Itoa(users.hostPort),
				"$BUSYBOX", harness.BusyboxImage, "$DIR", hostDir(n, name), "$GRACE", strconv.Itoa(grace),
			).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: $NAME, namespace: default, labels: {app: $NAME}}
spec:
  hostUsers: $HOST_USERS` + specs[spec])
			require.NoError(t, k.Run(name, manifest))
		}
	}
	return names
}

// The kubelet manages the whole life of pods on podfsm: before, during and after their containers.
// Pods continue to run if the kubelet ends in the middle.
func TestKubeletPods(t *testing.T) {
	t.Parallel() // kubelets mostly wait
	n := harness.StartNode(t, harness.Config{TOML: podfsmForAll})
	before := warmUp(t, n, harness.PodfsmHandler, n.PodConfig("first", func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{{ContainerPort: 8080, HostPort: 18080}}
	}))
	k := startKubelet(t, n, nil)
	names := runPods(t, n, k, "prepared", "mounted", "probed", "served", "ending")
	requireReady(t, k, names...)

	chapters := []struct {
		name    string
		require func(*testing.T, *harness.Node, *kubelet.Kubelet, kindOfUsers)
	}{
		{"init containers", requireInOrder},
		{"volumes", requireVolumes},
		{"probes", requireProbed},
		{"ports and streams", requireServed},
		{"end", requireGrace},
	}
	t.Run("chapters", func(t *testing.T) { // each with pods of its own
		for _, chapter := range chapters {
			for _, users := range kindsOfUsers {
				t.Run(chapter.name+"/"+users.name, func(t *testing.T) {
					t.Parallel()
					chapter.require(t, n, k, users)
				})
			}
		}
	})

	t.Run("restarts of the kubelet", func(t *testing.T) { requireRestarts(t, n, k) })

	endPods(t, n, k, slices.Collect(maps.Keys(kubeletPods(t.Context(), t, k)))...)
	require.EventuallyWithT(t, func(c *assert.CollectT) { requireGone(t.Context(), c, n, k) }, kubeletWait, kubeletTick)
	require.NoError(t, k.Close(t.Context()))
	n.RequireClean(t, before)
}

// requireInOrder requires that each init container had ended, or served, before the next one began,
// that the app came last, and that all have the same ids.
func requireInOrder(t *testing.T, n *harness.Node, k *kubelet.Kubelet, users kindOfUsers) {
	pod := "prepared-" + users.name
	containers := lookAt(t, n, kubeletPods(t.Context(), t, k)[pod]).Containers
	first, sidecar, second, app := containers["first"], containers["sidecar"], containers["second"], containers["app"]
	require.Equal(t, 1, first.Restarts)
	for _, container := range []containerView{first, second} {
		require.Equal(t, runtime.ContainerState_CONTAINER_EXITED, container.State)
	}
	require.Less(t, first.FinishedAt, sidecar.CreatedAt)
	require.Less(t, sidecar.StartedAt, second.CreatedAt)
	require.Less(t, second.FinishedAt, app.CreatedAt)
	require.Equal(t, "first\nfirst\nsidecar\n", kubectlLogs(t, k, pod, "second", ""), "what the sidecar served")
	require.Equal(t, "first\nfirst\nsidecar\nsecond\napp\n", kubectlExec(t, n, k, pod, "app", "cat", "/order/order"))

	mapping := kubectlLogs(t, k, pod, "app", "")
	require.Equal(t, mapping, kubectlLogs(t, k, pod, "first", ""))
	require.Equal(t, users.hostUsers, mappingOf(t, containerPid(t, n, app.ID)) == 0)
	require.Equal(t, users.hostUsers, strings.HasSuffix(strings.TrimSpace(mapping), " 4294967295"), mapping)
}

// requireVolumes reads, writes and shares volumes as root and as another user, and checks them on
// the host.
func requireVolumes(t *testing.T, n *harness.Node, k *kubelet.Kubelet, users kindOfUsers) {
	pod := "mounted-" + users.name
	asRoot := func(command string) string { return kubectlExec(t, n, k, pod, "root", "sh", "-c", command) }
	asUser := func(command string) string { return kubectlExec(t, n, k, pod, "user", "sh", "-c", command) }
	onHost := func(volume, file string) string {
		return filepath.Join(k.VolumePath(kubeletPods(t.Context(), t, k)[pod], "empty-dir", volume), file)
	}

	// The kubelet writes configMaps as links to the present version of the data.
	require.Equal(t, "..data/labels\n", asRoot("readlink /info/labels"))
	require.Regexp(t, `^\.\.20`, asRoot("readlink /info/..data"))
	for _, as := range []func(string) string{asRoot, asUser} {
		require.Equal(t, fmt.Sprintf("app=%q", pod), as("cat /info/labels"))
		require.Equal(t, pod+"-node", as("cat /info/below/name"))
		require.Equal(t, pod+"-node", as("cat /group/name"), "root's, and the group's")
		require.Equal(t, "0:2000 440\n", as("stat -Lc '%u:%g %a' /group/name"))
		require.Equal(t, "read-only\n", as("touch /info/x 2> /dev/null || echo read-only"))
	}

	// Files of the pod, in memory and on disk.
	require.Equal(t, "tmpfs\n", asRoot("stat -fc %T /memory"))
	require.NotEqual(t, "tmpfs\n", asRoot("stat -fc %T /disk"))
	require.Equal(t, "full\n", asUser("head -c 2097152 /dev/zero > /memory/big 2> /dev/null || echo full; rm /memory/big"))
	asUser("echo by user > /disk/user; echo by user > /memory/user")
	asRoot("echo by root > /below/root; umask 077; echo by root > /memory/root")
	require.Equal(t, "by user\nby user\n", asRoot("cat /disk/user /memory/user"))
	require.Equal(t, "by root\n", asUser("cat /disk/a/b/root"))
	require.Equal(t, "refused\n", asUser("cat /memory/root 2> /dev/null || echo refused"))
	for _, volume := range []string{"disk", "memory"} {
		requireOwner(t, onHost(volume, "user"), 1000, 2000)
	}
	requireOwner(t, onHost("disk", "a/b/root"), 0, 2000)

	// Files of the node.
	given := filepath.Join(hostDir(n, pod), "given")
	require.NoError(t, os.WriteFile(given, []byte("by the node\n"), 0o600))
	require.Equal(t, "by the node\n", asRoot("cat /host/given"))
	require.Equal(t, "refused\n", asUser("cat /host/given 2> /dev/null || echo refused"))
	asRoot("cat /host/given > /host/taken; chown 1000:1000 /host/taken")
	asUser("echo by user >> /host/taken")
	require.Equal(t, "read-only\n", asRoot("touch /host-ro/x 2> /dev/null || echo read-only"))
	taken, err := os.ReadFile(filepath.Join(hostDir(n, pod), "taken"))
	require.NoError(t, err)
	require.Equal(t, "by the node\nby user\n", string(taken))
	requireOwner(t, filepath.Join(hostDir(n, pod), "taken"), 1000, 1000)
}

// requireProbed makes each container of a pod fail its readiness probe, so that the container and
// the pod become unready, and then its liveness probe, so that only this container is restarted.
func requireProbed(t *testing.T, n *harness.Node, k *kubelet.Kubelet, users kindOfUsers) {
	pod := "probed-" + users.name
	for _, container := range []string{"http", "tcp", "exec"} {
		requireStatus := func(ready bool, restarts int) podView {
			t.Helper()
			require.EventuallyWithT(t, func(c *assert.CollectT) {
				of := kubeletPods(t.Context(), c, k)[pod]
				require.Equal(c, ready, of.Ready())
				for _, status := range of.Status.ContainerStatuses {
					if status.Name == container {
						require.Equal(c, restarts, status.RestartCount)
					}
					require.Equal(c, ready || status.Name != container, status.Ready, status.Name)
				}
			}, kubeletWait, kubeletTick)
			return lookAt(t, n, kubeletPods(t.Context(), t, k)[pod])
		}
		run, before := kubectlLogs(t, k, pod, container, ""), requireStatus(true, 0)

		kubectlExec(t, n, k, pod, container, "sh", "-c", endOf(container, "/tmp/ready"))
		require.Equal(t, before, requireStatus(false, 0), "%q is not ready, and runs on", container)

		// The container may end before the program that is the reason.
		_ = stream(t, n, k, pod, container, []string{"sh", "-c", endOf(container, "/tmp/live")}, remotecommand.StreamOptions{Stdout: io.Discard})
		after := requireStatus(true, 1)
		require.NotEqual(t, before.Containers[container].ID, after.Containers[container].ID)
		after.Containers[container] = before.Containers[container]
		require.Equal(t, before, after, "%q alone was restarted", container)
		require.Equal(t, run, kubectlLogs(t, k, pod, container, "previous=true"))
		require.NotEqual(t, run, kubectlLogs(t, k, pod, container, ""))
	}
}

// endOf returns the command that makes a probe fail.
func endOf(container, file string) string {
	if container == "tcp" {
		return "kill $(cat " + file + ")"
	}
	return "rm " + file
}

// requireServed requires that a pod is reachable through the port of the node and through the
// kubelet.
func requireServed(t *testing.T, n *harness.Node, k *kubelet.Kubelet, users kindOfUsers) {
	pod := "served-" + users.name
	requirePage(t, n, users.hostAddress())
	requireForward(t, n, k, pod, 8080, "/", harness.IndexPage)
	requireTrueSummary(t, n, k, pod, "server", "listener")
	requireExec(t, n, k, pod, "server")
	requireConversation(t, n, k, pod, "listener", "from-"+t.Name())
}

// requireGrace ends a pod: its hook runs, its containers get SIGTERM, and those that ignore it are
// killed after the grace period.
func requireGrace(t *testing.T, n *harness.Node, k *kubelet.Kubelet, users kindOfUsers) {
	pod := "ending-" + users.name
	known := kubeletPods(t.Context(), t, k)[pod]
	containers, ended := lookAt(t, n, known).Containers, map[string]bool{known.Metadata.UID: true}
	events, err := n.Events(t.Context())
	require.NoError(t, err)
	defer events.Close()
	ctx, cancel := context.WithTimeout(t.Context(), kubeletWait)
	defer cancel()
	require.NoError(t, k.Remove(pod))

	exitCode := func(container string) (code int32) {
		t.Helper()
		id := containers[container].ID
		_, err := events.WaitFor(ctx, func(all []*runtime.ContainerEventResponse) bool {
			for _, stopped := range harness.OfType(all, id, runtime.ContainerEventType_CONTAINER_STOPPED_EVENT) {
				for _, status := range stopped.GetContainersStatuses() {
					if status.GetId() == id {
						code = status.GetExitCode()
						return true
					}
				}
			}
			return false
		})
		require.NoError(t, err)
		return code
	}
	require.Equal(t, int32(3), exitCode("tidy"))
	require.Equal(t, int32(137), exitCode("stubborn"))

	noted, err := os.ReadFile(filepath.Join(hostDir(n, pod), "tidy"))
	require.NoError(t, err)
	require.Equal(t, "preStop\nTERM\nended\n", string(noted))
	var told, last float64
	for file, uptime := range map[string]*float64{"TERM": &told, "alive": &last} {
		noted, err := os.ReadFile(filepath.Join(hostDir(n, pod), file))
		require.NoError(t, err)
		_, err = fmt.Sscan(string(noted), uptime)
		require.NoError(t, err)
	}
	require.Greater(t, last-told, grace/2.0, "seconds that the stubborn one had")
	requireEnd(t, n, ended)
}
