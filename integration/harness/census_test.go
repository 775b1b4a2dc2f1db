package harness_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

func TestCensusDiff(t *testing.T) {
	before := harness.Census{"links": {"lo", "cni0"}, "leases": {"a"}, "mounts": {"same", "same"}}
	after := harness.Census{"links": {"lo", "veth1", "veth2"}, "mounts": {"same", "same"}, "shims": {"1"}}
	require.Equal(t, `leases:
  - a
links:
  - cni0
  + veth1
  + veth2
shims:
  + 1
`, before.Diff(after))
	require.Empty(t, before.Diff(before))
	require.Equal(t, "mounts:\n  + same\n", harness.Census{"mounts": {"x"}}.Diff(harness.Census{"mounts": {"x", "same"}}))
}

// TestCensusSeesEachLeak plants every kind of leak: a census that can not fail is worthless.
func TestCensusSeesEachLeak(t *testing.T) {
	n, before := start(t, harness.Config{})
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	path := func(below string) string { return filepath.Join(n.Dir(), below) }
	mkdir := func(dir string) func() {
		require.NoError(t, os.MkdirAll(dir, 0o755))
		return func() { require.NoError(t, os.RemoveAll(dir)) }
	}
	write := func(file, content string) func() {
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(content), 0o644))
		return func() { require.NoError(t, os.Remove(file)) }
	}
	mount := func(source, target, kind string, flags uintptr) func() {
		require.NoError(t, unix.Mount(source, target, kind, flags, ""))
		return func() { require.NoError(t, unix.Unmount(target, 0)) }
	}
	inNode := func(f func() error) { require.NoError(t, n.Inside(f)) }
	command := func(name string, args ...string) {
		_, err := n.Command(ctx, name, args...)
		require.NoError(t, err)
	}

	for _, tc := range []struct {
		category string
		plant    func(t *testing.T) (uproot func())
	}{
		{harness.Mounts, func(*testing.T) func() {
			return mount("tmpfs", path("logs"), "tmpfs", 0)
		}},
		{harness.NetNSMounts, func(*testing.T) func() {
			remove := write(path("logs/pin"), "")
			unmount := mount("/proc/self/ns/net", path("logs/pin"), "", unix.MS_BIND)
			return func() { unmount(); remove() }
		}},
		{harness.Links, func(*testing.T) func() {
			leaked := &netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: "ifb9"}}
			inNode(func() error { return netlink.LinkAdd(leaked) })
			return func() { inNode(func() error { return netlink.LinkDel(leaked) }) }
		}},
		{harness.IPTables, func(*testing.T) func() {
			command("iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "10.88.0.9", "-j", "MASQUERADE")
			return func() { command("iptables", "-t", "nat", "-D", "POSTROUTING", "-s", "10.88.0.9", "-j", "MASQUERADE") }
		}},
		{harness.IPAM, func(*testing.T) func() {
			return write(path("cni/ipam/"+filepath.Base(n.Dir())+"/10.88.0.99"), "id\r\neth0")
		}},
		{harness.CNICache, func(*testing.T) func() {
			return write("/var/lib/cni/results/cni-loopback-"+filepath.Base(n.Dir())+"-lo", `{"netns":"`+path("state/netns")+`"}`)
		}},
		{harness.Fifos, func(*testing.T) func() {
			require.NoError(t, unix.Mkfifo(path("state/fifo"), 0o600))
			return func() { require.NoError(t, os.Remove(path("state/fifo"))) }
		}},
		{harness.Cgroups, func(*testing.T) func() {
			pod := filepath.Join("/sys/fs/cgroup/pids", filepath.Base(n.Dir()), "poduid")
			if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
				pod = filepath.Join("/sys/fs/cgroup", filepath.Base(n.Dir()), "poduid")
			}
			require.NoError(t, os.MkdirAll(pod+"/container", 0o755))
			return func() { require.NoError(t, os.Remove(pod+"/container")) }
		}},
		{harness.SandboxDirs, func(*testing.T) func() {
			return mkdir(path("root/io.containerd.grpc.v1.cri/sandboxes/leaked"))
		}},
		{harness.Files, func(*testing.T) func() {
			return mkdir(path("state/io.containerd.runtime.v2.task/k8s.io/leaked"))
		}},
		{harness.Processes, func(t *testing.T) func() {
			cmd := exec.Command("sleep", "1000")
			cmd.Env = []string{"CNI_PATH=" + path("cni/bin")}
			require.NoError(t, cmd.Start())
			return func() {
				require.NoError(t, cmd.Process.Kill())
				_ = cmd.Wait()
			}
		}},
		{harness.Leases, func(t *testing.T) func() {
			lease, err := n.Containerd.LeasesService().Create(ctx, leases.WithID("leaked"))
			require.NoError(t, err)
			return func() { require.NoError(t, n.Containerd.LeasesService().Delete(ctx, lease)) }
		}},
		{harness.Snapshots, func(t *testing.T) func() {
			overlay := n.Containerd.SnapshotService("overlayfs")
			// Without the label, containerd would soon remove it as garbage.
			root := map[string]string{"containerd.io/gc.root": "test"}
			_, err := overlay.Prepare(ctx, "leaked", "", snapshots.WithLabels(root))
			require.NoError(t, err)
			return func() { require.NoError(t, overlay.Remove(ctx, "leaked")) }
		}},
		{harness.Containers, func(t *testing.T) func() {
			_, err := n.Containerd.ContainerService().Create(ctx, containers.Container{ID: "leaked", Runtime: containers.RuntimeInfo{Name: "x"}})
			require.NoError(t, err)
			return func() { require.NoError(t, n.Containerd.ContainerService().Delete(ctx, "leaked")) }
		}},
		{harness.Sandboxes, func(t *testing.T) func() {
			_, err := n.Containerd.SandboxStore().Create(ctx, sandbox.Sandbox{ID: "leaked", Runtime: sandbox.RuntimeOpts{Name: "x"}, Sandboxer: "x"})
			require.NoError(t, err)
			return func() { require.NoError(t, n.Containerd.SandboxStore().Delete(ctx, "leaked")) }
		}},
		{harness.Tasks, func(t *testing.T) func() { return runTask(t, n) }},
		{harness.Shims, func(t *testing.T) func() { return runTask(t, n) }},
		{harness.ShimSockets, func(t *testing.T) func() { return runTask(t, n) }},
	} {
		t.Run(tc.category, func(t *testing.T) {
			uproot := tc.plant(t)
			// A new process is visible after a moment.
			found := assert.Eventually(t, func() bool {
				after, err := n.Census(t.Context())
				return err == nil && strings.Contains("\n"+before.Diff(after), "\n"+tc.category+":\n  + ")
			}, harness.Patience(20*time.Second), 10*time.Millisecond)
			uproot()
			require.True(t, found)
			n.RequireClean(t, before)
		})
	}
}

