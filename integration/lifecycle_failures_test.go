package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

func TestFailureOfEachStep(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	for _, step := range steps {
		for _, when := range []string{"before", "after"} {
			t.Run(step+" "+when+" it acts", func(t *testing.T) {
				require.NoError(t, n.Fault(step+".do."+when, "1*error(injected)"))
				config := n.PodConfig("pod")
				err := failRun(t, n, harness.PodfsmHandler, config)
				require.ErrorContains(t, err, `step `+step+` of pod "default/pod" failed: injected`)
				n.RequireClean(t, before)
				require.NoError(t, n.Heal())
				runOnce(t, n, config)
				n.RequireClean(t, before)
			})
		}
	}
}

func TestFailureOfRealParts(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	for _, tc := range []struct{ point, step string }{
		{"bridge.ADD", "attach_network"},
		{"bridge.ADD.after", "attach_network"},
		{"host-local.ADD", "attach_network"},
		{"host-local.ADD.after", "attach_network"},
	} {
		t.Run(tc.point, func(t *testing.T) {
			require.NoError(t, n.Fault(tc.point, "1*error(injected)"))
			config := n.PodConfig("pod")
			err := failRun(t, n, harness.PodfsmHandler, config)
			require.ErrorContains(t, err, "step "+tc.step)
			require.ErrorContains(t, err, "injected")
			require.NoError(t, n.Heal())
			n.RequireClean(t, before)
			runOnce(t, n, config)
			n.RequireClean(t, before)
		})
	}
}

// podfsm-init fails in the middle of its set-up, or can not execute pause. The namespaces and the
// cgroup exist by then.
func TestFailureOfPause(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, tc := range []struct {
		syscall, errno, text string
	}{
		{"close_range", "EPERM", "failed to mark descriptors close-on-exec: operation not permitted"},
		{"pivot_root", "EBUSY", "failed to change the root: device or resource busy"},
		{"sethostname", "EPERM", "failed to set the hostname: operation not permitted"},
		{"setresuid", "EAGAIN", "failed to set the user 65535: resource temporarily unavailable"},
		{"capset", "EPERM", "failed to drop the capabilities: operation not permitted"},
	} {
		t.Run(tc.syscall, func(t *testing.T) {
			require.NoError(t, n.FailChild(t.Context(), tc.syscall, tc.errno))
			config := n.PodConfig("pod")
			err := failRun(t, n, harness.PodfsmHandler, config)
			require.NoError(t, n.EndTrace())
			require.ErrorContains(t, err, `step start_pause of pod "default/pod" failed: failed to start pause: podfsm-init: `+tc.text)
			n.RequireClean(t, before)
			runOnce(t, n, config)
		})
	}
}

