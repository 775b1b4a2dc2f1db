// Package node has the tests that the lab runs on its machines. They act as a kubelet on the
// containerd of systemd, and examine what is left. Each test is a part of a scenario and runs in
// its own process; files carry the state from one test to the next.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/continuity"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

const (
	stateDir  = "/run/containerd"       // of containerd, with its socket
	podsFile  = "/var/lib/lab/pods"     // the pods that should run
	usualFile = "/var/lib/lab/usual"    // how long containerd's start took on the new node
	podSlice  = "containerd.slice"      // of harness.Attach, with the systemd driver
	ipamDir   = "/var/lib/cni/networks" // of host-local
)

// These tests run on the machines of the lab only.
func TestMain(m *testing.M) {
	if os.Getenv("PODFSM_PREBUILT") != "" {
		os.Exit(m.Run())
	}
}

// kind is a way to run a pod.
type kind struct {
	name, handler string
	option        harness.PodOption
}

var asItIs harness.PodOption = func(*runtime.PodSandboxConfig) {}

// kinds are podfsm's pods of each user mode and network. The last one has a snapshot with remapped
// owners.
var kinds = []kind{
	{"kubelet", "podfsm", asItIs},
	{"auto", "podfsm-auto", harness.HostUsers()},
	{"node", "podfsm-node", harness.HostUsers()},
	{"host-users", "podfsm", harness.HostUsers()},
	{"host-net", "podfsm", harness.HostNetwork()},
	{"remap", "podfsm-remap", asItIs},
}

// stockKinds are pods of containerd's own controller.
var stockKinds = []kind{
	{"stock", "runc", asItIs},
	{"host-stock", "runc", harness.HostUsers()},
}

// pod is the state of a running pod.
type pod struct {
	ID, Container string
	Pid           int // of pause
	IP            string
}

func attach(t *testing.T) *harness.Node {
	t.Helper()
	n, err := harness.Attach(t.Context(), stateDir)
	require.NoError(t, err)
	return n
}

// attachNew is attach on a node where nothing has failed yet. It saves how long containerd's start took.
func attachNew(t *testing.T) *harness.Node {
	t.Helper()
	if _, err := os.Stat(usualFile); err != nil {
		save(t, usualFile, startDuration(t))
	}
	return attach(t)
}

// save writes a file that survives a power cut.
func save(t *testing.T, file string, value any) {
	t.Helper()
	text, err := json.Marshal(value)
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(t, continuity.AtomicWriteFile(file, text, 0o644))
}

func load[T any](t *testing.T, file string) (value T) {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &value))
	return value
}

func readPods(t *testing.T) map[string]pod {
	t.Helper()
	return load[map[string]pod](t, podsFile)
}

// cgroup returns the cgroup of a process in the hierarchy of systemd: v2, or the named one of v1.
func cgroup(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	require.NoError(t, err)
	for _, hierarchy := range []string{":name=systemd:", "0::"} {
		if _, path, ok := strings.Cut(string(text), hierarchy); ok {
			path, _, _ = strings.Cut(path, "\n")
			return path
		}
	}
	t.Fatalf("systemd has no hierarchy: %s", text)
	return ""
}

// TestRun runs a pod of each kind, with a container.
func TestRun(t *testing.T) { runPods(t, kinds) }

// TestRunStock runs pods of containerd's own controller, with or without podfsm.
func TestRunStock(t *testing.T) { runPods(t, stockKinds) }

func runPods(t *testing.T, kinds []kind) {
	n := attachNew(t)
	pods := map[string]pod{}
	if _, err := os.Stat(podsFile); err == nil {
		pods = readPods(t)
	}
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) { pods[kind.name] = runPod(t, n, kind) })
	}
	save(t, podsFile, pods)
}

