package harness_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/traces"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

func TestPods(t *testing.T) {
	n, before := start(t, harness.Config{})
	t.Run("in a user namespace", func(t *testing.T) { testUserNSPod(t, n) })
	n.RequireClean(t, before)
	t.Run("in the node's namespaces", func(t *testing.T) { testPodsThatShareTheNode(t, n) })
	n.RequireClean(t, before)
}

func testUserNSPod(t *testing.T, n *harness.Node) {
	ctx := t.Context()
	events, err := n.Events(ctx)
	require.NoError(t, err)
	defer events.Close()

	pod, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("web", harness.UserNS(10*65536, 65536)))
	require.NoError(t, err)
	server, err := pod.StartContainer(ctx, "server", harness.Run("sh", "-c", "echo started; exec httpd -f -h /www"))
	require.NoError(t, err)

	uidMap, err := server.Exec(ctx, "cat", "/proc/self/uid_map")
	require.NoError(t, err)
	require.Regexp(t, `^\s*0\s+655360\s+65536\n$`, uidMap)
	_, err = server.Exec(ctx, "sh", "-c", "echo oops >&2; exit 3")
	require.ErrorContains(t, err, "exit code 3: oops")

	ip, err := pod.IP(ctx)
	require.NoError(t, err)
	require.Equal(t, harness.IndexPage, get(t, n, "http://"+ip+"/"))
	log, err := server.Log()
	require.NoError(t, err)
	require.Contains(t, log, "stdout F started")

	_, err = events.WaitFor(ctx, func(all []*runtime.ContainerEventResponse) bool {
		return len(harness.OfType(all, server.ID, runtime.ContainerEventType_CONTAINER_STARTED_EVENT)) == 1
	})
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(ctx))
}

func testPodsThatShareTheNode(t *testing.T, n *harness.Node) {
	ctx := t.Context()
	hostUsers, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("host-users", harness.HostUsers()))
	require.NoError(t, err)
	hostNetwork, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("host-network", harness.HostNetwork()))
	require.NoError(t, err)

	c, err := hostUsers.StartContainer(ctx, "busybox")
	require.NoError(t, err)
	uidMap, err := c.Exec(ctx, "cat", "/proc/self/uid_map")
	require.NoError(t, err)
	require.Regexp(t, `^\s*0\s+0\s+4294967295\n$`, uidMap)
	c, err = hostNetwork.StartContainer(ctx, "busybox")
	require.NoError(t, err)
	links, err := c.Exec(ctx, "ip", "link")
	require.NoError(t, err)
	require.Contains(t, links, "cni0", "the node's network is the daemon's")

	require.NoError(t, hostUsers.StopAndRemove(ctx))
	require.NoError(t, hostNetwork.StopAndRemove(ctx))
}

func TestDaemonsSideBySide(t *testing.T) {
	a, beforeA := start(t, harness.Config{})
	b, beforeB := start(t, harness.Config{})
	ctx := t.Context()
	podA, err := a.RunPod(ctx, harness.StockHandler, a.PodConfig("same-name"))
	require.NoError(t, err)
	podB, err := b.RunPod(ctx, harness.StockHandler, b.PodConfig("same-name"))
	require.NoError(t, err)
	require.NoError(t, podA.StopAndRemove(ctx))
	a.RequireClean(t, beforeA)

	status, err := podB.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
	require.NoError(t, podB.StopAndRemove(ctx))
	b.RequireClean(t, beforeB)
}

func TestRestartAndKill(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*harness.Node, context.Context) error
	}{
		{"stop", (*harness.Node).Stop},
		{"kill", (*harness.Node).Kill},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, before := start(t, harness.Config{})
			ctx := t.Context()
			pod, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("survivor"))
			require.NoError(t, err)
			_, err = pod.StartContainer(ctx, "busybox")
			require.NoError(t, err)
			pid := n.Pid()

			require.NoError(t, tc.end(n, ctx))
			require.NoDirExists(t, "/proc/"+itoa(pid))
			require.NoError(t, n.Start(ctx))
			require.NotEqual(t, pid, n.Pid())

			status, err := pod.Status(ctx)
			require.NoError(t, err)
			require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
			require.NoError(t, pod.StopAndRemove(ctx))
			n.RequireClean(t, before)
		})
	}
}

