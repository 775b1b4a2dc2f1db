package plugin

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// stockCounts are how many networks containerd's own metrics have counted.
func stockCounts(t *testing.T) (created, deleted uint64) {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	require.NoError(t, err)
	counts := map[string]uint64{}
	for _, family := range families {
		counts[family.GetName()] = family.GetMetric()[0].GetHistogram().GetSampleCount()
	}
	require.Contains(t, counts, "containerd_cri_sandbox_create_network_seconds")
	require.Contains(t, counts, "containerd_cri_sandbox_delete_network_seconds")
	return counts["containerd_cri_sandbox_create_network_seconds"], counts["containerd_cri_sandbox_delete_network_seconds"]
}

// Not parallel: the metrics are the process's.
func TestContainerdsMetricsCountNetworks(t *testing.T) {
	created, deleted := stockCounts(t)
	counted := func(wantCreated, wantDeleted uint64, when string) {
		t.Helper()
		nowCreated, nowDeleted := stockCounts(t)
		require.Equal(t, wantCreated, nowCreated-created, "created, %s", when)
		require.Equal(t, wantDeleted, nowDeleted-deleted, "deleted, %s", when)
	}
	w := newWorld(t)
	w.run(t, "a")
	counted(1, 0, "when it runs")
	w.host.fail(CaptureNetNS, errNoLuck)
	require.Error(t, w.Stop(inCRI(t), "a"))
	counted(1, 0, "when the pod is not off its network")
	w.host.heal(CaptureNetNS)
	require.NoError(t, w.Stop(inCRI(t), "a"))
	counted(1, 1, "when it is")
	require.NoError(t, w.Stop(inCRI(t), "a"))
	require.NoError(t, w.Shutdown(inCRI(t), "a"))
	counted(1, 1, "once")
	w.host.do[AttachNetwork] = func(context.Context, string) error { return errNoLuck }
	require.NoError(t, w.create(t, "b", named("other"), func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "u-2" }))
	_, err := w.Start(inCRI(t), "b")
	require.Error(t, err)
	counted(1, 1, "when a pod got no network")
}

func TestTook(t *testing.T) {
	begun := time.Now()
	try := func(step states.Event, operation lifecycle.Operation, seconds int) lifecycle.Try {
		return lifecycle.Try{Step: step, Operation: operation, Started: begun, Ended: begun.Add(time.Duration(seconds) * time.Second)}
	}
	unended := try(CaptureNetNS, lifecycle.OperationUndo, 0)
	unended.Ended = time.Time{}
	view := lifecycle.View{Tries: []lifecycle.Try{
		try(CaptureNetNS, lifecycle.OperationDo, 1), try(AttachNetwork, lifecycle.OperationDo, 2), try(DeclareReady, lifecycle.OperationDo, 4),
		try(AttachNetwork, lifecycle.OperationUndo, 8), try(AttachNetwork, lifecycle.OperationUndo, 16), unended,
	}}
	require.Equal(t, 3*time.Second, took(view, lifecycle.OperationDo, CaptureNetNS, AttachNetwork))
	require.Equal(t, 16*time.Second, took(view, lifecycle.OperationUndo, CaptureNetNS, AttachNetwork), "the last try")
}
