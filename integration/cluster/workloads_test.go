package cluster

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// workload is a use of the cluster in its own namespace. It keeps running.
type workload struct {
	name  string
	run   func(*testing.T, namespace)
	works func(*testing.T, namespace) // holds as long as it runs; may be nil
}

var workloads = []workload{
	{name: "deployment", run: runDeployment},
	{name: "daemonset", run: runDaemonSet},
	{name: "job", run: runJob},
	{name: "volumes", run: runVolumes, works: requireVolumes},
	{name: "users", run: runUsers, works: requireUsers},
	{name: "host-port", run: runHostPort, works: requireHostPort},
	{name: "probes", run: runProbes},
	{name: "kubectl", run: runKubectl, works: requireKubectl},
}

const runtimeClasses = `
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: runc}
handler: runc
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: podfsm-auto}
handler: podfsm-auto
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: podfsm-node}
handler: podfsm-node
`

// image is the image of all containers, indented as in the manifest of a pod. No registry has it.
const image = "image: " + harness.BusyboxImage + "\n    imagePullPolicy: Never"

// runDeployment updates a deployment, and rolls the update back.
func runDeployment(t *testing.T, ns namespace) {
	ns.apply(t, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: server
        image: `+harness.BusyboxImage+`
        imagePullPolicy: Never
        env: [{name: VERSION, value: one}]
        command: [sh, -c, "echo $VERSION > /www/index.html && exec httpd -f -p 8080 -h /www"]
        resources: {requests: {memory: 16Mi}, limits: {memory: 64Mi}}
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
`)
	requireDeployed(t, ns, "one")
	first := uids(ns.pods(t))
	ns.kubectl(t, "set", "env", "deployment/web", "VERSION=two")
	requireDeployed(t, ns, "two")
	ns.kubectl(t, "rollout", "undo", "deployment/web")
	requireDeployed(t, ns, "one")
	for _, pod := range ns.pods(t) {
		require.NotContains(t, first, string(pod.UID))
	}
}

// requireDeployed waits until the deployment has two pods, both of this version.
func requireDeployed(t *testing.T, ns namespace, version string) {
	t.Helper()
	ns.rolledOut(t, "deployment/web")
	require.EventuallyWithT(t, func(t *assert.CollectT) { assert.Len(t, ns.pods(t), 2) }, wait, tick) // no older pod is left
	for _, pod := range ns.pods(t) {
		require.Equal(t, version+"\n", ns.fetch(t, pod.Status.PodIP+":8080"))
	}
}

// runDaemonSet runs a daemon as nodes have them: privileged and on the network of the node.
func runDaemonSet(t *testing.T, ns namespace) {
	ns.apply(t, `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      containers:
      - name: agent
        image: `+harness.BusyboxImage+`
        imagePullPolicy: Never
        command: [httpd, -f, -p, "8099", -h, /www]
        securityContext: {privileged: true}
        readinessProbe: {httpGet: {path: /, port: 8099}, periodSeconds: 1, timeoutSeconds: 10}
`)
	ns.rolledOut(t, "daemonset/agent")
	first := uids(ns.pods(t))
	ns.kubectl(t, "rollout", "restart", "daemonset/agent")
	ns.rolledOut(t, "daemonset/agent")
	require.EventuallyWithT(t, func(t *assert.CollectT) { assert.Len(t, ns.pods(t), 1) }, wait, tick)
	pod := ns.pods(t)[0]
	require.NotContains(t, first, string(pod.UID))
	require.Equal(t, harness.Gateway, pod.Status.PodIP)
	require.Equal(t, harness.IndexPage, ns.fetch(t, harness.Gateway+":8099"))
}

// runJob runs three pods whose containers fail the first time, and are restarted in their pods.
func runJob(t *testing.T, ns namespace) {
	ns.apply(t, `
apiVersion: batch/v1
kind: Job
metadata: {name: work}
spec:
  completions: 3
  parallelism: 3
  template:
    spec:
      restartPolicy: OnFailure
      volumes: [{name: tries, emptyDir: {}}]
      containers:
      - name: main
        image: `+harness.BusyboxImage+`
        imagePullPolicy: Never
        command: [sh, -c, "mkdir /tries/first && exit 1; echo done by $HOSTNAME"]
        volumeMounts: [{name: tries, mountPath: /tries}]
`)
	ns.wait(t, "job/work", "condition=Complete")
	pods := ns.pods(t)
	require.Len(t, pods, 3)
	for _, pod := range pods {
		require.Equal(t, corev1.PodSucceeded, pod.Status.Phase)
		require.EqualValues(t, 1, pod.Status.ContainerStatuses[0].RestartCount)
		require.Contains(t, ns.kubectl(t, "logs", pod.Name), "done by "+pod.Name+"\n")
	}
}

// podUsers is a way for a pod to get its users.
type podUsers struct {
	name         string // of the pod
	runtimeClass string // "" is the default handler
	hostUsers    bool
}

var allUsers = []podUsers{
	{"podfsm-host", "", true},
	{"podfsm-own", "", false},
	{"auto-host", autoHandler, true},
	{"auto-own", autoHandler, false},
	{"node-host", nodeHandler, true},
	{"node-own", nodeHandler, false},
	{"runc-host", harness.StockHandler, true},
	{"runc-own", harness.StockHandler, false},
}

// spec returns the part of the spec that selects the users. It is empty for the users of the node.
func (u podUsers) spec() string {
	var spec strings.Builder
	if u.runtimeClass != "" {
		fmt.Fprintf(&spec, "  runtimeClassName: %s\n", u.runtimeClass)
	}
	if !u.hostUsers {
		spec.WriteString("  hostUsers: false\n")
	}
	return spec.String()
}

// runVolumes runs pods of all users that read, as a user other than root, volumes of the API
// server.
func runVolumes(t *testing.T, ns namespace) {
	ns.apply(t, `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: red}
---
apiVersion: v1
kind: Secret
metadata: {name: credentials}
stringData: {password: "1234"}
`)
	for _, u := range allUsers {
		ns.apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: `+u.name+`}
spec:
`+u.spec()+`
  terminationGracePeriodSeconds: 1
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: credentials, secret: {secretName: credentials, defaultMode: 0440}}
  - name: all
    projected:
      defaultMode: 0440
      sources:
      - configMap: {name: settings}
      - secret: {name: credentials}
      - downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}
      - serviceAccountToken: {path: token}
  containers:
  - name: main
    `+image+`
    command: [tail, -f, /dev/null]
    volumeMounts:
    - {name: settings, mountPath: /settings}
    - {name: credentials, mountPath: /credentials}
    - {name: all, mountPath: /all}
`)
	}
	ns.wait(t, "pods", "condition=Ready", "--all")
	requireVolumes(t, ns)
	for _, u := range allUsers {
		requireToken(t, ns, u.name)
	}

	ns.kubectl(t, "patch", "configmap", "settings", `--patch={"data": {"color": "blue"}}`)
	for _, u := range allUsers {
		require.EventuallyWithT(t, func(t *assert.CollectT) {
			assert.Equal(t, "blue", ns.exec(t, u.name, "cat", "/settings/color"))
			assert.Equal(t, "blue", ns.exec(t, u.name, "cat", "/all/color"))
		}, wait, tick, u.name)
	}
}