func runPod(t *testing.T, n *harness.Node, kind kind) pod {
	config := n.PodConfig(kind.name, kind.option)
	p, err := n.RunPod(t.Context(), kind.handler, config)
	require.NoError(t, err)
	// A shutdown waits for processes that ignore SIGTERM.
	c, err := p.StartContainer(t.Context(), "main", harness.Run("sh", "-c", "trap 'exit 0' TERM; sleep 1000000 & wait"))
	require.NoError(t, err)
	out, err := c.Exec(t.Context(), "cat", "/proc/self/uid_map")
	require.NoError(t, err)
	own := strings.Fields(out)[1] != "0"
	require.Equal(t, !strings.HasPrefix(kind.name, "host-"), own, "uid_map: %s", out)
	owner, err := c.Exec(t.Context(), "stat", "-c", "%u", "/bin/busybox")
	require.NoError(t, err)
	require.Equal(t, "0\n", owner, "the image's files have the pod's owners")

	pid, err := p.Pid(t.Context())
	require.NoError(t, err)
	ip, err := p.IP(t.Context())
	require.NoError(t, err)
	requireCgroups(t, config.GetLinux().GetCgroupParent(), pid, c)
	profile, err := c.Exec(t.Context(), "cat", "/proc/1/attr/current")
	require.NoError(t, err)
	require.Equal(t, "cri-containerd.apparmor.d (enforce)\n", profile)
	return pod{ID: p.ID, Container: c.ID, Pid: pid, IP: ip}
}

// requireCgroups requires that pause and the container are in the cgroups of a runtime with the
// driver of the kubelet.
func requireCgroups(t *testing.T, parent string, pause int, c *harness.Container) {
	inPod := cgroup(t, pause)
	main, err := c.Pid(t.Context())
	require.NoError(t, err)
	require.Equal(t, filepath.Dir(inPod), filepath.Dir(cgroup(t, main)))
	if os.Getenv("PODFSM_CGROUPS") == "slices" { // such a cgroup is below the daemon's, on v2 beside that
		require.Contains(t, inPod, filepath.Base(parent)+":cri-containerd:")
		return
	}
	require.True(t, strings.HasPrefix(inPod, parent+"/"), inPod)
	require.Equal(t, strings.HasSuffix(parent, ".slice"), strings.HasSuffix(inPod, ".scope"), inPod)
	if strings.HasSuffix(inPod, ".scope") { // podfsm uses this file to see whether systemd has removed the scope
		require.FileExists(t, filepath.Join("/run/systemd/transient", filepath.Base(inPod)))
	}
}

// TestStillRun requires that the pods of TestRun and TestRunStock are unchanged: a newly started
// containerd has adopted them.
func TestStillRun(t *testing.T) { requirePods(t, readPods(t)) }

// TestStockStillRuns requires that the pods of TestRunStock are unchanged after podfsm and its pods
// have gone.
func TestStockStillRuns(t *testing.T) {
	pods := readPods(t)
	maps.DeleteFunc(pods, func(name string, _ pod) bool {
		return !slices.ContainsFunc(stockKinds, func(kind kind) bool { return kind.name == name })
	})
	require.Len(t, pods, len(stockKinds))
	requirePods(t, pods)
}

func requirePods(t *testing.T, pods map[string]pod) {
	t.Helper()
	n := attach(t)
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		was := pods[name]
		t.Run(name, func(t *testing.T) {
			p := n.FindPod(was.ID, nil)
			status, err := p.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
			require.Equal(t, was.IP, status.GetNetwork().GetIp())
			pid, err := p.Pid(t.Context())
			require.NoError(t, err)
			require.Equal(t, was.Pid, pid)
			resp, err := n.Runtime.ExecSync(t.Context(), &runtime.ExecSyncRequest{ContainerId: was.Container, Cmd: []string{"true"}})
			require.NoError(t, err)
			require.Zero(t, resp.GetExitCode())
		})
	}
}

