package integration

import (
	"fmt"
	"io"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// nsKinds are the kinds of namespaces of a pod, as in /proc/PID/ns.
var nsKinds = []string{"user", "net", "uts", "ipc", "pid", "mnt"}

// namespacesOf returns, for each of nsKinds, the namespace of a process: the "node"'s, the "pod"'s,
// which is that of pause, or its "own".
func namespacesOf(t *testing.T, n *harness.Node, pause, pid int) string {
	t.Helper()
	var whose []string
	for _, kind := range nsKinds {
		is := "own"
		switch inode(t, nsPath(pid, kind)) {
		case inode(t, nsPath(n.Pid(), kind)):
			is = "node"
		case inode(t, nsPath(pause, kind)):
			is = "pod"
		}
		whose = append(whose, kind+":"+is)
	}
	return strings.Join(whose, " ")
}

// podKinds are pods by the namespaces that they use.
var podKinds = []struct {
	name       string
	option     harness.PodOption
	pod        string // whose namespaces pause is in; "pod" are new ones
	containers string
}{
	{
		name:       "private",
		option:     func(*runtime.PodSandboxConfig) {},
		pod:        "user:pod net:pod uts:pod ipc:pod pid:pod mnt:pod",
		containers: "user:pod net:pod uts:pod ipc:pod pid:own mnt:own",
	},
	{
		name:       "host users",
		option:     harness.HostUsers(),
		pod:        "user:node net:pod uts:pod ipc:pod pid:pod mnt:pod",
		containers: "user:node net:pod uts:pod ipc:pod pid:own mnt:own",
	},
	{
		name:       "host network",
		option:     harness.HostNetwork(),
		pod:        "user:node net:node uts:node ipc:pod pid:pod mnt:pod",
		containers: "user:node net:node uts:node ipc:pod pid:own mnt:own",
	},
	{
		name:       "host network in a user namespace",
		option:     hostNetworkUserNS,
		pod:        "user:pod net:node uts:node ipc:pod pid:pod mnt:pod",
		containers: "user:pod net:node uts:node ipc:pod pid:own mnt:own",
	},
	{
		name:       "one pid namespace",
		option:     func(c *runtime.PodSandboxConfig) { nsOptions(c).Pid = runtime.NamespaceMode_POD },
		pod:        "user:pod net:pod uts:pod ipc:pod pid:pod mnt:pod",
		containers: "user:pod net:pod uts:pod ipc:pod pid:pod mnt:own",
	},
	{
		name: "pid and ipc of the node",
		option: func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			nsOptions(c).Pid, nsOptions(c).Ipc = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
		},
		pod:        "user:node net:pod uts:pod ipc:node pid:node mnt:pod",
		containers: "user:node net:pod uts:pod ipc:node pid:node mnt:own",
	},
}

func TestPodKinds(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	for _, kind := range podKinds {
		t.Run(kind.name, func(t *testing.T) {
			config := n.PodConfig("pod", kind.option)
			var ours sighting
			t.Run("pod", func(t *testing.T) {
				pod := startPod(t, n, harness.PodfsmHandler, config)
				first := startContainer(t, pod, "first")
				ours = see(t, n, pod, first)
				require.Equal(t, kind.pod, ours.podNamespaces)
				require.Equal(t, kind.containers, ours.containerNamespaces)
				requireTalk(t, pod, first)
				if onNodeNetwork(config) {
					requireOnNodeNetwork(t, n, before, pod, first)
				}
			})
			n.RequireClean(t, before)
			t.Run("stock pod", func(t *testing.T) {
				pod := startPod(t, n, harness.StockHandler, config)
				require.Equal(t, see(t, n, pod, startContainer(t, pod, "first")), ours)
			})
		})
	}
	n.RequireClean(t, before)
}