func requireVolumes(t *testing.T, ns namespace) {
	t.Helper()
	color := ns.kubectl(t, "get", "configmap", "settings", "--output=jsonpath={.data.color}")
	for _, u := range allUsers {
		read := ns.exec(t, u.name, "sh", "-c", "cd /; for f in settings/color all/color credentials/password all/password all/name; do cat $f; echo; done")
		require.Equal(t, strings.Join([]string{color, color, "1234", "1234", u.name, ""}, "\n"), read, u.name)
		require.Equal(t, "0 2000 440\n", ns.exec(t, u.name, "stat", "-L", "-c", "%u %g %a", "/credentials/password"), u.name)
	}
}

// requireToken requires that the API server authenticates the pod by its token.
func requireToken(t *testing.T, ns namespace, pod string) {
	t.Helper()
	token := ns.exec(t, pod, "cat", "/all/token")
	var review authenticationv1.SelfSubjectReview
	ns.getJSON(t, &review, "auth", "whoami", "--token="+token)
	require.Equal(t, "system:serviceaccount:"+ns.name+":default", review.Status.UserInfo.Username)
	require.Equal(t, authenticationv1.ExtraValue{pod}, review.Status.UserInfo.Extra["authentication.kubernetes.io/pod-name"])
}

// runUsers runs a pod of each kind of users.
func runUsers(t *testing.T, ns namespace) {
	for _, u := range allUsers {
		ns.apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: `+u.name+`}
spec:
`+u.spec()+`
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    `+image+`
    command: [tail, -f, /dev/null]
`)
	}
	ns.wait(t, "pods", "condition=Ready", "--all")
	requireUsers(t, ns)
}

// requireUsers requires that each pod has the users of its kind, that pods share users only where
// they should, and that podfsm runs the pods of its handlers.
func requireUsers(t *testing.T, ns namespace) {
	t.Helper()
	list, err := ns.node.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	var ours []string
	for _, s := range list.GetSandboxes() {
		if s.GetPodNamespace() == ns.name {
			ours = append(ours, s.GetPodName())
		}
	}
	require.ElementsMatch(t, []string{"podfsm-host", "podfsm-own", "auto-host", "auto-own", "node-host", "node-own"}, ours)

	seen := map[uint32]string{}
	for _, u := range allUsers {
		var inside, outside, length uint32
		_, err := fmt.Sscan(ns.exec(t, u.name, "cat", "/proc/self/uid_map"), &inside, &outside, &length)
		require.NoError(t, err)
		require.Zero(t, inside, u.name)
		require.NotContains(t, seen, outside, "%s has the users of %s", u.name, seen[outside])
		switch {
		case u.hostUsers && u.runtimeClass == autoHandler:
			require.GreaterOrEqual(t, outside, uint32(poolStart), u.name)
		case u.hostUsers && u.runtimeClass == nodeHandler:
			require.Equal(t, uint32(nodeWide), outside, u.name)
		case u.hostUsers:
			require.Zero(t, outside, u.name)
			require.Equal(t, ^uint32(0), length, u.name)
			continue
		default: // a range of the kubelet
			require.GreaterOrEqual(t, outside, uint32(kubelet.FirstID), u.name)
			require.Less(t, outside, uint32(kubelet.FirstID+kubelet.IDs), u.name)
		}
		require.Equal(t, uint32(65536), length, u.name)
		seen[outside] = u.name
	}
}

// runHostPort runs a pod with a user namespace and a pod with the users of the node, both on ports
// of the node.
func runHostPort(t *testing.T, ns namespace) {
	for port, u := range hostPorts {
		ns.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
%s
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    %s
    command: [sh, -c, "echo %[1]s > /www/index.html && exec httpd -f -p 8080 -h /www"]
    ports: [{containerPort: 8080, hostPort: %[4]d}]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
`, u.name, u.spec(), image, port))
	}
	ns.wait(t, "pods", "condition=Ready", "--all")
	requireHostPort(t, ns)
}