// TestExitsAfterAKill kills the pause of one pod and the container of another, both started by an earlier
// daemon, and requires that both exits are reported. The exit code of the container is known. That
// of pause is not: only its parent could know it, and the parent has ended.
func TestExitsAfterAKill(t *testing.T) {
	n := attach(t)
	pods := readPods(t)
	require.NoError(t, unix.Kill(pods["host-users"].Pid, unix.SIGKILL))
	require.Eventually(t, func() bool {
		status, err := n.FindPod(pods["host-users"].ID, nil).Status(t.Context())
		return err == nil && status.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY
	}, harness.Patience(10*time.Second), 100*time.Millisecond)

	_, err := n.Runtime.StopContainer(t.Context(), &runtime.StopContainerRequest{ContainerId: pods["kubelet"].Container})
	require.NoError(t, err)
	status, err := n.Runtime.ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: pods["kubelet"].Container})
	require.NoError(t, err)
	require.Equal(t, runtime.ContainerState_CONTAINER_EXITED, status.GetStatus().GetState())
	require.EqualValues(t, 137, status.GetStatus().GetExitCode())
}

// TestNoneReady requires after a reboot that no pod is ready, and that podfsm reports their end.
// containerd must have started at the first try and within its usual time.
func TestNoneReady(t *testing.T) {
	list, err := attach(t).Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	for _, p := range list.GetItems() {
		require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, p.GetState(), "pod %s", p.GetMetadata().GetName())
	}
	require.Equal(t, "0", property(t, "NRestarts"))
	took := startDuration(t)
	usual := load[time.Duration](t, usualFile)
	t.Logf("%d pods are listed, containerd was up after %v, on the new node after %v", len(list.GetItems()), took, usual)
	require.Less(t, took, 2*usual+harness.Patience(time.Second)) // other services start at the same time

	for _, command := range []string{"ps --all", "ids", "doctor"} { // the history, the ledger and the node
		out, err := exec.CommandContext(t.Context(), "podfsm", strings.Fields(command)...).CombinedOutput()
		require.NoError(t, err, "podfsm %s: %s", command, out)
		require.NotContains(t, string(out), "damaged")
	}
}

// property returns a property of containerd.service.
func property(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "systemctl", "show", "--property", name, "--value", "containerd").Output()
	require.NoError(t, err)
	return strings.TrimSpace(string(out))
}

// startDuration returns how long the start of containerd took, from monotonic times in microseconds
// (org.freedesktop.systemd1(5)).
func startDuration(t *testing.T) time.Duration {
	t.Helper()
	var times [2]int64
	for i, name := range []string{"ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic"} {
		var err error
		times[i], err = strconv.ParseInt(property(t, name), 10, 64)
		require.NoError(t, err)
	}
	return time.Duration(times[1]-times[0]) * time.Microsecond
}

// TestRemoveAll removes all pods as the kubelet does, and requires that nothing is left.
func TestRemoveAll(t *testing.T) {
	n := attach(t)
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience(30*time.Second))
	defer cancel()
	for err := removeAll(ctx, n); err != nil; err = removeAll(ctx, n) {
		t.Logf("trying again: %v", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			require.NoError(t, err)
		}
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		left, err := leftovers(t.Context(), n)
		require.NoError(c, err)
		require.Empty(c, left)
	}, harness.Patience(5*time.Second), time.Second)
	// The kubelet removes its slices. That also ends scopes in them, so it comes after the look.
	if os.Getenv("PODFSM_CGROUPS") == "systemd" {
		out, err := exec.CommandContext(t.Context(), "systemctl", "stop", podSlice).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	require.NoError(t, os.RemoveAll(podsFile))
}

