package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// addContainer adds containerd's record of a container.
func (a *answers) addContainer(name string, n *harness.Node, c *harness.Container) {
	a.t.Helper()
	a.own(c.ID, strings.ToUpper(name))
	ctx := namespaces.WithNamespace(a.t.Context(), "k8s.io")
	record, err := n.Containerd.ContainerService().Get(ctx, c.ID)
	require.NoError(a.t, err)
	a.add(name+" spec", record.Spec.GetValue())
	for label, value := range record.Labels {
		a.facts[name+" label "+label] = value
	}
}

// containersOf runs every kind of container in a pod, as the kubelet does.
func containersOf(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) facts {
	t.Helper()
	a := &answers{facts: facts{}, t: t}
	a.own(n.Dir(), "NODE")
	pod, err := n.RunPod(t.Context(), handler, config)
	require.NoError(t, err)
	a.own(pod.ID, "POD")
	ip, err := pod.IP(t.Context())
	require.NoError(t, err)
	a.own(ip, "IP")
	say := func(name string, c *harness.Container, command ...string) {
		t.Helper()
		out, err := c.Exec(t.Context(), command...)
		require.NoError(t, err)
		a.facts[name] = out
	}

	// One that prepares, and ends before the next begins.
	first := startContainer(t, pod, "init", harness.Run("sh", "-c", "echo prepared; exit 0"))
	a.addContainer("init", n, first)
	require.Zero(t, waitExit(t, first))
	status, err := n.Runtime.ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: first.ID})
	a.note("init", status, err)

	// The main one, with an image for a volume.
	main := startContainer(t, pod, "main", func(c *runtime.ContainerConfig) {
		mount := &runtime.Mount{ContainerPath: "/volume", Readonly: true, Image: &runtime.ImageSpec{Image: harness.BusyboxImage}}
		if users := nsOptions(config).GetUsernsOptions(); users.GetMode() == runtime.NamespaceMode_POD {
			mount.UidMappings, mount.GidMappings = users.GetUids(), users.GetGids()
		}
		c.Mounts = append(c.Mounts, mount)
	})
	a.addContainer("main", n, main)
	a.addProcesses(n, pod, main)
	say("volume", main, "sh", "-c", "cat /volume/www/index.html; stat -c %u:%g /volume/bin/busybox")
	say("hostname", main, "hostname")
	say("hosts", main, "cat", "/etc/hosts")
	say("resolv.conf", main, "cat", "/etc/resolv.conf")
	say("shm", main, "sh", "-c", "echo x > /dev/shm/x && stat -c %a /dev/shm")

	// It dies and is started again, as its next attempt.
	require.NoError(t, main.Stop(t.Context(), 0))
	status, err = n.Runtime.ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: main.ID})
	a.note("stopped", status, err)
	require.NoError(t, main.Remove(t.Context()))
	again := startContainer(t, pod, "main", func(c *runtime.ContainerConfig) { c.Metadata.Attempt = 1 })
	a.addContainer("again", n, again)
	say("shm again", again, "cat", "/dev/shm/x")

	// One that looks into another.
	debug := startContainer(t, pod, "debug", func(c *runtime.ContainerConfig) {
		if options := c.Linux.SecurityContext.NamespaceOptions; options.GetPid() == runtime.NamespaceMode_CONTAINER {
			c.Linux.SecurityContext.NamespaceOptions = &runtime.NamespaceOption{
				Network: options.GetNetwork(), Ipc: options.GetIpc(), UsernsOptions: options.GetUsernsOptions(),
				Pid: runtime.NamespaceMode_TARGET, TargetId: again.ID,
			}
		}
	})
	a.addContainer("debug", n, debug)
	if nsOptions(config).GetPid() != runtime.NamespaceMode_NODE { // where it would see all of the machine
		say("debug sees", debug, "sh", "-c", "ps -o args | grep -c '^tail -f'")
	}

	_, err = n.Runtime.CheckpointContainer(t.Context(), &runtime.CheckpointContainerRequest{ContainerId: again.ID, Location: n.Dir() + "/checkpoint.tar"})
	a.note("checkpoint", &runtime.CheckpointContainerResponse{}, err)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	return a.normal()
}

// hardened reports whether podfsm's pause differs from runc's by having less: no capability, not
// even to gain, no unneeded mount, and no write, device, setuid program or executable that runc's
// pause lacks.
func hardened(path, stock, ours string) bool {
	switch _, mount := strings.CutPrefix(path, "pause mount "); {
	case path == "pause CapBnd":
		return ours == "0000000000000000"
	case !mount:
		return false
	case ours == "":
		return true
	}
	options, filesystem, _ := strings.Cut(ours, " ")
	before, same, _ := strings.Cut(stock, " ")
	for _, restriction := range []string{"ro", "nosuid", "nodev", "noexec"} {
		if slices.Contains(strings.Split(before, ","), restriction) && !slices.Contains(strings.Split(options, ","), restriction) {
			return false
		}
	}
	return filesystem == same
}

// Containers in a podfsm pod are made like in a stock pod, whatever they share, and pause is at
// least as hardened as runc's.
func TestContainersLikeStock(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{TOML: specConfig})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	// containerd keeps this directory once there was an image for a volume.
	require.NoError(t, os.MkdirAll(filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/image-volumes"), 0o755))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, tc := range []struct {
		name  string
		shape harness.PodOption
	}{
		{"userns", func(c *runtime.PodSandboxConfig) {
			c.Annotations = map[string]string{"example.com/class": "fast", "other.com/class": "slow"}
		}},
		{"shared pid", func(c *runtime.PodSandboxConfig) { nsOptions(c).Pid = runtime.NamespaceMode_POD }},
		{"the node's pid", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			nsOptions(c).Pid = runtime.NamespaceMode_NODE
		}},
		{"the node's ipc", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			nsOptions(c).Ipc = runtime.NamespaceMode_NODE
		}},
		{"the node's network", harness.HostNetwork()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config := n.PodConfig("pod", tc.shape)
			stock, ours := containersOf(t, n, harness.StockHandler, config), containersOf(t, n, harness.PodfsmHandler, config)
			require.Greater(t, len(stock), 500)
			for path, values := range stock.diff(ours) {
				if !hardened(path, values[0], values[1]) {
					t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
				}
			}
		})
	}
	n.RequireClean(t, before)
}
