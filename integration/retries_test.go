package integration

import (
	"context"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// impatient is how long a caller waits that goes before its pod is ready.
const impatient = time.Second

// shortUnclaimed makes podfsm wait for a claim no longer than a test can.
const shortUnclaimed = `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  unclaimed_timeout = "2s"
`

// runFor runs a pod with a deadline, as the kubelet does.
func runFor(t *testing.T, n *harness.Node, handler string, patience time.Duration, config *runtime.PodSandboxConfig) (*harness.Pod, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return n.RunPod(ctx, handler, config)
}

// leaveBehind asks for a pod whose creation stops at a point until that is released, and goes.
func leaveBehind(ctx context.Context, t *testing.T, n *harness.Node, point string, config *runtime.PodSandboxConfig) {
	t.Helper()
	require.NoError(t, n.Fault(point, "1*block"))
	gone := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, err := n.RunPod(ctx, harness.PodfsmHandler, config)
		gone <- err
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
	if point == "bridge.ADD" { // which runs beside the runtime, and that comes to its end
		require.Eventually(t, func() bool {
			sandbox, _ := find(t, n, config)
			return sandbox.GetState() == "NetNSCaptured"
		}, waitFor, tick)
	}
	cancel()
	require.Equal(t, codes.Canceled, status.Code(<-gone))
}

// leaveFinished leaves a finished pod behind that nobody has, and returns its id. Nothing of CRI is asked for that.
func leaveFinished(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) string {
	t.Helper()
	leaveBehind(t.Context(), t, n, "bridge.ADD", config)
	require.NoError(t, n.Faults.Release("bridge.ADD"))
	var id string
	require.Eventually(t, func() bool {
		sandbox, _ := find(t, n, config)
		id = sandbox.GetId()
		// podfsm's own state comes a moment before containerd's service has the sandbox.
		return id != "" && regexp.MustCompile("a sandbox waits to be claimed.*"+id).MatchString(n.Log())
	}, waitFor, tick)
	require.NoError(t, n.Heal())
	return id
}

// find asks podfsm's own API for the sandbox of a pod, which claims nothing.
func find(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) (*podfsmv1.Sandbox, bool) {
	t.Helper()
	list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	for _, sandbox := range list.GetSandboxes() {
		if sandbox.GetPodName() == config.GetMetadata().GetName() {
			return sandbox, true
		}
	}
	return nil, false
}

// requireOnly requires that there is one sandbox, and that it works.
func requireOnly(t *testing.T, n *harness.Node, pod *harness.Pod) {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetItems(), 1)
	require.Equal(t, pod.ID, list.GetItems()[0].GetId())
	require.Len(t, reserved(t, n), 1, "one address")
	container := startContainer(t, pod, "main")
	require.Equal(t, pod.Config.GetHostname()+"\n", exec(t, container, "hostname"))
}

// The kubelet's client has a deadline, and asks again with the same attempt. Pain 2.
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

// A request with another configuration takes the older one's place.
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
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, other(config))
		require.NoError(t, err)
		require.NotEqual(t, old.GetId(), pod.ID)
		if err := <-waits; err != nil { // else it came after the other, whose place it can't take
			require.Contains(t, []codes.Code{codes.Aborted, codes.AlreadyExists}, status.Code(err), "%v", err)
		}
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
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "nobody gets an answer before the rollback has ended: %v", err)
		require.Empty(t, results)
		require.NoError(t, n.Faults.Release("attach_network.undo.before"))
		require.NoError(t, <-results)
		requireOnly(t, n, pod)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
		n.RequireClean(t, before)
	})
}