// TestTmpfsVolumes runs containers with a volume on tmpfs, like the service account tokens of the
// kubelet, in pods of all modes. Linux maps the ids of tmpfs since 6.3. On older kernels,
// containers in a user namespace are refused with the remedy, as podfsm doctor predicts.
func TestTmpfsVolumes(t *testing.T) {
	n := attach(t)
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1M"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	require.NoError(t, os.WriteFile(filepath.Join(dir, "token"), []byte("secret"), 0o644))
	found := tmpfsFindings(t)
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mapsAll := kind.handler == "podfsm-auto" || kind.handler == "podfsm-node"
			p, err := n.RunPod(t.Context(), kind.handler, n.PodConfig("tmpfs-"+kind.name, kind.option))
			require.NoError(t, err, "no pod is refused for it: it may have no such volume")
			t.Cleanup(func() { require.NoError(t, p.StopAndRemove(context.WithoutCancel(t.Context()))) })
			c, err := p.StartContainer(t.Context(), "main", harness.Volume(dir, "/token"))
			if mapsTmpfs(t) || strings.HasPrefix(kind.name, "host-") {
				require.NoError(t, err)
				out, err := c.Exec(t.Context(), "cat", "/token/token")
				require.NoError(t, err)
				require.Equal(t, "secret", out)
			} else {
				require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
				hostUsers := "run the pod with hostUsers: true"
				if mapsAll {
					hostUsers = "run the pod by a runtime handler that leaves it on the node's users"
				}
				require.Equal(t, fmt.Sprintf(`container "main" of pod "default/tmpfs-%s" can't have its volume "/token" from %q: this kernel can't map the ids of its filesystem, `+
					"tmpfs: invalid argument; upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or %s", kind.name, dir, hostUsers), status.Convert(err).Message())
			}
			status := "ok"
			switch {
			case mapsTmpfs(t):
			case mapsAll:
				status = "fail"
			default:
				status = "warn"
			}
			require.Equal(t, status, found[kind.handler].GetStatus(), "%v", found)
			require.Equal(t, status == "ok", found[kind.handler].GetRefusedPods() == "", "%v", found)
		})
	}
}

// mapsTmpfs reports whether this kernel maps the ids of tmpfs, by its version.
func mapsTmpfs(t *testing.T) bool {
	t.Helper()
	var name unix.Utsname
	require.NoError(t, unix.Uname(&name))
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor)
	require.NoError(t, err)
	return major > 6 || major == 6 && minor >= 3
}

// tmpfsFindings returns the findings of podfsm doctor about tmpfs by handler.
func tmpfsFindings(t *testing.T) map[string]*podfsmv1.Finding {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "podfsm", "doctor", "-o", "json").Output()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 2 { // as on old kernels
		require.NoError(t, err)
	}
	var response podfsmv1.DoctorResponse
	require.NoError(t, protojson.Unmarshal(out, &response))
	found := map[string]*podfsmv1.Finding{}
	for _, f := range response.GetFindings() {
		if f.GetCheck() != "tmpfs" {
			continue
		}
		for _, kind := range kinds {
			if f.GetSubject() == "" || slices.Contains(strings.Split(f.GetSubject(), ", "), kind.handler) { // without a subject, the finding is about all handlers
				found[kind.handler] = f
			}
		}
	}
	return found
}

func removeAll(ctx context.Context, n *harness.Node) error {
	list, err := n.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range list.GetItems() {
		_, err := n.Runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.GetId()})
		if err != nil {
			return fmt.Errorf("failed to stop pod %q: %w", p.GetMetadata().GetName(), err)
		}
		_, err = n.Runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
		if err != nil {
			return fmt.Errorf("failed to remove pod %q: %w", p.GetMetadata().GetName(), err)
		}
	}
	return nil
}

