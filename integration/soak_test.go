package integration

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

var seed = flag.Uint64("seed", 0, "replay a soak; 0 takes a new seed")

// TestSoak kills containerd at random moments while several pods at a time are created, stopped and removed.
func TestSoak(t *testing.T) {
	kills := 8
	if full() {
		kills = 200
	}
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("replay with -seed %d", *seed)
	random := rand.New(rand.NewPCG(*seed, 0))

	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	var pods atomic.Int64
	for i := range kills {
		ctx, cancel := context.WithCancel(t.Context())
		var workers sync.WaitGroup
		for range 4 {
			workers.Go(func() { churn(ctx, n, &pods) })
		}
		moment := time.NewTimer(time.Duration(random.IntN(1200)) * time.Millisecond)
		<-moment.C
		require.NoError(t, n.Kill(t.Context()))
		cancel()
		workers.Wait()
		require.NoError(t, n.Start(t.Context()))
		finish(t, n)
		removeContainers(t, n)
		if i%10 == 9 || i == kills-1 {
			n.RequireClean(t, before)
		}
	}
}

// churn runs pods with a container, and is rid of them again, until containerd is killed.
func churn(ctx context.Context, n *harness.Node, pods *atomic.Int64) {
	for ctx.Err() == nil {
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig(fmt.Sprint("pod-", pods.Add(1))))
		if err != nil {
			return
		}
		if _, err := pod.StartContainer(ctx, "main"); err != nil {
			return
		}
		if err := pod.StopAndRemove(ctx); err != nil {
			return
		}
	}
}

// removeContainers removes what containerd's own service, killed while it starts or ends a container of a pod, leaves of that
// container: its cgroup, which the kubelet would remove with the pod's, its bundle on the way to be deleted, and the lease on its
// snapshot, which ends after a day. Those of pause are podfsm's to remove.
func removeContainers(t *testing.T, n *harness.Node) {
	t.Helper()
	log := n.Log()
	ofContainer := func(id string) bool {
		return strings.Contains(log, fmt.Sprintf(`Generated id \"%s\" for container`, id))
	}
	cgroups, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", filepath.Base(n.Dir()), "pod*", "*/cgroup.procs"))
	require.NoError(t, err)
	for _, procs := range cgroups {
		if dir := filepath.Dir(procs); ofContainer(filepath.Base(dir)) {
			require.NoError(t, os.Remove(dir))
		}
	}
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	held, err := n.Containerd.LeasesService().List(ctx)
	require.NoError(t, err)
	for _, lease := range held {
		if _, expires := lease.Labels["containerd.io/gc.expire"]; expires {
			require.NoError(t, n.Containerd.LeasesService().Delete(ctx, lease))
		}
	}
	bundles, err := filepath.Glob(filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io/.*"))
	require.NoError(t, err)
	for _, bundle := range bundles {
		if ofContainer(strings.TrimPrefix(filepath.Base(bundle), ".")) {
			require.NoError(t, os.RemoveAll(bundle))
		}
	}
}
