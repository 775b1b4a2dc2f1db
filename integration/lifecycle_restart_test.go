package integration

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

func TestRestart(t *testing.T) {
	for _, tc := range []struct {
		name string
		stop func(*harness.Node, context.Context) error
	}{
		{"SIGTERM", (*harness.Node).Stop},
		{"SIGKILL", (*harness.Node).Kill},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := harness.StartNode(t, harness.Config{})
			before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
			require.NoError(t, err)

			t.Run("pods", func(t *testing.T) {
				private := startPod(t, n, harness.PodfsmHandler, n.PodConfig("private"))
				hostUsers := startPod(t, n, harness.PodfsmHandler, n.PodConfig("host-users", harness.HostUsers()))
				hostNet := startPod(t, n, harness.PodfsmHandler, n.PodConfig("host-net", harness.HostNetwork()))
				server := startContainer(t, private, "server", harness.Run("httpd", "-f", "-p", "80", "-h", "/www"))
				startContainer(t, hostUsers, "main")
				startContainer(t, hostNet, "main")
				killed := startPod(t, n, harness.PodfsmHandler, n.PodConfig("killed"))
				// The pod has no containers, because its pause is killed below. A shim with containers would live on.
				// The harness keeps sockets in a directory of its own, where such a shim can't find them any more.
				quiet := startPod(t, n, harness.PodfsmHandler, n.PodConfig("quiet"))
				killedPid, err := killed.Pid(t.Context())
				require.NoError(t, err)
				pods := []*harness.Pod{private, hostUsers, hostNet}
				seen := sight(t, n, pods...)

				require.NoError(t, tc.stop(n, t.Context()))
				require.NoError(t, unix.Kill(killedPid, unix.SIGKILL)) // while the daemon is down
				require.NoError(t, n.Start(t.Context()))

				now, err := killed.Status(t.Context())
				require.NoError(t, err)
				require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, now.GetState())
				require.NoError(t, killed.StopAndRemove(t.Context()))
				requireSame(t, seen, sight(t, n, pods...))

				for _, pod := range pods {
					_, err := n.RunPod(t.Context(), harness.PodfsmHandler, pod.Config)
					require.Equal(t, codes.AlreadyExists, status.Code(err), "a duplicate is refused: %v", err)
				}

				require.Equal(t, "0\n", exec(t, server, "id", "-u"))
				late := startContainer(t, private, "late")
				require.Equal(t, harness.IndexPage, exec(t, late, "wget", "-qO-", "http://127.0.0.1/"))
				events, err := n.Events(t.Context())
				require.NoError(t, err)
				defer events.Close()
				pid, err := quiet.Pid(t.Context())
				require.NoError(t, err)
				require.NoError(t, unix.Kill(pid, unix.SIGKILL))
				require.Eventually(t, func() bool {
					now, err := quiet.Status(t.Context())
					return err == nil && now.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY
				}, waitFor, tick, "the exit of an adopted pod is seen")
				stopped := func(all []*runtime.ContainerEventResponse) []*runtime.ContainerEventResponse {
					return harness.OfType(all, quiet.ID, runtime.ContainerEventType_CONTAINER_STOPPED_EVENT)
				}
				all, err := events.WaitFor(t.Context(), func(all []*runtime.ContainerEventResponse) bool { return len(stopped(all)) > 0 })
				require.NoError(t, err)
				require.Len(t, stopped(all), 1)
				told := stopped(all)[0].GetPodSandboxStatus()
				require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, told.GetState())
				require.Equal(t, runtime.NamespaceMode_POD, told.GetLinux().GetNamespaces().GetOptions().GetNetwork())
			})
			n.RequireClean(t, before)
		})
	}
}

