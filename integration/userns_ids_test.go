package integration

import (
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// Pods never get ids of the node's root and system users. An option also excludes those of its
// human users.
func TestLowestHostID(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	requireRefused(t, n, n.PodConfig("below", harness.UserNS(999, 65536)), codes.InvalidArgument, `pod "default/below"`, "choose a range within 1000 to")
	stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock", harness.UserNS(500, 65536)))
	requireRefused(t, n, n.PodConfig("thief", harness.UserNS(1000, 65536)), codes.InvalidArgument, `pod "default/stock"`)
	require.NoError(t, stock.StopAndRemove(t.Context()))
	pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("lowest", harness.UserNS(1000, 65536)))
	require.EqualValues(t, 1000, hostUID(t, n, pod))

	n = harness.StartNode(t, harness.Config{TOML: "[plugins.'io.containerd.podsandbox.controller.v1.podfsm']\nuserns_min_host_id = 65536"})
	requireRefused(t, n, n.PodConfig("below", harness.UserNS(65535, 65536)), codes.InvalidArgument, "choose a range within 65536 to")
	runOnce(t, n, n.PodConfig("lowest", harness.UserNS(65536, 65536)))
}

func TestIDRangesAreApart(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	const first = 500 << 16
	ids := func(from, length uint32) harness.PodOption { return harness.UserNS(first+from, length) }

	t.Run("while a pod runs, only its own attempts get its ids", func(t *testing.T) {
		holder := startPod(t, n, harness.PodfsmHandler, n.PodConfig("holder", ids(0, 65536)))
		for _, tc := range []struct {
			name  string
			other harness.PodOption
		}{
			{"the same", ids(0, 65536)},
			{"the end", ids(65535, 65536)},
			{"the middle", ids(1000, 1)},
			{"all of them", harness.UserNS(65536, 1<<31)},
		} {
			t.Run(tc.name, func(t *testing.T) {
				requireRefused(t, n, n.PodConfig("thief", tc.other), codes.InvalidArgument, `pod "default/thief"`, `pod "default/holder" (sandbox "k8s.io/`+holder.ID)
			})
		}
		now, err := n.Census(t.Context())
		require.NoError(t, err)
		require.Len(t, now[harness.HostIDs], 1, "a census that can't see a holder would be worthless")
		beside := startPod(t, n, harness.PodfsmHandler, n.PodConfig("beside", ids(65536, 65536)))
		require.Equal(t, uint32(first+65536), hostUID(t, n, beside))
		again := startPod(t, n, harness.PodfsmHandler, n.PodConfig("holder", attempt(1), ids(0, 65536)))
		require.Equal(t, hostUID(t, n, holder), hostUID(t, n, again))

		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		requireRefused(t, n, n.PodConfig("thief", ids(0, 65536)), codes.InvalidArgument, `pod "default/holder"`)
	})
	n.RequireClean(t, before)

	t.Run("also while a cleanup is pending", func(t *testing.T) {
		config := n.PodConfig("pending", ids(0, 65536))
		require.NoError(t, n.Fault("declare_ready.do.before", "1*error(not ready)"))
		require.NoError(t, n.Fault("remap_snapshot.undo.before", "error(injected)"))
		require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, config), "the cleanup is pending")
		for range 2 {
			requireRefused(t, n, n.PodConfig("thief", ids(0, 65536)), codes.InvalidArgument, `pod "default/pending"`)
			require.NoError(t, n.Kill(t.Context()))
			require.NoError(t, n.Start(t.Context()))
		}
		next := startPod(t, n, harness.PodfsmHandler, n.PodConfig("pending", attempt(1), ids(0, 65536)))
		require.Equal(t, uint32(first), hostUID(t, n, next))
		require.NoError(t, n.Heal())
	})
	n.RequireClean(t, before)
	runOnce(t, n, n.PodConfig("thief", ids(0, 65536)))

	t.Run("a stopped pod has lost its ids", func(t *testing.T) {
		stopped := startPod(t, n, harness.PodfsmHandler, n.PodConfig("stopped", ids(0, 65536)))
		require.NoError(t, stopped.Stop(t.Context()))
		next := startPod(t, n, harness.PodfsmHandler, n.PodConfig("next", ids(0, 65536)))
		require.Equal(t, uint32(first), hostUID(t, n, next))
	})
	n.RequireClean(t, before)

	t.Run("unless a process has them", func(t *testing.T) {
		stopped := startPod(t, n, harness.PodfsmHandler, n.PodConfig("stopped", ids(0, 65536)))
		require.NoError(t, stopped.Stop(t.Context()))
		end := processWith(t, first, 65536)
		requireRefused(t, n, n.PodConfig("next", ids(0, 65536)), codes.InvalidArgument, `pod "default/stopped"`)
		end()
		runOnce(t, n, n.PodConfig("next", ids(0, 65536)))
	})
	n.RequireClean(t, before)

	t.Run("pods of another controller keep others off theirs", func(t *testing.T) {
		stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock", ids(0, 65536)))
		thief := n.PodConfig("thief", ids(0, 65536))
		requireRefused(t, n, thief, codes.InvalidArgument, `pod "default/stock"`)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		requireRefused(t, n, thief, codes.InvalidArgument, `pod "default/stock" (sandbox "k8s.io/`+stock.ID)
		require.NoError(t, stock.Stop(t.Context()))
		runOnce(t, n, thief)
		require.NoError(t, stock.Remove(t.Context()))
		runOnce(t, n, thief)

		// Stock containerd does not check for overlaps.
		for _, name := range []string{"stock-a", "stock-b"} {
			startPod(t, n, harness.StockHandler, n.PodConfig(name, ids(0, 65536)))
		}
		requireRefused(t, n, thief, codes.InvalidArgument, `pod "default/stock-`)
	})
	n.RequireClean(t, before)
}

