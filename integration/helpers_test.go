package integration

import (
	"context"
	"flag"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// The intervals and timeouts of polls.
var (
	waitFor = harness.Patience(20 * time.Second)
	tick    = 20 * time.Millisecond
)

// full reports whether the long variants of tests run: all cells of a matrix, and many kills or
// rounds.
func full() bool { return os.Getenv("PODFSM_FULL") != "" }

func runPod(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) *harness.Pod {
	t.Helper()
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
	require.NoError(t, err)
	return pod
}

// runOnce runs and removes a pod without faults.
func runOnce(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) {
	t.Helper()
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(t.Context()))
}

// failRun runs a pod that has to fail, and returns the error.
func failRun(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) error {
	t.Helper()
	pod, err := n.RunPod(t.Context(), handler, config)
	if err == nil {
		require.NoError(t, pod.StopAndRemove(t.Context()))
		t.Fatal("the pod runs")
	}
	return err
}

// startPod runs a pod that is stopped and removed at the end of the test.
func startPod(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) *harness.Pod {
	t.Helper()
	pod, err := n.RunPod(t.Context(), handler, config)
	require.NoError(t, err)
	t.Cleanup(func() {
		if err := pod.StopAndRemove(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return pod
}

func startContainer(t *testing.T, pod *harness.Pod, name string, options ...harness.ContainerOption) *harness.Container {
	t.Helper()
	container, err := pod.StartContainer(t.Context(), name, options...)
	require.NoError(t, err)
	return container
}

func exec(t *testing.T, container *harness.Container, command ...string) string {
	t.Helper()
	out, err := container.Exec(t.Context(), command...)
	require.NoError(t, err)
	return out
}

// waitExit waits until a container has ended, and returns its exit code.
func waitExit(t *testing.T, c *harness.Container) int32 {
	t.Helper()
	var status *runtime.ContainerStatus
	require.Eventually(t, func() bool {
		var err error
		status, err = c.Status(t.Context())
		return err == nil && status.GetState() == runtime.ContainerState_CONTAINER_EXITED
	}, waitFor, tick)
	return status.GetExitCode()
}

// ended reports whether a process has ended. Where nothing reaps orphans, it stays a zombie.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// inspect asks podfsm's own API.
func inspect(t *testing.T, n *harness.Node, ref string) *podfsmv1.InspectResponse {
	t.Helper()
	resp, err := n.Sandboxes().Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: ref})
	require.NoError(t, err)
	return resp
}

// atOnce makes calls for the numbers below count, at most limit at a time, and requires that all
// succeed.
func atOnce(t *testing.T, count, limit int, call func(ctx context.Context, i int) error) {
	t.Helper()
	calls, ctx := errgroup.WithContext(t.Context())
	calls.SetLimit(limit)
	for i := range count {
		calls.Go(func() error { return call(ctx, i) })
	}
	require.NoError(t, calls.Wait())
}

// waitPending waits until the cleanup of a sandbox is pending, and returns the sandbox. During a
// retry, a sandbox has another state, and the list lacks the step that is tried.
func waitPending(t *testing.T, n *harness.Node, ref string) (sandbox *podfsmv1.Sandbox) {
	t.Helper()
	require.Eventually(t, func() bool {
		sandbox = inspect(t, n, ref).GetSandbox()
		return sandbox.GetState() == "CleanupOwed"
	}, waitFor, tick)
	return sandbox
}

func nsPath(pid int, kind string) string { return fmt.Sprintf("/proc/%d/ns/%s", pid, kind) }

// inode returns the inode of a namespace by the path of its file.
func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var stat unix.Stat_t
	require.NoError(t, unix.Stat(path, &stat))
	return stat.Ino
}

func nsOptions(c *runtime.PodSandboxConfig) *runtime.NamespaceOption {
	return security(c).NamespaceOptions
}

// within runs f, cancels its context after twice the limit, and fails the test if f exceeds the limit.
func within(t *testing.T, what string, f func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*prompt)
	defer cancel()
	began := time.Now()
	f(ctx)
	require.Less(t, time.Since(began), prompt, what)
}

// eventually reports whether a condition became true in time.
func eventually(is func() bool) bool {
	for deadline := time.Now().Add(waitFor); time.Now().Before(deadline); time.Sleep(tick) {
		if is() {
			return true
		}
	}
	return is()
}

// sorted iterates over a map in the order of its keys, so that runs on one node are alike.
func sorted[V any](m map[string]V) iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, key := range slices.Sorted(maps.Keys(m)) {
			if !yield(key, m[key]) {
				return
			}
		}
	}
}

// prompt bounds a stop or a rollback on a busy machine. The regressions that these tests prevent
// took 90 seconds, or forever.
const prompt = 15 * time.Second

var seed = flag.Uint64("seed", 0, "replay the random decisions of a test; 0 takes a new seed")

// takeSeed returns the seed, and logs how to use it again.
func takeSeed(t *testing.T) uint64 {
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("replay with -seed %d", *seed)
	return *seed
}

// removePods removes all pods, as the kubelet does.
func removePods(t *testing.T, n *harness.Node) {
	t.Helper()
	for _, item := range listed(t, n) {
		require.NoError(t, n.FindPod(item.GetId(), &runtime.PodSandboxConfig{Metadata: item.GetMetadata()}).StopAndRemove(t.Context()))
	}
}

// steps are the steps of the creation path in their order.
var steps = []string{"allocate_ids", "remap_snapshot", "start_pause", "capture_netns", "attach_network", "declare_ready"}
