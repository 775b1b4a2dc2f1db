package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/integration/harness"
)

// forget makes podfsm and containerd forget running pods of podfsm: it deletes their records and
// the ledger.
func forget(t *testing.T, n *harness.Node, pods ...*harness.Pod) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	for _, pod := range pods {
		require.NoError(t, n.Containerd.SandboxStore().Delete(ctx, pod.ID))
	}
	require.NoError(t, n.Kill(t.Context()))
	for _, dir := range ledgerDirs(n) {
		require.NoError(t, os.RemoveAll(dir))
	}
	require.NoError(t, n.Start(t.Context()))
}

// pin mounts a network namespace: a new one, or that of the node in which the daemon runs.
func pin(t *testing.T, n *harness.Node, path string, ofNode bool) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, nil, 0o444))
	mount := func() error { return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "") }
	if ofNode {
		require.NoError(t, n.Inside(mount))
		return
	}
	mounted := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread goes with its namespace
		mounted <- errors.Join(unix.Unshare(unix.CLONE_NEWNET), mount())
	}()
	require.NoError(t, <-mounted)
}

// plant makes a leak of each kind that can be made by hand, and returns the leaks.
func plant(t *testing.T, n *harness.Node) []planted {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	var all []planted
	id := func(kind string) string {
		p := planted{kind, randomID(t)}
		all = append(all, p)
		return p.id
	}
	netns := filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/netns")
	require.NoError(t, os.MkdirAll(netns, 0o755))
	pin(t, n, filepath.Join(netns, "podfsm-"+id("netns")), false)
	require.NoError(t, os.WriteFile(filepath.Join(netns, "podfsm-"+id("netns")), nil, 0o444), "a pin without its mount")

	shm := filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/sandboxes", id("files"), "shm")
	require.NoError(t, os.MkdirAll(shm, 0o711))
	require.NoError(t, unix.Mount("shm", shm, "tmpfs", 0, ""))

	bundles := filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io")
	for _, name := range []string{id("bundle"), "." + id("bundle")} { // containerd renames bundles before it deletes them
		require.NoError(t, os.MkdirAll(filepath.Join(bundles, name, "work"), 0o711))
	}

	labels := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "now"})
	_, err := n.Containerd.SnapshotService("overlayfs").Prepare(ctx, id("snapshot"), "", labels)
	require.NoError(t, err)

	_, err = n.Containerd.LeasesService().Create(ctx, leases.WithID(id("lease")))
	require.NoError(t, err)
	record := sandbox.Sandbox{ID: id("sandbox record"), Sandboxer: "podfsm", Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}}
	_, err = n.Containerd.SandboxStore().Create(ctx, record)
	require.NoError(t, err)

	plugin := id("CNI plugin")
	survivor := osexec.Command("sleep", "600")
	groups, err := cni.GroupsOf(filepath.Join(n.Dir(), "state/io.containerd.podsandbox.controller.v1.podfsm"))
	require.NoError(t, err)
	group, err := groups.Make(plugin + ".0.0.ADD.1")
	require.NoError(t, err)
	require.NoError(t, group.Start(func(cgroupFD int) error {
		if cgroupFD >= 0 {
			survivor.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroupFD}
		}
		return survivor.Start()
	}))
	untilEnd(t, survivor)

	shim := osexec.Command("sh", "-c", inCgroupsOf, "sh", fmt.Sprint(n.Pid()))
	shim.Dir = filepath.Join(bundles, all[slices.IndexFunc(all, func(p planted) bool { return p.kind == "bundle" })].id)
	all = append(all, planted{"shim", filepath.Base(shim.Dir)})
	require.NoError(t, shim.Start())
	untilEnd(t, shim)
	return all
}

// inCgroupsOf is a shell script that runs for a long time in the cgroups of a process, as a shim
// runs in those of its daemon.
const inCgroupsOf = `
	while IFS=: read -r _ controllers path; do
		: "${controllers:=unified}"
		echo $$ >"/sys/fs/cgroup/${controllers#name=}$path/cgroup.procs"
	done <"/proc/$1/cgroup"
	exec sleep 600`

// untilEnd reaps a process, which ends with the test at the latest.
func untilEnd(t *testing.T, cmd *osexec.Cmd) {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
}