// processWith runs a process of the machine in a user namespace until end is called.
func processWith(t *testing.T, hostID, length int) (end func()) {
	t.Helper()
	mapping := []syscall.SysProcIDMap{{ContainerID: 0, HostID: hostID, Size: length}}
	cmd := osexec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: mapping, GidMappings: mapping}
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ended := false
	end = func() {
		if !ended {
			ended = true
			stdin.Close()
			require.NoError(t, cmd.Wait())
		}
	}
	t.Cleanup(end)
	return end
}

func TestAutoUserNS(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, TOML: usernsTOML(`mode = "auto"`, poolOf(3))})
	const first = 1000013824
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	config := func(name string, options ...harness.PodOption) *runtime.PodSandboxConfig {
		return n.PodConfig(name, append([]harness.PodOption{harness.HostUsers()}, options...)...)
	}

	t.Run("pods", func(t *testing.T) {
		a := startPod(t, n, harness.PodfsmHandler, config("a"))
		b := startPod(t, n, harness.PodfsmHandler, config("b"))
		unset := startPod(t, n, harness.PodfsmHandler, config("unset", func(c *runtime.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = nil
		}))
		pods := []*harness.Pod{a, b, unset}
		given := map[uint32]bool{}
		for _, pod := range pods {
			uid := hostUID(t, n, pod)
			require.GreaterOrEqual(t, uid, uint32(first))
			require.Zero(t, (uid-first)%65536)
			given[uid] = true
		}
		require.Len(t, given, 3, "each has its own")
		requireRefused(t, n, config("d"), codes.ResourceExhausted, "of 3 ranges, 3 are held, 0 are in quarantine")
		requireRefused(t, n, n.PodConfig("thief", harness.UserNS(first+1, 65536)), codes.InvalidArgument, `pod "default/`)
		asked := startPod(t, n, harness.PodfsmHandler, n.PodConfig("asked"))
		require.Less(t, hostUID(t, n, asked), uint32(first), "a requested range is granted")

		uid := hostUID(t, n, a)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		require.Equal(t, uid, hostUID(t, n, a))
		requireRefused(t, n, config("d"), codes.ResourceExhausted, "3 are held")

		require.NoError(t, a.Stop(t.Context()))
		requireRefused(t, n, config("d"), codes.ResourceExhausted, "3 are held")
		end := processWith(t, int(uid)+7, 1)
		require.NoError(t, a.Remove(t.Context()))
		requireRefused(t, n, config("d"), codes.ResourceExhausted, "2 are held, 1 are in quarantine")
		seen, err := n.Sandboxes().IDs(t.Context(), &podfsmv1.IDsRequest{})
		require.NoError(t, err)
		require.Equal(t, []uint32{3, 2, 0}, []uint32{seen.GetPool().GetRanges(), seen.GetPool().GetHeld(), seen.GetPool().GetFree()})
		require.Len(t, seen.GetPool().GetQuarantine(), 1)
		require.Regexp(t, `^process \d+ \(cat\)$`, seen.GetPool().GetQuarantine()[0].GetUsedBy())
		require.Len(t, seen.GetHolders(), 3)
		require.Equal(t, "request", seen.GetHolders()[0].GetOrigin())
		require.Equal(t, asked.ID, seen.GetHolders()[0].GetSandboxId())
		require.Equal(t, "auto", seen.GetHolders()[1].GetOrigin())
		require.Contains(t, seen.GetRefusals()[len(seen.GetRefusals())-1].GetReason(), "1 are in quarantine")
		end()
		d := startPod(t, n, harness.PodfsmHandler, config("d"))
		require.Equal(t, uid, hostUID(t, n, d))
	})
	n.RequireClean(t, before)

	t.Run("what can't be mapped is refused", func(t *testing.T) {
		for _, tc := range []struct {
			name   string
			option harness.PodOption
		}{
			{"is privileged", func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }},
			{"shares the node's network", harness.HostNetwork()},
			{"shares the node's pid namespace", func(c *runtime.PodSandboxConfig) { options(c).Pid = runtime.NamespaceMode_NODE }},
			{"shares the node's ipc namespace", func(c *runtime.PodSandboxConfig) { options(c).Ipc = runtime.NamespaceMode_NODE }},
		} {
			requireRefused(t, n, config("pod", tc.option), codes.InvalidArgument, `pod "default/pod"`, tc.name, `unmappable = "host"`)
		}
	})
	n.RequireClean(t, before)

	// containerd copies annotations to labels of snapshots: those of pods for pause, those of
	// images for their layers.
	t.Run("no annotation keeps ranges in quarantine", func(t *testing.T) {
		claim := map[string]string{
			snapshots.LabelSnapshotUIDMapping: fmt.Sprintf("0:%d:%d", first, 3*65536),
			snapshots.LabelSnapshotGIDMapping: fmt.Sprintf("0:%d:%d", first, 3*65536),
		}
		liar := startPod(t, n, harness.StockHandler, config("liar", func(c *runtime.PodSandboxConfig) { c.Annotations = claim }))
		ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
		overlay := n.Containerd.SnapshotService("overlayfs")
		pause, err := overlay.Stat(ctx, liar.ID)
		require.NoError(t, err)
		require.Equal(t, claim[snapshots.LabelSnapshotUIDMapping], pause.Labels[snapshots.LabelSnapshotUIDMapping], "it lies")
		label := func(labels map[string]string) {
			overlay := n.Containerd.SnapshotService("overlayfs")
			info := snapshots.Info{Name: pause.Parent, Labels: labels}
			_, err := overlay.Update(ctx, info, "labels."+snapshots.LabelSnapshotUIDMapping, "labels."+snapshots.LabelSnapshotGIDMapping)
			require.NoError(t, err)
		}
		label(claim)
		defer label(nil)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context())) // starts with all ranges in quarantine
		for _, name := range []string{"first", "second"} {
			startPod(t, n, harness.PodfsmHandler, config(name))
		}

		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		overlay = n.Containerd.SnapshotService("overlayfs")
		key := randomID(t) // what was made for a container that isn't there yet, or was left of one
		_, err = overlay.Prepare(ctx, key, pause.Parent, snapshots.WithLabels(claim), snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "now"}))
		require.NoError(t, err)
		requireRefused(t, n, config("third"), codes.ResourceExhausted, "2 are held, 1 are in quarantine")
		require.NoError(t, overlay.Remove(ctx, key))
		startPod(t, n, harness.PodfsmHandler, config("third"))
	})
	n.RequireClean(t, before)

	// Last, because a pod whose network is not recorded any more can not be detached.
	for _, lost := range []string{"state", "root"} { // first the log of the steps, then the durable log, too
		t.Run("the ledger's "+lost+" is lost", func(t *testing.T) {
			a := startPod(t, n, harness.PodfsmHandler, config("a"))
			uid := hostUID(t, n, a)
			require.NoError(t, n.Kill(t.Context()))
			require.NoError(t, os.RemoveAll(filepath.Join(n.Dir(), "state", "io.containerd.podsandbox.controller.v1.podfsm")))
			require.NoError(t, os.RemoveAll(filepath.Join(n.Dir(), lost, "io.containerd.podsandbox.controller.v1.podfsm")))
			require.NoError(t, n.Start(t.Context()))
			for _, name := range []string{"b", "c"} {
				require.NotEqual(t, uid, hostUID(t, n, startPod(t, n, harness.PodfsmHandler, config(name))))
			}
			requireRefused(t, n, config("d"), codes.ResourceExhausted, "of 3 ranges")
			requireRefused(t, n, n.PodConfig("thief", harness.UserNS(uid, 65536)), codes.InvalidArgument, `which pod "default/a"`)
		})
		if lost == "state" {
			n.RequireClean(t, before)
		}
	}
}

