package integration

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

const (
	// leakage is how many bytes a round may add to the heap. The history of ended sandboxes is
	// bounded, and full after the first rounds.
	leakage = 100
	// heapNoise is how much two readings of the heap may differ without a reason.
	heapNoise = 64 << 10
	// strays are goroutines and descriptors that come and go: of a call that has just been
	// answered, of a shim that is ending.
	strays = 6
)

// TestMemory runs thousands of pods and bounds what containerd holds afterwards.
func TestMemory(t *testing.T) {
	first, rounds := 140, 120
	if full() {
		rounds = 10_000
	}
	// At level debug the log would cost more than the pods.
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, TOML: "debug.level = 'warn'"})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	// Without a subscriber containerd's own service keeps the events of each pod for five minutes.
	events, err := n.Events(t.Context())
	require.NoError(t, err)
	defer events.Close()

	pods := &podMill{n: n}
	for _, tc := range []struct {
		name   string
		fault  string // of the start of each pod; "" is none
		rounds int
		round  func(i int) error
	}{
		{"starts that fail with pause", "start_pause.do.after", rounds * 9 / 10, pods.fail},
		{"starts that fail in the network", "bridge.ADD", rounds / 10, pods.fail},
		{"start, stop, remove", "", rounds, pods.cycle},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.fault != "" {
				require.NoError(t, n.Fault(tc.fault, "error(no luck)"))
			}
			pods.run(t, first, tc.round)
			early, err := n.Memory(t.Context())
			require.NoError(t, err)
			t.Logf("after %d pods: %v", first, early)
			late := early
			const checkpoints = 4
			for i := range checkpoints {
				start := time.Now()
				pods.run(t, tc.rounds/checkpoints, tc.round)
				each := time.Since(start) / time.Duration(tc.rounds/checkpoints)
				late, err = n.Memory(t.Context())
				require.NoError(t, err)
				t.Logf("after %d more, %v each: %v", (i+1)*tc.rounds/checkpoints, each.Round(time.Millisecond), late)
			}
			require.LessOrEqual(t, late.Heap-early.Heap, heapNoise+leakage*tc.rounds, "bytes of heap")
			require.LessOrEqual(t, late.Goroutines-early.Goroutines, strays)
			require.LessOrEqual(t, late.Files-early.Files, strays)
			require.NoError(t, n.Heal())
		})
	}
	n.RequireClean(t, before)
}

// podMill runs pods of several kinds in parallel.
type podMill struct {
	n     *harness.Node
	count atomic.Int64
}

func (m *podMill) run(t *testing.T, rounds int, round func(i int) error) {
	t.Helper()
	const parallel = 6
	var done atomic.Int64
	errs := make(chan error, parallel)
	var workers sync.WaitGroup
	for range parallel {
		workers.Go(func() {
			for i := done.Add(1); i <= int64(rounds); i = done.Add(1) {
				if err := round(int(i)); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	workers.Wait()
	close(errs)
	require.NoError(t, <-errs)
}

// config returns the configuration of a new pod. All pods share one parent cgroup, as if the
// kubelet removed theirs at once.
func (m *podMill) config(options ...harness.PodOption) *runtime.PodSandboxConfig {
	c := m.n.PodConfig(fmt.Sprint("pod-", m.count.Add(1)), options...)
	c.Linux.CgroupParent = "/" + m.n.Name() + "/pods"
	return c
}

// fail starts a pod whose start fails.
func (m *podMill) fail(int) error {
	if pod, err := m.n.RunPod(context.Background(), harness.PodfsmHandler, m.config()); err == nil {
		return fmt.Errorf("pod %q has started", pod.ID)
	}
	return nil
}

// cycle starts, stops and removes a pod. Every sixteenth pod has its own ids and network, which are
// expensive.
func (m *podMill) cycle(i int) error {
	config := m.config()
	if i%16 != 0 {
		config = m.config(harness.HostNetwork())
	}
	pod, err := m.n.RunPod(context.Background(), harness.PodfsmHandler, config)
	if err != nil {
		return err
	}
	return pod.StopAndRemove(context.Background())
}