// blocked runs a pod that waits at a point. finish releases the point and returns the pod.
func blocked(t *testing.T, n *harness.Node, handler, name, point string) (finish func() *harness.Pod) {
	t.Helper()
	require.NoError(t, n.Fault(point, "1*block"))
	var pod *harness.Pod
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		pod, err = n.RunPod(t.Context(), handler, n.PodConfig(name))
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
	return func() *harness.Pod {
		require.NoError(t, n.Faults.Release(point))
		<-done
		require.NoError(t, err)
		return pod
	}
}

// removed returns the removed leaks and their kinds.
func removed(found []*podfsmv1.Leak) []*podfsmv1.Leak {
	return slices.DeleteFunc(slices.Clone(found), func(leak *podfsmv1.Leak) bool { return !leak.GetRemoved() })
}

func TestLeaks(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	found, code := leaks(t, n)
	require.Empty(t, found)
	require.Zero(t, code)

	// On the node's network: the networks of a pod without records are unknown.
	forgotten, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("forgotten", harness.HostNetwork()))
	require.NoError(t, err)
	unrecorded, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("unrecorded", harness.HostNetwork()))
	require.NoError(t, err)
	forget(t, n, forgotten, unrecorded)
	require.NoError(t, n.Containerd.ContainerService().Delete(namespaces.WithNamespace(t.Context(), "k8s.io"), unrecorded.ID))
	want := append(plant(t, n), planted{"pause container", forgotten.ID})
	for _, pod := range []*harness.Pod{forgotten, unrecorded} {
		for _, kind := range []string{"cgroup", "snapshot", "files"} {
			want = append(want, planted{kind, pod.ID})
		}
	}
	foreign := filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/netns/podfsm-by-hand")
	pin(t, n, foreign, false)
	used := randomID(t)
	usedPin := filepath.Join(filepath.Dir(foreign), "podfsm-"+used)
	pin(t, n, usedPin, true)
	want = append(want, planted{"netns", used})

	// These must never count as leaks.
	ready := startPod(t, n, harness.PodfsmHandler, n.PodConfig("ready"))
	server := startContainer(t, ready, "server")
	stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
	stockServer := startContainer(t, stock, "server")
	stopped := startPod(t, n, harness.PodfsmHandler, n.PodConfig("stopped"))
	require.NoError(t, stopped.Stop(t.Context()))
	pending := leavePending(t, n)
	finishOurs := blocked(t, n, harness.PodfsmHandler, "ours-in-flight", "capture_netns.do.after")
	finishStock := blocked(t, n, harness.StockHandler, "stock-in-flight", "bridge.ADD")
	finishADD := blocked(t, n, harness.PodfsmHandler, "add-in-flight", "portmap.ADD")

	// New resources are not leaks for half a minute.
	for deadline := time.Now().Add(2 * time.Minute); len(kinds(found)) < len(want) && time.Now().Before(deadline); {
		found, code = leaks(t, n)
	}
	require.ElementsMatch(t, want, kinds(found))
	require.Equal(t, 2, code)
	require.Empty(t, removed(found))
	table, errOut, code := cli(t, n, "leaks")
	require.Equal(t, 2, code)
	require.Contains(t, errOut, fmt.Sprintf("podfsm: %d things have leaked\n", len(found)))
	require.Contains(t, table, usedPin)
	again, _ := leaks(t, n)
	require.ElementsMatch(t, want, kinds(again), "looking changes nothing")

	found, code = leaks(t, n, "--fix")
	require.ElementsMatch(t, want, kinds(found))
	require.Equal(t, 2, code, "one is in use")
	for _, leak := range found {
		if leak.GetSandboxId() == used {
			require.False(t, leak.GetRemoved())
			require.Contains(t, leak.GetError(), fmt.Sprint(n.Pid()))
			continue
		}
		require.True(t, leak.GetRemoved(), "%v", leak)
	}
	require.NoError(t, unix.Unmount(usedPin, unix.MNT_DETACH))
	found, code = leaks(t, n, "--fix")
	require.Equal(t, []planted{{"netns", used}}, kinds(removed(found)))
	require.Zero(t, code)
	found, code = leaks(t, n)
	require.Empty(t, found)
	require.Zero(t, code)

	require.NoError(t, unix.Unmount(foreign, unix.MNT_DETACH), "the name of another tool")
	require.NoError(t, os.Remove(foreign))
	require.Equal(t, "0\n", exec(t, server, "id", "-u"))
	require.Equal(t, "0\n", exec(t, stockServer, "id", "-u"))
	pods := []*harness.Pod{ready, stock, stopped}
	for _, finish := range []func() *harness.Pod{finishOurs, finishStock, finishADD} {
		pod := finish()
		ip, err := pod.IP(t.Context())
		require.NoError(t, err)
		require.NotEmpty(t, ip)
		require.Equal(t, "0\n", exec(t, startContainer(t, pod, "late"), "id", "-u"))
		pods = append(pods, pod)
	}
	require.NoError(t, n.Heal())
	retryNow(t, n, pending)
	for _, pod := range pods {
		require.NoError(t, pod.StopAndRemove(t.Context()))
	}
	n.RequireClean(t, before)
}