var hostPorts = map[int]podUsers{8090: allUsers[0], 8091: allUsers[1], 8092: allUsers[2]}

func requireHostPort(t *testing.T, ns namespace) {
	t.Helper()
	for port, u := range hostPorts {
		require.Equal(t, u.name+"\n", ns.fetch(t, fmt.Sprintf("%s:%d", harness.Gateway, port)))
	}
}

// runProbes runs a pod with probes: it is ready only after its startup probe, becomes unready by
// its readiness probe, and its container is restarted in the same sandbox by its liveness probe.
func runProbes(t *testing.T, ns namespace) {
	ns.apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  volumes: [{name: state, emptyDir: {}}]
  containers:
  - name: main
    `+image+`
    command: [sh, -c, "touch /state/ready /state/alive; exec httpd -f -p 8080 -h /state"]
    volumeMounts: [{name: state, mountPath: /state}]
    startupProbe: {exec: {command: [test, -e, /state/started]}, periodSeconds: 1, failureThreshold: 1000}
    readinessProbe: {httpGet: {path: /ready, port: 8080}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 10}
    livenessProbe: {exec: {command: [test, -e, /state/alive]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 30}
`)
	ns.wait(t, "pod/probed", "jsonpath={.status.phase}=Running")
	main := func() corev1.ContainerStatus { return ns.pods(t)[0].Status.ContainerStatuses[0] }
	require.False(t, *main().Started)
	require.False(t, main().Ready)
	ns.exec(t, "probed", "touch", "/state/started")
	ns.wait(t, "pod/probed", "condition=Ready")
	ns.exec(t, "probed", "rm", "/state/ready")
	ns.wait(t, "pod/probed", "condition=Ready=false")
	ns.exec(t, "probed", "touch", "/state/ready")
	ns.wait(t, "pod/probed", "condition=Ready")
	require.Zero(t, main().RestartCount)

	before := main()
	ns.exec(t, "probed", "rm", "/state/alive")
	ns.wait(t, "pod/probed", "jsonpath={.status.containerStatuses[0].restartCount}=1")
	ns.wait(t, "pod/probed", "condition=Ready")
	ns.wait(t, "pod/probed", "jsonpath={.status.containerStatuses[0].lastState.terminated.reason}=Error")
	require.NotEqual(t, before.ContainerID, main().ContainerID)
}