// requireTalk requires that containers of a pod communicate where they should.
func requireTalk(t *testing.T, pod *harness.Pod, first *harness.Container) {
	t.Helper()
	second := startContainer(t, pod, "second", harness.Run("httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"))
	require.Eventually(t, func() bool {
		page, err := first.Exec(t.Context(), "wget", "-qO-", "http://127.0.0.1:8080/")
		return err == nil && page == harness.IndexPage
	}, waitFor, tick)
	exec(t, first, "sh", "-c", "echo hello > /dev/shm/greeting")
	require.Equal(t, "hello\n", exec(t, second, "cat", "/dev/shm/greeting"))
	exec(t, first, "rm", "/dev/shm/greeting") // it may be the node's

	options := nsOptions(pod.Config)
	if options.GetPid() == runtime.NamespaceMode_CONTAINER {
		debug := startContainer(t, pod, "debug", func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = proto.CloneOf(options)
			c.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_TARGET
			c.Linux.SecurityContext.NamespaceOptions.TargetId = first.ID
		})
		require.Equal(t, exec(t, first, "readlink", "/proc/self/ns/pid"), exec(t, debug, "readlink", "/proc/self/ns/pid"))
	}
	if options.GetPid() == runtime.NamespaceMode_POD {
		require.Contains(t, exec(t, first, "cat", "/proc/1/cmdline"), "pause")
	}
}

// requireOnNodeNetwork requires that the pod has the network and the name of the node, and that no
// CNI plugin ran for it.
func requireOnNodeNetwork(t *testing.T, n *harness.Node, before harness.Census, pod *harness.Pod, container *harness.Container) {
	t.Helper()
	ip, err := pod.IP(t.Context())
	require.NoError(t, err)
	require.Empty(t, ip)
	hostname, err := os.Hostname()
	require.NoError(t, err)
	require.Equal(t, hostname+"\n", exec(t, container, "hostname"))
	require.Contains(t, exec(t, container, "ip", "link"), "cni0")

	resp, err := n.HTTP().Get("http://127.0.0.1:8080/")
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, harness.IndexPage, string(body))

	now, err := n.Census(t.Context())
	require.NoError(t, err)
	for _, of := range []string{harness.IPAM, harness.Links, harness.IPTables, harness.NetNSMounts} {
		require.Equal(t, before[of], now[of], of)
	}
}

// sighting is what can be seen of a pod and a container, without what differs from pod to pod.
type sighting struct {
	podNamespaces, containerNamespaces string
	cri                                string
}

func see(t *testing.T, n *harness.Node, pod *harness.Pod, container *harness.Container) sighting {
	t.Helper()
	pause, err := pod.Pid(t.Context())
	require.NoError(t, err)
	pid, err := container.Pid(t.Context())
	require.NoError(t, err)
	return sighting{
		podNamespaces:       namespacesOf(t, n, pause, pause),
		containerNamespaces: namespacesOf(t, n, pause, pid),
		cri:                 shown(t, n, pod, container),
	}
}

// shown returns what CRI shows of a pod and a container.
func shown(t *testing.T, n *harness.Node, pod *harness.Pod, container *harness.Container) string {
	t.Helper()
	podStatus, err := pod.Status(t.Context())
	require.NoError(t, err)
	containerStatus, err := container.Status(t.Context())
	require.NoError(t, err)
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: pod.ID}})
	require.NoError(t, err)
	require.Len(t, list.GetItems(), 1)
	item := list.GetItems()[0]

	require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, podStatus.GetState())
	require.Equal(t, podStatus.GetCreatedAt(), item.GetCreatedAt())
	require.Less(t, podStatus.GetCreatedAt(), containerStatus.GetCreatedAt())
	podStatus.CreatedAt, item.CreatedAt, containerStatus.CreatedAt, containerStatus.StartedAt = 0, 0, 0, 0
	require.Equal(t, pod.Handler, podStatus.GetRuntimeHandler())
	require.Equal(t, pod.Handler, item.GetRuntimeHandler())
	podStatus.RuntimeHandler, item.RuntimeHandler = "", ""
	if network := podStatus.GetNetwork(); network.GetIp() != "" {
		network.Ip = "IP"
	}
	var text strings.Builder
	for _, message := range []proto.Message{podStatus, containerStatus, item} {
		text.WriteString(prototext.MarshalOptions{Multiline: true}.Format(message))
	}
	// prototext varies its white space on purpose.
	return strings.NewReplacer(pod.ID, "POD", container.ID, "CONTAINER", "  ", " ").Replace(text.String())
}

// Handlers of podfsm with another runtime, and with another snapshotter.
const (
	crunHandler   = "podfsm-crun"
	newCrun       = "podfsm-new-crun"
	nativeHandler = "podfsm-native"
)

