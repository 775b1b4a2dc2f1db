package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// podfsm trusts nothing that a pod can write. Each test is about something by which a pod could
// once harm others.

// ending is a way to end a daemon.
type ending struct {
	signal string
	end    func(context.Context) error
}

func endings(n *harness.Node) []ending {
	return []ending{{"SIGTERM", n.Stop}, {"SIGKILL", n.Kill}}
}

// env adds variables to the environment of a container.
func env(variables ...string) harness.ContainerOption {
	return func(c *runtime.ContainerConfig) {
		for _, v := range variables {
			key, value, _ := strings.Cut(v, "=")
			c.Envs = append(c.Envs, &runtime.KeyValue{Key: key, Value: []byte(value)})
		}
	}
}

// startTime returns field 22 of /proc/PID/stat, which distinguishes a process from a later one with
// the same pid.
func startTime(t *testing.T, pid int) string {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(t, err)
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	require.NotEqual(t, "Z", fields[0], "process %d has ended", pid)
	return fields[19]
}

// TestPodPosesAsPlugin runs a pod that starts processes with all marks of a CNI plugin of another
// pod, all the time.
func TestPodPosesAsPlugin(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, by := range endings(n) {
		t.Run(by.signal, func(t *testing.T) {
			victim := runPod(t, n, n.PodConfig("victim"))
			poser := startPod(t, n, harness.PodfsmHandler, n.PodConfig("poser"))
			container := startContainer(t, poser, "poser",
				env("PODFSM_SANDBOX="+victim.ID, "CNI_CONTAINERID="+victim.ID, "CNI_COMMAND=DEL", "CNI_PATH="+filepath.Join(n.Dir(), "cni/bin")),
				harness.Run("sh", "-c", "sleep 600 & while :; do sleep 0.05; done"))
			pid, err := container.Pid(t.Context())
			require.NoError(t, err)
			started := startTime(t, pid)
			require.NoError(t, by.end(t.Context()))
			require.NoError(t, n.Start(t.Context()))
			within(t, "the stop of a pod", func(ctx context.Context) { require.NoError(t, victim.StopAndRemove(ctx)) })
			require.Equal(t, started, startTime(t, pid), "the other pod is left alone")
			require.Contains(t, exec(t, container, "ps"), "sleep 600")
		})
	}
	n.RequireClean(t, before)
}

// shimPoses are arguments of processes that look like a shim of a sandbox, or like podfsm-init. The
// first argument is the name of the program.
func shimPoses(id string) []pose {
	return []pose{
		{"shim", []string{"x", "-namespace", "k8s.io", "-id", id}},
		{"whole-shim", []string{"/usr/bin/containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", id, "-address", "/run/containerd/containerd.sock"}},
		{"init", []string{"podfsm-init", "1"}},
		{"starter", []string{"containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", id, "start"}},
	}
}

// pose is what a process pretends to be, by its arguments.
type pose struct {
	name string
	argv []string
}