// leftovers returns the resources of pods on the machine.
func leftovers(ctx context.Context, n *harness.Node) (left []string, err error) {
	add := func(kind string, items []string, failed error) {
		err = errors.Join(err, failed)
		for _, item := range items {
			if item != "" {
				left = append(left, kind+" "+item)
			}
		}
	}
	k8s := namespaces.WithNamespace(ctx, "k8s.io")
	containers, failed := n.Containerd.ContainerService().List(k8s)
	add("container", names(containers, func(i int) string { return containers[i].ID }), failed)
	sandboxes, failed := n.Containerd.SandboxStore().List(k8s)
	add("sandbox", names(sandboxes, func(i int) string { return sandboxes[i].ID }), failed)
	held, failed := n.Containerd.LeasesService().List(k8s)
	// containerd takes leases that expire whenever it makes or unpacks something. It removes them
	// itself after a power cut.
	held = slices.DeleteFunc(held, func(lease leases.Lease) bool { return lease.Labels["containerd.io/gc.expire"] != "" })
	add("lease", names(held, func(i int) string { return held[i].ID }), failed)

	if _, missing := exec.LookPath("podfsm"); missing == nil {
		ledger, failed := n.Sandboxes().List(ctx, &podfsmv1.ListRequest{})
		add("ledger entry", names(ledger.GetSandboxes(), func(i int) string { return ledger.GetSandboxes()[i].String() }), failed)
		ids, failed := n.Sandboxes().IDs(ctx, &podfsmv1.IDsRequest{})
		add("id range", names(ids.GetHolders(), func(i int) string { return ids.GetHolders()[i].String() }), failed)
		leaks, failed := exec.CommandContext(ctx, "podfsm", "leaks").Output()
		if text := strings.TrimSpace(string(leaks)); failed != nil || strings.Count(text, "\n") > 0 {
			add("podfsm leaks", []string{fmt.Sprint(text, failed)}, nil)
		}
	}
	addresses, failed := filepath.Glob(ipamDir + "/*/[0-9]*.*")
	add("address", addresses, failed)
	netns, failed := mountinfo.GetMounts(mountinfo.FSTypeFilter("nsfs"))
	add("mount", names(netns, func(i int) string { return netns[i].Mountpoint }), failed)
	below, failed := mountinfo.GetMounts(mountinfo.PrefixFilter(stateDir))
	add("mount", names(below, func(i int) string { return below[i].Mountpoint }), failed)
	shims, failed := filepath.Glob(stateDir + "/io.containerd.runtime.v2.task/*/*")
	add("bundle", shims, failed)
	sockets, failed := filepath.Glob(stateDir + "/s/*")
	add("socket", sockets, failed)
	veths, failed := filepath.Glob("/sys/class/net/veth*")
	add("link", veths, failed)
	for _, below := range []string{podSlice + "/*/*.scope", "containerd/*/*", "system.slice/cri-containerd-*", "k8s.io/*", "*.slice:*", "*/*.slice:*", "*/*/*.slice:*"} {
		unified, _ := filepath.Glob("/sys/fs/cgroup/" + below)
		groups, failed := filepath.Glob("/sys/fs/cgroup/*/" + below) // v1
		groups = append(groups, unified...)
		groups = slices.DeleteFunc(groups, func(path string) bool { info, err := os.Stat(path); return err != nil || !info.IsDir() })
		add("cgroup", groups, failed)
	}
	units, failed := exec.CommandContext(ctx, "systemctl", "list-units", "--all", "--plain", "--no-legend", "cri-containerd-*").Output() // in any state
	add("unit", strings.Split(strings.TrimSpace(string(units)), "\n"), failed)
	files, failed := filepath.Glob("/run/systemd/transient/cri-containerd-*") // without the file, podfsm assumes that the unit is gone
	add("unit", files, failed)
	return left, err
}

func names[T any](all []T, name func(i int) string) (of []string) {
	for i := range all {
		of = append(of, name(i))
	}
	return of
}

// TestChurnUntilPowerCut runs and removes pods of all kinds with containers until the power is cut. It prints a
// line per pod.
func TestChurnUntilPowerCut(t *testing.T) {
	n := attachNew(t)
	var workers sync.WaitGroup
	for worker := range 3 {
		workers.Go(func() {
			for round := 0; t.Context().Err() == nil; round++ {
				for _, kind := range kinds {
					name := fmt.Sprintf("%s-%d-%d", kind.name, worker, round)
					p, err := n.RunPod(t.Context(), kind.handler, n.PodConfig(name, kind.option))
					if err != nil {
						t.Logf("failed to run pod %q: %v", name, err)
						time.Sleep(time.Second)
						continue
					}
					fmt.Println("churn: runs", name)
					if _, err := p.StartContainer(t.Context(), "main"); err != nil {
						t.Logf("failed to start a container in pod %q: %v", name, err)
					}
					if err := p.StopAndRemove(t.Context()); err != nil {
						t.Log(err)
					}
				}
			}
		})
	}
	workers.Wait()
}