// crun runs Debian 12's crun 1.8 here: it knows version 1.0 of the OCI runtime specification only, while containerd writes a later
// one, and nothing of cgroup v2 beside v1.
const crun = `#!/bin/sh
for arg; do
	[ -f "$arg/config.json" ] && sed -i 's/"ociVersion":"[0-9.]*"/"ociVersion":"1.0.2"/' "$arg/config.json"
done
[ "$1" = features ] && exec cat "$(dirname "$0")/features"
exec unshare --mount sh -c 'umount /sys/fs/cgroup/unified; exec crun "$@"' crun "$@"
`

func TestOtherHandlers(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "crun"), []byte(crun), 0o755))
	crunRoot := filepath.Join(dir, "root")
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  options = {BinaryName = %q, Root = %q}
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  options = {BinaryName = "crun", Root = %q}
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  snapshotter = "native"
`, crunHandler, filepath.Join(dir, "crun"), crunRoot, newCrun, crunRoot, nativeHandler)})

	// The native snapshotter keeps the layers that the first pod has it unpack.
	first, err := n.RunPod(t.Context(), nativeHandler, n.PodConfig("first", harness.HostUsers()))
	require.NoError(t, err)
	startContainer(t, first, "main")
	require.NoError(t, first.StopAndRemove(t.Context()))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("crun", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), crunHandler, n.PodConfig("pod", harness.HostUsers()))
		require.NoError(t, err)
		container := startContainer(t, pod, "main")
		require.FileExists(t, filepath.Join(crunRoot, "k8s.io", container.ID, "status"), "crun's record of it")
		require.Equal(t, "0\n", exec(t, container, "id", "-u"))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("crun with a user namespace", func(t *testing.T) {
		// containerd makes no containers in a pod whose runtime lists no features, and crun 1.8 doesn't.
		err := failRun(t, n, crunHandler, n.PodConfig("pod"))
		require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "another runtime that knows the command features")
		n.RequireClean(t, before)

		features := `{"linux": {"namespaces": ["user", "network"], "mountExtensions": {"idmap": {"enabled": true}}}}`
		require.NoError(t, os.WriteFile(filepath.Join(dir, "features"), []byte(features), 0o644))
		pod, err := n.RunPod(t.Context(), crunHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		pid, err := pod.Pid(t.Context())
		require.NoError(t, err)
		require.Equal(t, inode(t, nsPath(pid, "user")), ownerOf(t, nsPath(pid, "net")))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoDirExists(t, filepath.Join(crunRoot, "k8s.io", pod.ID))
		n.RequireClean(t, before)
	})

	// Debian 13's lists its features.
	if osexec.CommandContext(t.Context(), "crun", "features").Run() == nil {
		t.Run("crun of today with a user namespace", func(t *testing.T) {
			pod, err := n.RunPod(t.Context(), newCrun, n.PodConfig("pod"))
			require.NoError(t, err)
			container := startContainer(t, pod, "main")
			require.FileExists(t, filepath.Join(crunRoot, "k8s.io", container.ID, "status"), "crun's record of it")
			require.Equal(t, "0\n", exec(t, container, "id", "-u"))
			pid, err := container.Pid(t.Context())
			require.NoError(t, err)
			require.Equal(t, inode(t, nsPath(pid, "user")), ownerOf(t, nsPath(pid, "net")))
			require.NoError(t, n.Restart(t.Context()))
			require.Equal(t, "0\n", exec(t, container, "id", "-u"))
			require.NoError(t, pod.StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}

	t.Run("native snapshotter", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), nativeHandler, n.PodConfig("pod", harness.HostUsers()))
		require.NoError(t, err)
		container := startContainer(t, pod, "main")
		ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
		for _, id := range []string{pod.ID, container.ID} {
			record, err := n.Containerd.ContainerService().Get(ctx, id)
			require.NoError(t, err)
			require.Equal(t, "native", record.Snapshotter)
		}
		_, err = n.Containerd.SnapshotService("native").Stat(ctx, pod.ID)
		require.NoError(t, err)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("user namespace on a snapshotter that can't map ids", func(t *testing.T) {
		err := failRun(t, n, nativeHandler, n.PodConfig("pod"))
		require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
		require.ErrorContains(t, err, `snapshotter "native" can't map ids`)
		require.ErrorContains(t, err, "overlayfs", "the remedy")
		n.RequireClean(t, before)
	})
}