// TestKillsWithRangesOfThePool kills containerd around the steps that allocate and free a range.
func TestKillsWithRangesOfThePool(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, TOML: usernsTOML(`mode = "auto"`, poolOf(2))})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	config := n.PodConfig("pod", harness.HostUsers())
	for _, point := range []string{
		"allocate_ids.do.before", "allocate_ids.do.after", "remap_snapshot.do.after", "start_pause.do.after",
		"remap_snapshot.undo.after", "allocate_ids.undo.before", "allocate_ids.undo.after",
	} {
		t.Run(point, func(t *testing.T) {
			if strings.Contains(point, ".undo.") {
				pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
				require.NoError(t, err)
				require.NoError(t, n.Fault(point, "1*die"))
				require.Error(t, pod.StopAndRemove(t.Context()))
			} else {
				require.NoError(t, n.Fault(point, "1*die"))
				failRun(t, n, harness.PodfsmHandler, config)
			}
			require.NoError(t, n.Kill(t.Context())) // reaps the killed daemon
			require.NoError(t, n.Start(t.Context()))
			removePods(t, n)
			n.RequireClean(t, before)
			seen, err := n.Sandboxes().IDs(t.Context(), &podfsmv1.IDsRequest{})
			require.NoError(t, err)
			require.EqualValues(t, 2, seen.GetPool().GetFree(), "%v", seen.GetPool().GetQuarantine())
		})
	}
}

