package integration

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// With any damage of the ledger's files, containerd starts and serves, stock pods don't notice, and
// podfsm's pods can be inspected, stopped and removed.
func TestLedgerDamage(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	_, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	stock := startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
	visitor := startContainer(t, stock, "visitor")
	before, err := n.Rest(t.Context())
	require.NoError(t, err)

	for _, damaged := range []struct {
		name  string
		files []string
	}{
		{"the log", []string{ledgerLog}},
		{"the durable log", []string{durableLog}},
		{"both", []string{ledgerLog, durableLog}},
	} {
		for _, damage := range damages {
			if !full() && !damage.soon {
				continue
			}
			t.Run(damaged.name+" "+damage.name, func(t *testing.T) {
				pods := []*harness.Pod{runPod(t, n, n.PodConfig("private")), runPod(t, n, n.PodConfig("host-network", harness.HostNetwork()))}
				interrupt(t, n, "attach_network.do.after")
				for _, file := range damaged.files {
					damage.do(t, filepath.Join(n.Dir(), file))
				}
				require.NoError(t, n.Start(t.Context()))
				require.NoError(t, n.Heal())

				require.Equal(t, "0\n", exec(t, visitor, "id", "-u"))
				for _, pod := range pods {
					requireKnown(t, n, pod)
				}
				removeOurs(t, n)
				removeKept(t, n)
				if len(damaged.files) == 2 {
					// The attachments of the private pod and of the half-made one may be lost. The
					// private pod is detached with the current configuration. The resources of the
					// half-made pod outside of its namespace stay until the GC of the network.
					after, err := n.Census(t.Context())
					require.NoError(t, err)
					addresses := len(after[harness.IPAM]) - len(before[harness.IPAM])
					require.LessOrEqual(t, addresses, 1)
					if damage.total {
						require.Equal(t, 1, addresses)
					}
					before[harness.IPAM], before[harness.IPTables] = after[harness.IPAM], after[harness.IPTables]
				}
				n.RequireClean(t, before)
			})
		}
	}
}

// requireKnown requires that CRI and podfsm know a pod.
func requireKnown(t *testing.T, n *harness.Node, pod *harness.Pod) {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: pod.ID}})
	require.NoError(t, err)
	require.Len(t, list.GetItems(), 1)
	inspect(t, n, pod.ID)
}

// removeOurs stops and removes the listed pods of podfsm's handler.
func removeOurs(t *testing.T, n *harness.Node) {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	for _, item := range list.GetItems() {
		if item.GetRuntimeHandler() != harness.PodfsmHandler {
			continue
		}
		_, err := n.Runtime.StopPodSandbox(t.Context(), &runtime.StopPodSandboxRequest{PodSandboxId: item.GetId()})
		require.NoError(t, err)
		_, err = n.Runtime.RemovePodSandbox(t.Context(), &runtime.RemovePodSandboxRequest{PodSandboxId: item.GetId()})
		require.NoError(t, err)
	}
}

// With a full disk under a directory of the ledger, no pod is created, and the error has the
// remedy. Pods can be stopped and removed, and those don't come back.
func TestLedgerDiskFull(t *testing.T) {
	for _, tc := range []struct{ name, file string }{
		{"root directory", durableLog}, {"state directory", ledgerLog},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := harness.StartNode(t, harness.Config{})
			_, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
			require.NoError(t, err)
			disk := filepath.Dir(filepath.Join(n.Dir(), tc.file))
			require.NoError(t, n.Stop(t.Context()))
			require.NoError(t, unix.Mount("podfsm-test", disk, "tmpfs", 0, "size=1m"))
			require.NoError(t, n.Start(t.Context()))
			before, err := n.Rest(t.Context())
			require.NoError(t, err)

			pod := runPod(t, n, n.PodConfig("before"))
			fill(t, filepath.Join(disk, "filler"))
			for range 2 {
				_, err = n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("refused"))
				require.Equal(t, codes.ResourceExhausted, status.Code(err), "%v", err)
				require.ErrorContains(t, err, "free some space")
				require.NoError(t, n.Restart(t.Context()), "the node's other pods can't wait for space")
			}
			now, err := pod.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, now.GetState())
			require.NoError(t, pod.StopAndRemove(t.Context()))
			require.NoError(t, n.Restart(t.Context()))
			list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
			require.NoError(t, err)
			require.Empty(t, list.GetSandboxes())

			require.NoError(t, os.Remove(filepath.Join(disk, "filler")))
			require.NoError(t, runPod(t, n, n.PodConfig("after")).StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}
}

// fill writes a file until nothing more fits.
func fill(t *testing.T, file string) {
	t.Helper()
	f, err := os.Create(file)
	require.NoError(t, err)
	defer f.Close()
	for size := 4096; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			require.ErrorIs(t, err, unix.ENOSPC)
			size /= 2
		}
	}
}