func TestStartShowsWhyTheDaemonEnded(t *testing.T) {
	_, err := harness.NewNode(t.Context(), harness.Config{Daemon: harness.Stock, TOML: "required_plugins = ['io.containerd.no.such']"})
	require.ErrorContains(t, err, "the daemon ended: exit status 1")
	require.ErrorContains(t, err, "io.containerd.no.such", "the end of the log")
}

func TestTracesOfANode(t *testing.T) {
	n, _ := start(t, harness.Config{Traces: true})
	ctx, traceID := traces.NewContext(t.Context())
	_, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("traced"))
	require.NoError(t, err)

	const root = "runtime.v1.RuntimeService/RunPodSandbox"
	spans, err := n.Traces.WaitFor(soon(t), traceID, traces.Finished(root))
	require.NoError(t, err)
	drawn := traces.Render(spans, func(_, _ string) (string, bool) { return "", false })
	require.Contains(t, drawn, "- "+root+"\n  - ", "it has children")
}

func TestFaults(t *testing.T) {
	n, before := start(t, harness.Config{})
	run := func() error {
		pod, err := n.RunPod(t.Context(), harness.StockHandler, n.PodConfig("faulty"))
		if err == nil {
			err = pod.StopAndRemove(t.Context())
		}
		return err
	}

	for _, point := range []string{"runc.create", "runc.create.after", "runc.start", "bridge.ADD", "bridge.ADD.after", "host-local.ADD", "portmap.ADD"} {
		t.Run("fail "+point, func(t *testing.T) {
			require.NoError(t, n.Fault(point, "1*error(injected by a test)"))
			require.ErrorContains(t, run(), "injected by a test")
			n.RequireClean(t, before)
			require.NoError(t, run(), "the second try")
			require.NoError(t, n.Heal())
			n.RequireClean(t, before)
		})
	}
	for _, point := range []string{"runc.create", "bridge.ADD", "bridge.ADD.after"} {
		t.Run("block "+point, func(t *testing.T) {
			require.NoError(t, n.Fault(point, "block"))
			done := make(chan error, 1)
			go func() { done <- run() }()
			require.NoError(t, n.Faults.WaitReached(soon(t), point, 1))
			require.Empty(t, done)
			require.NoError(t, n.Faults.Release(point))
			require.NoError(t, <-done)
			require.NoError(t, n.Heal())
			n.RequireClean(t, before)
		})
	}
}

func TestSetChain(t *testing.T) {
	n, before := start(t, harness.Config{})
	ctx := t.Context()
	require.NoError(t, n.SetChain(ctx, append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
	_, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("missing-plugin"))
	require.ErrorContains(t, err, `failed to find plugin "missing"`)

	require.NoError(t, n.SetChain(ctx))
	_, err = n.RunPod(ctx, harness.StockHandler, n.PodConfig("no-network"))
	require.ErrorContains(t, err, "cni plugin not initialized")

	require.NoError(t, n.SetChain(ctx, n.DefaultChain()...))
	pod, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("healed"))
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(ctx))

	// Stock containerd keeps the address of the first pod forever: the DEL of a
	// chain with a missing plugin stops before it reaches the IPAM.
	after, err := n.Census(ctx)
	require.NoError(t, err)
	require.Contains(t, before.Diff(after), harness.IPAM)
}

// A kept node outlives its test and later sweeps, until a person removes it.
func TestKeep(t *testing.T) {
	ctx := t.Context()
	tmp, err := os.MkdirTemp("", "k") // of its own, for kept nodes of other tests to stay
	require.NoError(t, err)
	require.NoError(t, os.Chmod(tmp, 0o711))
	t.Setenv("TMPDIR", tmp)
	t.Cleanup(func() {
		require.NoError(t, harness.SweepKept(context.WithoutCancel(ctx)))
		require.NoError(t, os.Remove(tmp))
	})

	var n *harness.Node
	var pod *harness.Pod
	t.Run("test", func(t *testing.T) {
		t.Setenv("PODFSM_KEEP", "1")
		n, _ = start(t, harness.Config{})
		pod, err = n.RunPod(ctx, harness.StockHandler, n.PodConfig("kept"))
		require.NoError(t, err)
	})
	require.NoError(t, harness.Sweep(ctx))
	out, err := exec.CommandContext(ctx, filepath.Join(n.Dir(), "shell"), "-c", "crictl pods -q").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, pod.ID+"\n", string(out))

	require.NoError(t, harness.SweepKept(ctx))
	require.NoDirExists(t, n.Dir())
	require.NoDirExists(t, "/proc/"+itoa(n.Pid()))
}