func options(c *runtime.PodSandboxConfig) *runtime.NamespaceOption {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

func TestNodeUserNS(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: usernsTOML(`mode = "node"
unmappable = "host"
node_wide_uid_mapping = { container_id = 0, host_id = 2000000000, size = 131072 }
node_wide_gid_mapping = { container_id = 0, host_id = 2100000000, size = 131072 }`, "")})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("pods", func(t *testing.T) {
		for _, name := range []string{"a", "b"} {
			pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig(name, harness.HostUsers()))
			sandbox := inspect(t, n, pod.ID).GetSandbox()
			require.Equal(t, `uids:{host_id:2000000000 length:131072} gids:{host_id:2100000000 length:131072}`,
				strings.ReplaceAll(sandbox.GetUserns().String(), "  ", " "))
			pid, err := pod.Pid(t.Context())
			require.NoError(t, err)
			content, err := os.ReadFile(fmt.Sprintf("/proc/%d/gid_map", pid))
			require.NoError(t, err)
			require.Equal(t, []string{"0", "2100000000", "131072"}, strings.Fields(string(content)))
		}
		requireRefused(t, n, n.PodConfig("thief", harness.UserNS(2000131071, 65536)), codes.InvalidArgument, `which pod "default/`)
		require.NotZero(t, hostUID(t, n, startPod(t, n, harness.PodfsmHandler, n.PodConfig("asked"))))
		require.Zero(t, hostUID(t, n, startPod(t, n, harness.PodfsmHandler, n.PodConfig("on-host", harness.HostNetwork()))))
	})
	n.RequireClean(t, before)
}
