package integration

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// A drain begins while pods are created in parallel. At its end no pod is left, and none comes
// until the drain is canceled.
func TestDrainWhilePodsCome(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	var callers sync.WaitGroup
	var ran atomic.Int32
	some := make(chan struct{})
	errs := make([]error, 4)
	for caller := range errs {
		callers.Go(func() {
			for i := 0; errs[caller] == nil; i++ {
				_, errs[caller] = n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig(fmt.Sprintf("pod-%d-%d", caller, i)))
				if ran.Add(1) == 4 {
					close(some)
				}
			}
		})
	}
	<-some
	stdout, stderr, code := cli(t, n, "drain", "--config=/dev/null", "--force", "--wait=1m")
	left, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Zero(t, code, "%s%s", stdout, stderr)
	require.Empty(t, left.GetSandboxes())
	callers.Wait()
	for _, err := range errs {
		require.Contains(t, []codes.Code{codes.Unavailable, codes.Aborted}, status.Code(err), "refused, or ended while it was being made: %v", err)
	}
	require.Empty(t, listed(t, n))

	_, stderr, code = cli(t, n, "drain", "--config=/dev/null", "--cancel")
	require.Zero(t, code, stderr)
	n.RequireClean(t, before)
	runOnce(t, n, n.PodConfig("after"))
}