// A finished sandbox that nobody has asked for again goes; one that anybody has seen stays, for the kubelet uses what it sees.
func TestUnclaimed(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{TOML: shortUnclaimed})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	seen := map[string]func(t *testing.T, id string){
		"a list": func(t *testing.T, id string) {
			list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
			require.NoError(t, err)
			require.Equal(t, id, list.GetItems()[0].GetId())
		},
		"a streamed list": func(t *testing.T, id string) {
			stream, err := n.Runtime.StreamPodSandboxes(t.Context(), &runtime.StreamPodSandboxesRequest{})
			require.NoError(t, err)
			list, err := stream.Recv()
			require.NoError(t, err)
			require.Equal(t, id, list.GetPodSandboxes()[0].GetId())
		},
		"a status": func(t *testing.T, id string) {
			status, err := n.Runtime.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: id[:20]})
			require.NoError(t, err)
			require.Equal(t, id, status.GetStatus().GetId())
		},
	}
	for name, look := range seen {
		t.Run(name+" keeps it", func(t *testing.T) {
			shown := n.PodConfig("shown")
			id := leaveFinished(t, n, shown)
			look(t, id)
			requireVanishes(t, n, n.PodConfig("unseen")) // which was finished later
			sandbox, ok := find(t, n, shown)
			require.True(t, ok)
			require.Equal(t, "Ready", sandbox.GetState())
			pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, shown)
			require.NoError(t, err, "who didn't get it may still")
			require.Equal(t, id, pod.ID)
			requireOnly(t, n, pod)
			require.NoError(t, pod.StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}

	t.Run("an event keeps it", func(t *testing.T) {
		events, err := n.Events(t.Context())
		require.NoError(t, err)
		shown := n.PodConfig("shown")
		id := leaveFinished(t, n, shown)
		_, err = events.WaitFor(t.Context(), func(all []*runtime.ContainerEventResponse) bool {
			return len(harness.OfType(all, id, runtime.ContainerEventType_CONTAINER_STARTED_EVENT)) > 0
		})
		require.NoError(t, err)
		events.Close()
		requireVanishes(t, n, n.PodConfig("unseen"))
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, shown)
		require.NoError(t, err)
		require.Equal(t, id, pod.ID)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("after a restart", func(t *testing.T) {
		shown, unseen, wanted := n.PodConfig("shown"), n.PodConfig("unseen"), n.PodConfig("wanted")
		id := leaveFinished(t, n, shown)
		seen["a status"](t, id)
		leaveFinished(t, n, unseen)
		taken := leaveFinished(t, n, wanted)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))

		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, wanted)
		require.NoError(t, err)
		require.Equal(t, taken, pod.ID, "the retry has it")
		require.NoError(t, pod.StopAndRemove(t.Context()))
		requireGoes(t, n, unseen)
		sandbox, ok := find(t, n, shown)
		require.True(t, ok)
		require.Equal(t, "Ready", sandbox.GetState())
		pod, err = n.RunPod(t.Context(), harness.PodfsmHandler, shown)
		require.NoError(t, err)
		require.Equal(t, id, pod.ID)
		_, err = n.RunPod(t.Context(), harness.PodfsmHandler, shown)
		require.Equal(t, codes.AlreadyExists, status.Code(err), "now it is taken: %v", err)
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})
}

// requireVanishes leaves a finished pod behind and returns when it has gone.
func requireVanishes(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) {
	t.Helper()
	id := leaveFinished(t, n, config)
	requireGoes(t, n, config)
	require.Equal(t, "Removed", inspect(t, n, id).GetSandbox().GetState())
}

func requireGoes(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, ok := find(t, n, config)
		return !ok
	}, waitFor, tick)
}

// What a restart interrupts is rolled back, and a retry waits for that.
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
		require.NotContains(t, n.Log()[from:], "sandbox: taken up after the restart", "it was rolled back before the daemon ended")
		runOnce(t, n, config)
		n.RequireClean(t, before)
	})
}

// The kubelet aggregates events by their texts, so a failure says the same each time.
func TestErrorTexts(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{TOML: `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  cni_add_timeout = "3s"
`})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		fail   func(t *testing.T)
		option harness.PodOption
		text   string
	}{
		"an unknown sysctl": {
			option: func(c *runtime.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"net.core.no": "1"} },
			text:   `failed to set the sysctl net.core.no = "1"`,
		},
		"pause": {
			fail: func(t *testing.T) { require.NoError(t, n.FailChild(t.Context(), "pivot_root", "EBUSY")) },
			text: "podfsm-init: failed to change the root",
		},
		"a missing plugin": {
			fail: func(t *testing.T) {
				require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
			},
			text: `failed to find plugin "missing"`,
		},
		"a plugin without an answer": {
			fail: func(t *testing.T) { require.NoError(t, n.Fault("bridge.ADD", "block")) },
			text: "no answer within 3s",
		},
		"iptables": {
			fail: func(t *testing.T) { breakIPTables(t, n) },
			text: `-A CNI-CHAIN -d IP/16 -j ACCEPT`,
		},
	} {
		t.Run(name, func(t *testing.T) {
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

// breakIPTables makes the first rule of a pod's own chain fail.
func breakIPTables(t *testing.T, n *harness.Node) {
	t.Helper()
	real, err := osexec.LookPath("iptables")
	require.NoError(t, err)
	script := "#!/bin/sh\ncase \"$*\" in *'-A CNI-'*) echo broken >&2; exit 4;; esac\nexec " + real + " \"$@\"\n"
	require.NoError(t, os.WriteFile(filepath.Join(n.Dir(), "bin/iptables"), []byte(script), 0o755))
}
