package integration

import (
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// Another containerd build, in its own module, has podfsm by one import. In full, the test also
// builds the long-term release.
func TestOwnContainerd(t *testing.T) {
	daemons := []harness.Daemon{harness.Own}
	if full() {
		daemons = append(daemons, harness.OwnLTS)
	}
	for _, daemon := range daemons {
		t.Run(string(daemon), func(t *testing.T) {
			n := harness.StartNode(t, harness.Config{Daemon: daemon})
			before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
			require.NoError(t, err)
			t.Run("pods", func(t *testing.T) {
				ours := startPod(t, n, harness.PodfsmHandler, n.PodConfig("ours"))
				stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
				inOurs, inStock := startContainer(t, ours, "main"), startContainer(t, stock, "main")
				require.NoError(t, n.Restart(t.Context()))
				for _, c := range []*harness.Container{inOurs, inStock} {
					require.Equal(t, "0\n", exec(t, c, "id", "-u"))
				}
				require.Equal(t, "Ready", inspect(t, n, ours.ID).GetSandbox().GetState())
				require.NotEmpty(t, podIPs(t, ours)[0])
			})
			n.RequireClean(t, before)
			t.Run("rollback", func(t *testing.T) {
				require.NoError(t, n.Fault("bridge.ADD.after", "error(no address)"))
				require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("fails")), "no address")
				require.NoError(t, n.Heal())
				n.RequireClean(t, before)
			})
		})
	}
}

// A node goes from an unmodified containerd to podfsm, back, and to podfsm again, while pods run.
// Pods of the stock handler keep it and work with both daemons. The pods of podfsm live on under
// the unmodified containerd, which can not end them, and podfsm adopts them again.
func TestFromStockAndBack(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.StockHandler)
	require.NoError(t, err)
	become := func(daemon harness.Daemon) {
		t.Helper()
		require.NoError(t, n.Stop(t.Context()))
		require.NoError(t, n.Use(t.Context(), daemon))
		require.NoError(t, n.Start(t.Context()))
	}
	become(harness.Stock)
	works := func(pod *harness.Pod, main *harness.Container, handler string) {
		t.Helper()
		status, err := pod.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
		require.Equal(t, handler, status.GetRuntimeHandler())
		require.NotEmpty(t, status.GetNetwork().GetIp())
		require.Equal(t, "0\n", exec(t, main, "id", "-u"))
	}

	t.Run("pods", func(t *testing.T) {
		old := startPod(t, n, harness.StockHandler, n.PodConfig("old"))
		oldMain := startContainer(t, old, "main")
		goes := startPod(t, n, harness.StockHandler, n.PodConfig("goes"))
		works(old, oldMain, harness.StockHandler)

		become(harness.Podfsm)
		works(old, oldMain, harness.StockHandler)
		startContainer(t, old, "later")
		require.NoError(t, goes.StopAndRemove(t.Context()), "stock pods can be ended by podfsm's build")
		ours := startPod(t, n, harness.PodfsmHandler, n.PodConfig("ours"))
		ourMain := startContainer(t, ours, "main")
		works(ours, ourMain, harness.PodfsmHandler)
		stopped := startPod(t, n, harness.PodfsmHandler, n.PodConfig("stopped"))
		pid, err := ours.Pid(t.Context())
		require.NoError(t, err)
		same, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/net")
		require.NoError(t, err)

		become(harness.Stock)
		works(old, oldMain, harness.StockHandler)
		inBetween := startPod(t, n, harness.StockHandler, n.PodConfig("in-between"))
		require.NoError(t, unix.Kill(pid, 0), "the pod of podfsm lives on")
		require.Error(t, stopped.Stop(t.Context()), "nobody can end one")

		become(harness.Podfsm)
		works(ours, ourMain, harness.PodfsmHandler)
		again, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/net")
		require.NoError(t, err)
		require.Equal(t, same, again)
		works(old, oldMain, harness.StockHandler)
		require.NoError(t, inBetween.StopAndRemove(t.Context()))
		require.NoError(t, stopped.StopAndRemove(t.Context()))
		require.Equal(t, "Ready", inspect(t, n, ours.ID).GetSandbox().GetState())
	})
	n.RequireClean(t, before)
}