// TestPodPosesAsShim runs pods whose processes have all marks of another pod's shim or init
// program: arguments, names, and a socket and a working directory with the paths of the real ones
// on the host. One pod has a user namespace, another one the pid namespace of the node.
func TestPodPosesAsShim(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, by := range endings(n) {
		t.Run(by.signal, func(t *testing.T) {
			victim := runPod(t, n, n.PodConfig("victim"))
			served := startContainer(t, victim, "served")
			require.NoError(t, served.Remove(t.Context())) // so the pod has no shim when it is stopped
			dir, err := os.MkdirTemp("", "victim")
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
			bundle := filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io", victim.ID)
			nodesPids := func(c *runtime.PodSandboxConfig) { nsOptions(c).Pid = runtime.NamespaceMode_NODE }
			own := startPod(t, n, harness.PodfsmHandler, n.PodConfig("own-users"))
			shared := startPod(t, n, harness.PodfsmHandler, n.PodConfig("nodes-pids", harness.HostUsers(), nodesPids))
			started := map[int]string{}
			files := map[string]string{} // on the host, of root's
			var containers []*harness.Container
			for _, pod := range []*harness.Pod{own, shared} {
				for _, pose := range shimPoses(victim.ID) {
					socket := filepath.Join(dir, pose.name+".yaml")
					files[socket] = pose.name
					command := append([]string{"/attack", "pose-as", socket, bundle}, pose.argv...)
					c := startContainer(t, pod, pose.name, harness.Volume(n.Attack(), "/attack"), harness.Run(command...))
					require.Eventually(t, func() bool {
						log, err := c.Log()
						return err == nil && strings.Contains(log, "poses")
					}, waitFor, tick)
					pid, err := c.Pid(t.Context())
					require.NoError(t, err)
					started[pid] = startTime(t, pid)
					containers = append(containers, c)
				}
			}
			for file, text := range files {
				require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
			}
			require.NoError(t, by.end(t.Context()))
			require.NoError(t, n.Start(t.Context()))
			within(t, "the stop of a pod", func(ctx context.Context) { require.NoError(t, victim.StopAndRemove(ctx)) })
			found, code := leaks(t, n, "--fix")
			require.Empty(t, found)
			require.Zero(t, code)
			for file, text := range files {
				got, err := os.ReadFile(file)
				require.NoError(t, err)
				require.Equal(t, text, string(got), "a file of the host's")
			}
			for pid, since := range started {
				require.Equal(t, since, startTime(t, pid), "the other pod is left alone")
			}
			for _, c := range containers {
				status, err := c.Status(t.Context())
				require.NoError(t, err)
				require.Equal(t, runtime.ContainerState_CONTAINER_RUNNING, status.GetState())
			}
		})
	}
	n.RequireClean(t, before)
}

// TestPodPosesAsPluginOfAnotherRuntime runs a pod, on the users and in the pid namespace of the
// node, that looks like an ADD in flight. GC of the networks runs all the same.
func TestPodPosesAsPluginOfAnotherRuntime(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChainOf(t.Context(), "1.1.0", delegated(n)))
	runOnce(t, n, n.PodConfig("first"))
	poser := startPod(t, n, harness.StockHandler, n.PodConfig("poser", harness.HostNetwork(), func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_NODE
	}))
	startContainer(t, poser, "poser", env("CNI_COMMAND=ADD", "CNI_PATH="+filepath.Join(n.Dir(), "cni/bin")))
	stray := leak(t, n)
	at := len(n.Log())
	require.NoError(t, n.Restart(t.Context()))
	require.Contains(t, n.Log()[at:], "CNI GC of network completed")
	require.NotContains(t, reserved(t, n), stray)
}

// TestPodStarvesPool runs pods on the users of the node that use ids of every range of the pool in
// every possible way.
func TestPodStarvesPool(t *testing.T) {
	const ranges, first = 8, 1000013824
	n := harness.StartNode(t, harness.Config{TOML: usernsTOML(`mode = "auto"`, poolOf(ranges))})
	groups := func(c *runtime.PodSandboxConfig) {
		for i := range int64(ranges) {
			c.Linux.SecurityContext.SupplementalGroups = append(c.Linux.SecurityContext.SupplementalGroups, first+i*65536)
		}
	}
	bySpec := startPod(t, n, harness.StockHandler, n.PodConfig("by-spec", harness.HostUsers(), groups))
	startContainer(t, bySpec, "groups", func(c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.SupplementalGroups = bySpec.Config.Linux.SecurityContext.SupplementalGroups
	})
	byCall := startPod(t, n, harness.StockHandler, n.PodConfig("by-call", harness.HostUsers()))
	for _, way := range []string{"groups", "users"} {
		c := startContainer(t, byCall, way, harness.Volume(n.Attack(), "/attack"),
			harness.Run("/attack", "be-many", way, strconv.Itoa(first), strconv.Itoa(ranges)))
		require.Eventually(t, func() bool {
			log, err := c.Log()
			return err == nil && strings.Contains(log, "runs")
		}, waitFor, tick)
	}
	for i := range ranges {
		startPod(t, n, harness.PodfsmHandler, n.PodConfig(fmt.Sprint("auto-", i), harness.HostUsers()))
	}
	out, _, code := cli(t, n, "ids")
	require.Zero(t, code)
	require.Contains(t, out, fmt.Sprintf("%d, of which %d are held, 0 free, 0 in quarantine", ranges, ranges))
	require.Contains(t, out, "default/auto-0")
}