// The look at one pod hangs at the restart: the others are adopted, CRI serves in time, and the pod
// is looked at again.
func TestRestartWhileALookHangs(t *testing.T) {
	t.Parallel() // it mostly waits
	n, before := warmNode(t)
	pods := []*harness.Pod{runPod(t, n, n.PodConfig("a")), runPod(t, n, n.PodConfig("b")), runPod(t, n, n.PodConfig("c"))}
	ended := func() (count int) {
		for _, item := range listed(t, n) {
			if item.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY {
				count++
			}
		}
		return count
	}
	pids := make([]int, len(pods))
	for i, pod := range pods {
		pid, err := pod.Pid(t.Context())
		require.NoError(t, err)
		pids[i] = pid
	}
	require.NoError(t, n.Kill(t.Context()))
	for _, pid := range pids {
		require.NoError(t, unix.Kill(pid, unix.SIGKILL)) // so that each look has something to find
	}
	for _, pid := range pids {
		require.Eventually(t, func() bool { return unix.Kill(pid, 0) == unix.ESRCH }, waitFor, tick, "its shim has noticed")
	}
	require.NoError(t, n.Fault("start_pause.exited@a.before", "block"))
	require.NoError(t, n.Start(t.Context()), "CRI serves while the look at one pod hangs")
	require.Equal(t, len(pods)-1, ended(), "the look at one pod hangs")
	require.NoError(t, n.Heal())
	require.Eventually(t, func() bool { return ended() == len(pods) }, waitFor, tick, "it is looked at again")
	for _, pod := range pods {
		require.NoError(t, pod.StopAndRemove(t.Context()))
	}
	n.RequireClean(t, before)
}

// The log in the state directory is lost while the daemon is down, without a reboot. Pods with a
// living pause are adopted unchanged, a pod with a dead pause is not ready, and a half-made pod is
// rolled back.
func TestRestartWithoutTheStateLog(t *testing.T) {
	c := modesConfig()
	c.Daemon = harness.TestDaemon
	n, before := startNodeWithPool(t, c)
	t.Run("pods", func(t *testing.T) {
		var pods []*harness.Pod
		for _, mode := range append(slices.Clone(userModes), hostUsers) {
			pods = append(pods, startPod(t, n, mode.handler, n.PodConfig(strings.ReplaceAll(mode.name, " ", "-"), mode.option)))
		}
		pods = append(pods, startPod(t, n, harness.PodfsmHandler, n.PodConfig("host-net", harness.HostNetwork())))
		var containers []*harness.Container
		for _, pod := range pods[1:] { // the first one has no shim
			containers = append(containers, startContainer(t, pod, "main"))
		}
		killed := startPod(t, n, harness.PodfsmHandler, n.PodConfig("killed"))
		killedPid, err := killed.Pid(t.Context())
		require.NoError(t, err)
		seen := sightWithout(t, n, "podfsm", pods...) // the times of the steps are lost

		interrupt(t, n, "declare_ready.do.before")
		require.NoError(t, unix.Kill(killedPid, unix.SIGKILL))
		require.NoError(t, os.Remove(filepath.Join(n.Dir(), ledgerLog)))
		require.NoError(t, n.Start(t.Context()))
		require.NoError(t, n.Heal())

		for restart := range 2 { // the second restart reads the new records
			requireSame(t, seen, sightWithout(t, n, "podfsm", pods...))
			for _, container := range containers {
				require.Equal(t, "0\n", exec(t, container, "id", "-u"))
			}
			if restart == 0 {
				require.NoError(t, n.Kill(t.Context()))
				require.NoError(t, n.Start(t.Context()))
			}
		}
		works(t, pods[0], "late")
		now, err := killed.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, now.GetState())
		require.NoError(t, killed.StopAndRemove(t.Context()))
		require.Len(t, listed(t, n), len(pods), "the half-made one is not listed")

		pid, err := pods[0].Pid(t.Context())
		require.NoError(t, err)
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
		require.Eventually(t, func() bool {
			now, err := pods[0].Status(t.Context())
			return err == nil && now.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY
		}, waitFor, tick, "the exit of an adopted pod is seen")
	})
	removeKept(t, n)
	n.RequireClean(t, before)
}
