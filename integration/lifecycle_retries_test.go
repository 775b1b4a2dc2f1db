package integration

import (
	"os"
	osexec "os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// The client of the kubelet has a deadline, and asks again with the same attempt.
func TestRetriesJoin(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.StockHandler)
	require.NoError(t, err)

	t.Run("slow CNI", func(t *testing.T) {
		require.NoError(t, n.Fault("bridge.ADD", "delay(6000)"))
		config := n.PodConfig("slow")
		var pod *harness.Pod
		tries := 0
		for pod == nil {
			tries++
			got, err := runFor(t, n, harness.PodfsmHandler, 2*time.Second, config)
			if err != nil {
				require.Equal(t, codes.DeadlineExceeded, status.Code(err), "only the client's own deadline: %v", err)
			}
			pod = got
		}
		require.Greater(t, tries, 2)
		hits, err := n.Faults.Hits("bridge.ADD")
		require.NoError(t, err)
		require.Equal(t, 1, hits, "one ADD for all tries")
		require.NotContains(t, n.Log(), "is reserved")
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})

	t.Run("on containerd's own handler they don't", func(t *testing.T) {
		config := n.PodConfig("slow")
		require.NoError(t, n.Fault("bridge.ADD", "block"))
		_, err := runFor(t, n, harness.StockHandler, impatient, config)
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "%v", err)
		_, err = runFor(t, n, harness.StockHandler, waitFor, config)
		require.ErrorContains(t, err, "failed to reserve sandbox name")
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})

	t.Run("the second caller has time", func(t *testing.T) {
		config := n.PodConfig("patient")
		leaveBehind(t.Context(), t, n, "bridge.ADD", config)
		config.Labels["changed"] = "meanwhile"
		config.Annotations["changed"] = "meanwhile"
		joined := make(chan *harness.Pod, 1)
		go func() {
			pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
			if err != nil {
				t.Error(err)
			}
			joined <- pod
		}()
		_, err := runFor(t, n, harness.PodfsmHandler, impatient, config)
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "%v", err)
		require.NoError(t, n.Faults.Release("bridge.ADD"))
		pod := <-joined
		require.NotNil(t, pod)
		requireOnly(t, n, pod)
		_, err = n.RunPod(t.Context(), harness.PodfsmHandler, config)
		require.Equal(t, codes.AlreadyExists, status.Code(err), "it is taken: %v", err)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})

	t.Run("twenty at once", func(t *testing.T) {
		config := n.PodConfig("wanted")
		leaveBehind(t.Context(), t, n, "bridge.ADD", config)
		earlier := scrape(t, n)[joined]
		pods := make([]*harness.Pod, 20)
		var callers sync.WaitGroup
		for i := range pods {
			callers.Go(func() {
				pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
				if err != nil {
					t.Error(err)
				}
				pods[i] = pod
			})
		}
		require.Eventually(t, func() bool { return scrape(t, n)[joined] == earlier+float64(len(pods)) }, waitFor, tick)
		require.NoError(t, n.Faults.Release("bridge.ADD"))
		callers.Wait()
		for _, pod := range pods {
			require.NotNil(t, pod)
			require.Equal(t, pods[0].ID, pod.ID)
		}
		requireOnly(t, n, pods[0])
		require.NoError(t, pods[0].StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})

	t.Run("of a finished one", func(t *testing.T) {
		config := n.PodConfig("finished")
		id := leaveFinished(t, n, config)
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
		require.NoError(t, err)
		require.Equal(t, id, pod.ID)
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})
}

// A request with another configuration replaces the older creation.
func TestRetrySupersedes(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	other := func(config *runtime.PodSandboxConfig) *runtime.PodSandboxConfig {
		changed := n.PodConfig(config.GetMetadata().GetName())
		changed.Linux.SecurityContext = config.Linux.SecurityContext // the range of ids, too
		changed.Hostname = "renamed"
		return changed
	}

	t.Run("a creation under way", func(t *testing.T) {
		config := n.PodConfig("pod")
		leaveBehind(t.Context(), t, n, "bridge.ADD", config)
		old, ok := find(t, n, config)
		require.True(t, ok)
		waits := make(chan error, 1)
		go func() {
			_, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
			waits <- err
		}()
		require.Eventually(t, func() bool { return scrape(t, n)[joined] == 1 }, waitFor, tick)
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, other(config))
		require.NoError(t, err)
		require.NotEqual(t, old.GetId(), pod.ID)
		require.Equal(t, codes.Aborted, status.Code(<-waits))
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})

	t.Run("a finished one", func(t *testing.T) {
		config := n.PodConfig("pod")
		old := leaveFinished(t, n, config)
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, other(config))
		require.NoError(t, err)
		require.NotEqual(t, old, pod.ID)
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("one that is rolling back", func(t *testing.T) {
		config := n.PodConfig("pod")
		require.NoError(t, n.Fault("declare_ready.do.after", "1*error(injected)"))
		leaveBehind(t.Context(), t, n, "attach_network.undo.before", config)
		results := make(chan error, 1)
		var pod *harness.Pod
		go func() {
			var err error
			pod, err = n.RunPod(t.Context(), harness.PodfsmHandler, other(config))
			results <- err
		}()
		_, err := runFor(t, n, harness.PodfsmHandler, impatient, config)
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "no caller gets an answer before the end of the rollback: %v", err)
		require.Empty(t, results)
		require.NoError(t, n.Faults.Release("attach_network.undo.before"))
		require.NoError(t, <-results)
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})
}