// hangInKernel makes a container of a pod hang in the kernel with the lock of its memory map until
// the end of the test, and returns the pid of the hanging process.
func hangInKernel(t *testing.T, pod *harness.Pod, n *harness.Node) int {
	t.Helper()
	fuse := func(c *runtime.ContainerConfig) {
		c.Devices = []*runtime.Device{{ContainerPath: "/dev/fuse", HostPath: "/dev/fuse", Permissions: "rwm"}}
	}
	container := startContainer(t, pod, "hangs", allowed, fuse, harness.Volume(n.Attack(), "/attack"), harness.Run("/attack", "hang-in-kernel", "/tmp/fuse"))
	server, err := container.Pid(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Kill(server, unix.SIGKILL) }) // the child continues then, before later cleanups examine it
	var pid int
	require.Eventually(t, func() bool {
		children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", server))
		require.NoError(t, err)
		for _, file := range children {
			text, _ := os.ReadFile(file)
			if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
				stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
				return strings.Contains(string(stat), ") D ")
			}
		}
		return false
	}, waitFor, tick)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	require.Error(t, osexec.CommandContext(ctx, "cat", fmt.Sprintf("/proc/%d/environ", pid)).Run(), "reading the environment hangs")
	return pid
}

// TestPodHangsInKernel runs a pod with a process whose environment and arguments can not be read:
// the read never ends.
func TestPodHangsInKernel(t *testing.T) {
	require.FileExists(t, "/dev/fuse", "run modprobe fuse")
	n := harness.StartNode(t, harness.Config{})
	for _, by := range endings(n) {
		t.Run(by.signal, func(t *testing.T) {
			adopted := runPod(t, n, n.PodConfig("adopted"))
			hanging := startPod(t, n, harness.PodfsmHandler, n.PodConfig("hanging", harness.HostUsers()))
			pid := hangInKernel(t, hanging, n)
			require.NoError(t, by.end(t.Context()))
			within(t, "the start of the daemon", func(ctx context.Context) { require.NoError(t, n.Start(ctx)) })
			within(t, "the stop of an adopted pod", func(ctx context.Context) { require.NoError(t, adopted.StopAndRemove(ctx)) })

			installPlugin(t, n, "failing", "#!/bin/sh\n[ $CNI_COMMAND != ADD ]\n")
			require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "failing"})...))
			within(t, "a rollback", func(ctx context.Context) {
				_, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("failed"))
				require.ErrorContains(t, err, `plugin type="failing"`)
			})
			require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
			within(t, "a look for leaks", func(context.Context) {
				_, errOut, code := cli(t, n, "--timeout", prompt.String(), "leaks")
				require.Zero(t, code, errOut)
			})
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			require.NoError(t, err)
			require.Contains(t, string(stat), ") D ", "it hangs all the time")
		})
	}
}

// TestPluginLeavesADaemon runs a plugin whose first ADD starts a daemon for all pods of a network,
// such as a DNS server. The daemon outlives the pod, containerd, and podfsm leaks.
func TestPluginLeavesADaemon(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "pid")
	installPlugin(t, n, "shared", fmt.Sprintf(`#!/bin/sh
conf=$(cat)
[ "$CNI_COMMAND" = ADD ] || exit 0
if ! [ -s %[1]s ]; then
	setsid sh -c 'echo $$ > %[1]s; exec sleep 6000' < /dev/null > /dev/null 2>&1 &
	while ! [ -s %[1]s ]; do sleep 0.01; done
fi
echo "$conf" | sed 's/.*"prevResult"://; s/,"type":"shared".*//'
`, file))
	require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "shared"})...))
	daemon := func() (int, string) {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		require.NoError(t, err)
		return pid, startTime(t, pid)
	}
	for _, by := range endings(n) {
		t.Run(by.signal, func(t *testing.T) {
			first := runPod(t, n, n.PodConfig("first"))
			pid, started := daemon()
			second := runPod(t, n, n.PodConfig("second"))
			require.NoError(t, by.end(t.Context()))
			require.NoError(t, n.Start(t.Context()))
			require.NoError(t, first.StopAndRemove(t.Context()))
			require.Equal(t, started, startTime(t, pid))
			var want []planted
			if by.signal == "SIGKILL" {
				want = []planted{forgetsEnded(t, n)}
			}
			found, code := leaks(t, n, "--fix")
			require.Equal(t, want, kinds(found))
			require.Zero(t, code)
			require.Equal(t, started, startTime(t, pid))
			require.NoError(t, second.StopAndRemove(t.Context()))
			require.Equal(t, started, startTime(t, pid))

			// The next DEL after the end of the daemon removes its cgroup.
			last := runPod(t, n, n.PodConfig("last"))
			require.NoError(t, unix.Kill(pid, unix.SIGKILL))
			require.Eventually(t, func() bool { return ended(pid) }, waitFor, tick)
			require.NoError(t, os.Remove(file))
			require.NoError(t, last.StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}
}

// forgetsEnded waits until podfsm has forgotten the ids of ended sandboxes, which takes as long as
// a new lease takes to count as a leak. It returns the lease.
func forgetsEnded(t *testing.T, n *harness.Node) planted {
	t.Helper()
	lease := planted{"lease", randomID(t)}
	_, err := n.Containerd.LeasesService().Create(namespaces.WithNamespace(t.Context(), "k8s.io"), leases.WithID(lease.id))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		found, _ := leaks(t, n)
		return slices.Contains(kinds(found), lease)
	}, 4*waitFor, time.Second)
	return lease
}