// The error names the step that took too long, and its timeout, by the same text at every try.
func TestPauseHangs(t *testing.T) {
	t.Parallel()
	hanging := filepath.Join(t.TempDir(), "podfsm-init") // waits, and never answers the daemon
	const script = "#!/bin/sh\n[ $1 = --version ] && echo podfsm-init that hangs protocol 1 || exec /bin/sleep 60\n"
	require.NoError(t, os.WriteFile(hanging, []byte(script), 0o755))
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  runtime_timeout = "6s"
  init_path = %q
`, hanging)})
	failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod")) // the first pod makes directories that stay
	before, err := n.Settle(t.Context())
	require.NoError(t, err)
	var texts []string
	for range 2 {
		err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "%v", err)
		require.ErrorContains(t, err, `step start_pause of pod "default/pod" failed: failed to start pause: no answer within 6s: `)
		texts = append(texts, status.Convert(err).Message())
		n.RequireClean(t, before)
	}
	require.Equal(t, texts[0], texts[1])
}

func TestFirstTryOfEachUndoFails(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	for _, step := range steps {
		for _, when := range []string{"before", "after"} {
			t.Run("rollback of "+step+" "+when+" it acts", func(t *testing.T) {
				require.NoError(t, n.Fault("declare_ready.do.after", "1*error(not ready)"))
				require.NoError(t, n.Fault(step+".undo."+when, "1*error(injected)"))
				config := n.PodConfig("pod")
				err := failRun(t, n, harness.PodfsmHandler, config)
				require.ErrorContains(t, err, `step declare_ready of pod "default/pod" failed: not ready`)
				require.ErrorContains(t, err, `undo of step `+step+` of pod "default/pod" failed: injected`)
				n.RequireClean(t, before) // the second try is automatic
				runOnce(t, n, config)
			})
		}
	}
	running := func(t *testing.T) *harness.Pod {
		pod := runPod(t, n, n.PodConfig("pod"))
		startContainer(t, pod, "main")
		return pod
	}
	for _, point := range []string{
		"attach_network.undo.before",
		"capture_netns.undo.after",
		"start_pause.stop.before",
		"start_pause.stop.after",
		"start_shim.undo.before",
		"start_shim.undo.after",
		// The fault points of real parts: the runtime that ends the container, and a plugin.
		"runc.kill",
		"runc.delete",
		"bridge.DEL",
	} {
		t.Run("stop: "+point, func(t *testing.T) {
			pod := running(t)
			require.NoError(t, n.Fault(point, "1*error(injected)"))
			require.NoError(t, pod.Stop(t.Context()), "the stop itself tries again")
			hits, err := n.Faults.Hits(point)
			require.NoError(t, err)
			require.GreaterOrEqual(t, hits, 2, "the fault was met")
			require.NoError(t, n.Heal())
			require.NoError(t, pod.StopAndRemove(t.Context()), "what the kubelet does next")
			n.RequireClean(t, before)
		})
	}
	for _, point := range []string{"start_pause.undo.before", "start_pause.undo.after", "remap_snapshot.undo.before", "allocate_ids.undo.before"} {
		t.Run("remove: "+point, func(t *testing.T) {
			pod := running(t)
			require.NoError(t, n.Fault(point, "1*error(injected)"))
			require.ErrorContains(t, pod.StopAndRemove(t.Context()), "injected")
			require.NoError(t, pod.StopAndRemove(t.Context()), "what the kubelet does next")
			n.RequireClean(t, before)
		})
	}
}

func TestPauseKilled(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	events, err := n.Events(t.Context())
	require.NoError(t, err)
	defer events.Close()

	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
	require.NoError(t, err)
	pid, err := pod.Pid(t.Context())
	require.NoError(t, err)
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	require.Eventually(t, func() bool {
		status, err := pod.Status(t.Context())
		return err == nil && status.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY
	}, waitFor, tick)
	require.Equal(t, "NotReady", inspect(t, n, pod.ID).GetSandbox().GetState())

	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
	deleted := func(all []*runtime.ContainerEventResponse) bool {
		return len(harness.OfType(all, pod.ID, runtime.ContainerEventType_CONTAINER_DELETED_EVENT)) > 0
	}
	all, err := events.WaitFor(t.Context(), deleted)
	require.NoError(t, err)
	for _, kind := range []runtime.ContainerEventType{
		runtime.ContainerEventType_CONTAINER_CREATED_EVENT,
		runtime.ContainerEventType_CONTAINER_STARTED_EVENT,
		runtime.ContainerEventType_CONTAINER_STOPPED_EVENT,
		runtime.ContainerEventType_CONTAINER_DELETED_EVENT,
	} {
		require.Len(t, harness.OfType(all, pod.ID, kind), 1, kind.String())
	}
	stopped := harness.OfType(all, pod.ID, runtime.ContainerEventType_CONTAINER_STOPPED_EVENT)[0]
	require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, stopped.GetPodSandboxStatus().GetState())
	started := harness.OfType(all, pod.ID, runtime.ContainerEventType_CONTAINER_STARTED_EVENT)[0]
	require.NotEmpty(t, started.GetPodSandboxStatus().GetNetwork().GetIp())
	require.Equal(t, runtime.NamespaceMode_POD, started.GetPodSandboxStatus().GetLinux().GetNamespaces().GetOptions().GetNetwork())
}

// A killed shim can't clean up, and its containers die. The pod stays, and gets another shim.
func TestShimKilled(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
	require.NoError(t, err)
	first := startContainer(t, pod, "first")
	running, err := n.Census(t.Context())
	require.NoError(t, err)
	require.NotEmpty(t, running[harness.ShimSockets])
	require.Len(t, running[harness.Shims], 1)
	shim, _, _ := strings.Cut(running[harness.Shims][0], " ")
	pid, err := strconv.Atoi(shim)
	require.NoError(t, err)
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	require.NotZero(t, waitExit(t, first))
	require.Equal(t, "Ready", inspect(t, n, pod.ID).GetSandbox().GetState())
	works(t, pod, "second")
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// Containers start and end as fast as possible, sequentially and in parallel. One shim serves all
// of them.
func TestContainersInATightLoop(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
	require.NoError(t, err)
	for i := range 8 { // init containers, and one that crashes
		c := startContainer(t, pod, fmt.Sprint("init-", i), harness.Run("true"))
		require.Zero(t, waitExit(t, c))
		require.NoError(t, c.Remove(t.Context()))
	}
	var beside errgroup.Group
	for i := range 4 {
		beside.Go(func() error {
			_, err := pod.StartContainer(t.Context(), fmt.Sprint("main-", i))
			return err
		})
	}
	require.NoError(t, beside.Wait())
	running, err := n.Census(t.Context())
	require.NoError(t, err)
	require.Len(t, running[harness.Shims], 1)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

func TestBadInput(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	userns := func(c *runtime.PodSandboxConfig) *runtime.UserNamespace {
		return c.Linux.SecurityContext.NamespaceOptions.UsernsOptions
	}
	for _, tc := range []struct {
		name    string
		change  harness.PodOption
		handler string
		code    codes.Code
		text    string
	}{
		{
			name:   "no metadata",
			change: func(c *runtime.PodSandboxConfig) { c.Metadata = nil },
			code:   codes.InvalidArgument, text: "no metadata",
		},
		{
			name: "two mappings",
			change: func(c *runtime.PodSandboxConfig) {
				userns(c).Uids = append(userns(c).Uids, &runtime.IDMapping{ContainerId: 65536, HostId: 900000, Length: 65536})
			},
			code: codes.InvalidArgument, text: "user namespace",
		},
		{
			name:   "length 0",
			change: func(c *runtime.PodSandboxConfig) { userns(c).Uids[0].Length = 0 },
			code:   codes.InvalidArgument, text: "length",
		},
		{
			name: "lengths that differ",
			change: func(c *runtime.PodSandboxConfig) {
				userns(c).Gids = []*runtime.IDMapping{{HostId: userns(c).Uids[0].HostId, Length: 65535}}
			},
			code: codes.InvalidArgument, text: "length",
		},
		{
			name:   "a range that reaches 2^32-1",
			change: harness.UserNS(4294901760, 65536),
			code:   codes.InvalidArgument, text: "4294967294",
		},
		{
			name:   "userns mode CONTAINER",
			change: func(c *runtime.PodSandboxConfig) { userns(c).Mode = runtime.NamespaceMode_CONTAINER },
			code:   codes.InvalidArgument, text: "CONTAINER",
		},
		{
			name:   "userns mode TARGET",
			change: func(c *runtime.PodSandboxConfig) { userns(c).Mode = runtime.NamespaceMode_TARGET },
			code:   codes.InvalidArgument, text: "TARGET",
		},
		{
			name: "network mode TARGET",
			change: func(c *runtime.PodSandboxConfig) {
				c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_TARGET
			},
			code: codes.InvalidArgument, text: "network namespace mode TARGET",
		},
		{
			name:   "unknown handler",
			change: func(*runtime.PodSandboxConfig) {}, handler: "nobody",
			code: codes.InvalidArgument, text: `runtime handler "nobody" isn't configured`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			handler := tc.handler
			if handler == "" {
				handler = harness.PodfsmHandler
			}
			err := failRun(t, n, handler, n.PodConfig("pod", tc.change))
			require.Equal(t, tc.code, status.Code(err), "%v", err)
			require.ErrorContains(t, err, tc.text)
			n.RequireClean(t, before)
		})
	}

	t.Run("no CNI configuration", func(t *testing.T) {
		files, err := filepath.Glob(filepath.Join(n.CNIConfDir(), "*"))
		require.NoError(t, err)
		require.NotEmpty(t, files)
		aside := t.TempDir()
		for _, file := range files {
			require.NoError(t, os.Rename(file, filepath.Join(aside, filepath.Base(file))))
		}
		err = failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
		require.ErrorContains(t, err, n.CNIConfDir())
		for _, file := range files {
			require.NoError(t, os.Rename(filepath.Join(aside, filepath.Base(file)), file))
		}
		n.RequireClean(t, before)
	})

	t.Run("no pause image", func(t *testing.T) {
		_, err := n.Images.RemoveImage(t.Context(), &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: harness.PauseImage}})
		require.NoError(t, err)
		without, err := n.Census(t.Context())
		require.NoError(t, err)
		err = failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		after, censusErr := n.Census(t.Context())
		require.NoError(t, censusErr)
		for _, category := range []string{harness.Containers, harness.Leases, harness.Sandboxes, harness.Tasks, harness.Shims, harness.SandboxDirs, harness.Cgroups, harness.Ledger} {
			require.Equal(t, without[category], after[category], category)
		}
		require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
		require.ErrorContains(t, err, harness.PauseImage)
		require.ErrorContains(t, err, "pinned_images.sandbox")
		list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
		require.NoError(t, err)
		require.Empty(t, list.GetSandboxes())
	})
}