func TestWaitCleanShowsTheDifference(t *testing.T) {
	n, before := start(t, harness.Config{})
	require.NoError(t, os.Mkdir(filepath.Join(n.Dir(), "state/leaked"), 0o755))
	log, err := os.OpenFile(filepath.Join(n.Dir(), "containerd.log"), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = log.WriteString("the reason: failed to clean up after shim disconnected\n")
	require.NoError(t, errors.Join(err, log.Close()))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err = n.WaitClean(ctx, before)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "files:\n  + state/leaked\n")
	require.ErrorContains(t, err, "\nthe reason: failed to clean up after shim disconnected")
}

// TestCloseRemovesEverything leaves a pod to Close, as a failed test does.
func TestCloseRemovesEverything(t *testing.T) {
	n, err := harness.NewNode(t.Context(), harness.Config{Daemon: harness.Stock})
	require.NoError(t, err)
	pod, err := n.RunPod(t.Context(), harness.StockHandler, n.PodConfig("left"))
	require.NoError(t, err)
	_, err = pod.StartContainer(t.Context(), "left")
	require.NoError(t, err)
	left, err := harness.Leftovers()
	require.NoError(t, err)
	require.Contains(t, strings.Join(left, "\n"), "(pause) /pause")
	immutable := filepath.Join(n.Dir(), "immutable")
	require.NoError(t, os.WriteFile(immutable, nil, 0o644))
	require.NoError(t, exec.Command("chattr", "+i", immutable).Run())

	require.NoError(t, n.Close(t.Context()))
	left, err = harness.Leftovers()
	require.NoError(t, err)
	require.Empty(t, left)
}

// runTask runs a container past CRI.
func runTask(t *testing.T, n *harness.Node) (uproot func()) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	image, err := n.Containerd.GetImage(ctx, harness.PauseImage)
	require.NoError(t, err)
	c, err := n.Containerd.NewContainer(ctx, "leaked", client.WithNewSnapshot("leaked", image), client.WithNewSpec(oci.WithImageConfig(image)))
	require.NoError(t, err)
	task, err := c.NewTask(ctx, cio.NullIO)
	require.NoError(t, err)
	return func() {
		_, err := task.Delete(ctx, client.WithProcessKill)
		require.NoError(t, err)
		require.NoError(t, c.Delete(ctx, client.WithSnapshotCleanup))
	}
}
