package integration

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// TestThousandSandboxes runs a thousand sandboxes at the same time, each with its own ids of a pool
// that is just large enough. Only the OCI runtime is a fake.
func TestThousandSandboxes(t *testing.T) {
	pods, parallel := 60, 60
	if full() {
		pods, parallel = 1000, 100 // at a time, as many as the machine's network setup finishes within the kubelet's patience
	}
	n := harness.StartNode(t, harness.Config{TOML: "debug.level = 'warn'\n" + usernsTOML(`mode = "auto"`, poolOf(pods))})
	bridge := n.DefaultChain()[0]
	bridge["ipMasq"] = false // a thousand chains in one table take iptables minutes
	require.NoError(t, n.SetChain(t.Context(), bridge))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	start := time.Now()
	var mu sync.Mutex
	all := map[string]*harness.Pod{}
	atOnce(t, pods, parallel, func(ctx context.Context, i int) error {
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig(fmt.Sprintf("pod-%d", i), harness.HostUsers()))
		if err != nil {
			return fmt.Errorf("pod %d: %w", i, err)
		}
		mu.Lock()
		defer mu.Unlock()
		all[pod.ID] = pod
		return nil
	})
	t.Logf("%d sandboxes are up after %.1f s, %d started at a time", pods, time.Since(start).Seconds(), parallel)

	seen, err := n.Sandboxes().IDs(t.Context(), &podfsmv1.IDsRequest{})
	require.NoError(t, err)
	require.Equal(t, []uint32{uint32(pods), uint32(pods), 0}, []uint32{seen.GetPool().GetRanges(), seen.GetPool().GetHeld(), seen.GetPool().GetFree()})
	owners := map[uint32]string{}
	for _, h := range seen.GetHolders() {
		first := h.GetUserns().GetUids()[0].GetHostId()
		require.Empty(t, owners[first], "one range, one sandbox")
		owners[first] = h.GetSandboxId()
		require.Equal(t, first, hostUID(t, n, all[h.GetSandboxId()]), "what its process has")
	}
	require.Len(t, owners, pods)
	requireRefused(t, n, n.PodConfig("one-too-many", harness.HostUsers()), codes.ResourceExhausted, fmt.Sprintf("%d are held", pods))

	start = time.Now()
	running := slices.Collect(maps.Values(all))
	atOnce(t, pods, parallel, func(ctx context.Context, i int) error { return running[i].StopAndRemove(ctx) })
	t.Logf("they are gone after %.1f s", time.Since(start).Seconds())
	n.RequireClean(t, before)
	seen, err = n.Sandboxes().IDs(t.Context(), &podfsmv1.IDsRequest{})
	require.NoError(t, err)
	require.EqualValues(t, pods, seen.GetPool().GetFree(), "%v", seen.GetPool().GetQuarantine())
}