// podfsm retries a failed removal itself. The kubelet got the error, sees the pod unchanged, and
// removes it again. After a restart that has lost the ledger's log, the pod is gone.
func TestRemovalRetriedLater(t *testing.T) {
	n, before := warmNode(t)
	for _, tc := range []struct {
		name string
		then func(*harness.Pod)
	}{
		{"removed again", func(pod *harness.Pod) { require.NoError(t, pod.StopAndRemove(t.Context())) }},
		{"restarted", func(pod *harness.Pod) {
			require.NoError(t, n.Kill(t.Context()))
			require.NoError(t, os.RemoveAll(filepath.Join(n.Dir(), "state/io.containerd.podsandbox.controller.v1.podfsm")))
			require.NoError(t, n.Start(t.Context()))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := runPod(t, n, n.PodConfig("pod"))
			require.NoError(t, pod.Stop(t.Context()))
			stopped, err := pod.Status(t.Context())
			require.NoError(t, err)
			require.NoError(t, n.Fault("remap_snapshot.undo.before", "1*error(injected)"))
			require.ErrorContains(t, pod.Remove(t.Context()), "injected")
			require.Eventually(t, func() bool { return inspect(t, n, pod.ID).GetSandbox().GetState() == "Removed" }, waitFor, tick)

			retried, err := pod.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, stopped.String(), retried.String())
			tc.then(pod)
			_, err = pod.Status(t.Context())
			require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
			require.Empty(t, settled(t, n))
			n.RequireClean(t, before)
		})
	}
}

// A stop of containerd interrupts a creation. The stopping daemon or the next one rolls it back.
func TestStopOfABurst(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	const pods = 8
	require.NoError(t, n.Fault("bridge.ADD", "block"))
	var burst sync.WaitGroup
	for i := range pods {
		burst.Go(func() { _, _ = n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig(fmt.Sprint("pod-", i))) })
	}
	require.NoError(t, n.Faults.WaitReached(t.Context(), "bridge.ADD", pods))
	require.NoError(t, n.Stop(t.Context()))
	burst.Wait()
	require.NoError(t, n.Heal())
	require.NoError(t, n.Start(t.Context()))
	n.RequireClean(t, before)
}