// TestStopLooksAtNoStranger traces the files that a daemon opens on a node with many other
// processes. The daemon stops two adopted pods, one with a running container, one with an ended
// container, and rolls a third pod back.
func TestStopLooksAtNoStranger(t *testing.T) {
	strangers := 300
	if full() {
		strangers = 2000
	}
	n := harness.StartNode(t, harness.Config{})
	pod := runPod(t, n, n.PodConfig("pod"))
	startContainer(t, pod, "runs")
	past := runPod(t, n, n.PodConfig("past"))
	waitExit(t, startContainer(t, past, "ended", harness.Run("true")))
	crowd := osexec.Command("sh", "-c", fmt.Sprintf("for i in $(seq %d); do sleep 600 > /dev/null & echo $!; done; exec >&-; wait", strangers))
	crowd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := crowd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, crowd.Start())
	t.Cleanup(func() {
		_ = unix.Kill(-crowd.Process.Pid, unix.SIGKILL)
		_ = crowd.Wait()
	})
	var text bytes.Buffer
	_, err = text.ReadFrom(stdout)
	require.NoError(t, err)
	strange := map[string]bool{}
	for pid := range strings.FieldsSeq(text.String()) {
		strange[pid] = true
	}
	require.Len(t, strange, strangers)
	require.NoError(t, n.Kill(t.Context()))
	require.NoError(t, n.Start(t.Context()))
	require.Eventually(t, func() bool { return inspect(t, n, pod.ID).GetSandbox().GetState() == "Ready" }, waitFor, tick)

	installPlugin(t, n, "failing", "#!/bin/sh\n[ $CNI_COMMAND != ADD ]\n")
	require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "failing"})...))
	trace := filepath.Join(t.TempDir(), "trace")
	tracer := osexec.Command("strace", "-f", "-qq", "-o", trace, "-e", "trace=%file", "-p", strconv.Itoa(n.Pid()))
	require.NoError(t, tracer.Start())
	require.Eventually(t, func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.Pid()))
		return err == nil && !strings.Contains(string(status), "TracerPid:\t0\n")
	}, waitFor, tick)
	stopped := errors.Join(pod.StopAndRemove(t.Context()), past.StopAndRemove(t.Context()))
	_, rolledBack := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("failed"))
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", n.Pid()))
	require.NoError(t, err)
	require.NoError(t, tracer.Process.Signal(unix.SIGINT))
	_ = tracer.Wait() // by the signal
	require.NoError(t, stopped)
	require.ErrorContains(t, rolledBack, `plugin type="failing"`)

	lines, err := os.ReadFile(trace)
	require.NoError(t, err)
	require.NotEmpty(t, lines)
	var looked []string
	for _, match := range regexp.MustCompile(`"/proc/(\d+)/[^"]*"`).FindAllStringSubmatch(string(lines), -1) {
		if strange[match[1]] {
			looked = append(looked, match[0])
		}
	}
	for _, task := range tasks {
		require.NotRegexp(t, `(?m)^`+task.Name()+` .*"/proc/?"`, string(lines), "nothing depends on how many processes there are")
	}
	require.Zero(t, len(looked), "files of processes that aren't podfsm's: %q …", looked[:min(len(looked), 8)])
}