// A creation that a restart interrupts is rolled back, and a retry waits for the rollback.
func TestRetryAfterRestart(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("killed", func(t *testing.T) {
		config := n.PodConfig("pod")
		leaveBehind(t.Context(), t, n, "declare_ready.do.before", config)
		old, ok := find(t, n, config)
		require.True(t, ok)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Fault("attach_network.undo.before", "1*block"))
		require.NoError(t, n.Start(t.Context()))
		_, err := runFor(t, n, harness.PodfsmHandler, impatient, config)
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "%v", err)
		results := make(chan error, 1)
		var pod *harness.Pod
		go func() {
			var err error
			pod, err = n.RunPod(t.Context(), harness.PodfsmHandler, config)
			results <- err
		}()
		require.NoError(t, n.Faults.WaitReached(t.Context(), "attach_network.undo.before", 1))
		require.NoError(t, n.Heal())
		require.NoError(t, <-results)
		require.NotEqual(t, old.GetId(), pod.ID)
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("stopped", func(t *testing.T) {
		config := n.PodConfig("pod")
		leaveBehind(t.Context(), t, n, "bridge.ADD", config)
		require.NoError(t, n.Stop(t.Context()))
		require.NoError(t, n.Heal())
		from := len(n.Log())
		require.NoError(t, n.Start(t.Context()))
		n.RequireClean(t, before)
		require.NotContains(t, n.Log()[from:], "sandbox recovered after the restart", "it was rolled back before the daemon ended")
		runOnce(t, n, config)
		n.RequireClean(t, before)
	})
}

// The kubelet aggregates events by their texts, so a failure says the same each time.
func TestErrorTexts(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{TOML: `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  cni_add_timeout = "10s"
`})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, tc := range []struct {
		name   string
		fail   func(t *testing.T)
		option harness.PodOption
		text   string
	}{
		{
			name:   "an unknown sysctl",
			option: func(c *runtime.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"net.core.no": "1"} },
			text:   `failed to set the sysctl net.core.no = "1"`,
		},
		{
			name: "pause",
			fail: func(t *testing.T) { require.NoError(t, n.FailChild(t.Context(), "pivot_root", "EBUSY")) },
			text: "podfsm-init: failed to change the root",
		},
		{
			name: "a missing plugin",
			fail: func(t *testing.T) {
				require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
			},
			text: `failed to find plugin "missing"`,
		},
		{
			name: "a plugin without an answer",
			fail: func(t *testing.T) { require.NoError(t, n.Fault("bridge.ADD", "block")) },
			text: "no answer within 10s",
		},
		{
			name: "iptables",
			fail: func(t *testing.T) { breakIPTables(t, n) },
			text: `-A CNI-CHAIN -d IP/16 -j ACCEPT`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config := n.PodConfig("pod")
			if tc.option != nil {
				tc.option(config)
			}
			if tc.fail != nil {
				tc.fail(t)
			}
			first := failRun(t, n, harness.PodfsmHandler, config)
			require.ErrorContains(t, first, tc.text)
			for range 2 {
				require.EqualError(t, failRun(t, n, harness.PodfsmHandler, config), first.Error())
			}
			require.NoError(t, n.Heal())
			require.NoError(t, n.EndTrace())
			require.NoError(t, os.RemoveAll(filepath.Join(n.Dir(), "bin/iptables")))
			require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
			n.RequireClean(t, before)
		})
	}
}

// breakIPTables makes the first rule in the chain of a pod fail.
func breakIPTables(t *testing.T, n *harness.Node) {
	t.Helper()
	real, err := osexec.LookPath("iptables")
	require.NoError(t, err)
	script := "#!/bin/sh\ncase \"$*\" in *'-A CNI-'*) echo broken >&2; exit 4;; esac\nexec " + real + " \"$@\"\n"
	require.NoError(t, os.WriteFile(filepath.Join(n.Dir(), "bin/iptables"), []byte(script), 0o755))
}