// TestDaemonDown reads the ledger of a killed daemon.
func TestDaemonDown(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	ready, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("ready"))
	require.NoError(t, err)
	pending := leavePending(t, n)
	require.NoError(t, n.Fault("capture_netns.do.after", "1*block"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("half"))
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), "capture_netns.do.after", 1))
	lost := randomID(t)
	lostPin := filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/netns/podfsm-"+lost)
	pin(t, n, lostPin, false)
	row := regexp.MustCompile(`(?m)^\w{13} +default/pending +CleanupOwed->RolledBack +attach_network +\S+ .*no luck$`)
	// The kill comes between two retries. After the third try, the next one waits for four seconds.
	require.NoError(t, n.Faults.WaitReached(t.Context(), "attach_network.undo.before", 3))
	require.Eventually(t, func() bool {
		out, _, code := cli(t, n, "cleanups")
		return code == 2 && row.MatchString(out)
	}, waitFor, tick)
	require.NoError(t, n.Kill(t.Context()))
	<-ended
	disk := filesOf(t, n.Dir())

	t.Run("cleanups", func(t *testing.T) {
		out, errOut, code := cli(t, n, "cleanups")
		require.Equal(t, 2, code)
		require.Contains(t, errOut, "nothing listens on "+n.Socket())
		require.Regexp(t, `the daemon is down; this is its ledger, last written \S+ ago`, errOut)
		require.Regexp(t, row, out)
		require.NotContains(t, out, "default/ready")
		require.NotContains(t, out, "default/half")
	})
	t.Run("leaks", func(t *testing.T) {
		found, code := leaks(t, n)
		require.Equal(t, []planted{{"netns", lost}}, kinds(found))
		require.Equal(t, 2, code)
		_, errOut, code := cli(t, n, "leaks", "--fix")
		require.Equal(t, 3, code)
		require.Contains(t, errOut, "start it and try again")
	})
	t.Run("ps and describe", func(t *testing.T) {
		out, _, code := cli(t, n, "ps")
		require.Zero(t, code)
		require.Regexp(t, `(?m)^\w{13} +default/ready +Ready +\S+ +- +10\.88\.`, out)
		require.Regexp(t, `(?m)^\w{13} +default/half +PauseStarted +\S+ +capture_netns`, out)
		out, _, code = cli(t, n, "describe", "ready")
		require.Zero(t, code)
		require.Contains(t, out, ready.ID)
		_, errOut, code := cli(t, n, "describe", "nobody")
		require.Equal(t, 4, code)
		require.Contains(t, errOut, `no sandbox of podfsm matches "nobody"`)
	})
	require.Equal(t, disk, filesOf(t, n.Dir()), "looking changes nothing")

	t.Run("a daemon that doesn't serve holds the ledger", func(t *testing.T) {
		require.NoError(t, n.Start(t.Context()))
		require.NoError(t, n.Faults.Release("capture_netns.do.after"))
		out, errOut, code := cli(t, n, "--address", filepath.Join(n.Dir(), "another.sock"), "cleanups")
		require.Equal(t, 2, code)
		require.Contains(t, out, pending[:13])
		require.Contains(t, errOut, "no socket at")
		require.Contains(t, errOut, "a daemon has the ledger")
	})
	found, code := leaks(t, n, "--fix")
	require.Equal(t, []planted{{"netns", lost}}, kinds(removed(found)))
	require.Zero(t, code)
	require.NoError(t, n.Heal())
	retryNow(t, n, pending)
	require.NoError(t, ready.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// filesOf returns the files and directories below dir with their times and sizes, without those of
// faults and images.
func filesOf(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains([]string{"rootfs", "faults", "snapshots"}, entry.Name()) {
			return filepath.SkipDir
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&all, path, info.Mode(), info.Size(), info.ModTime())
		return nil
	}))
	return all.String()
}
