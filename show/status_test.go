package show

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

func TestStatus(t *testing.T) {
	began := time.Now().Add(-time.Minute)
	view := func(id string, state states.State, steps ...lifecycle.StepView) lifecycle.View {
		spec := &records.Spec{Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: id, Namespace: "default"}}}
		return lifecycle.View{Key: ledger.Key{Namespace: records.Namespace, ID: id}, Spec: spec, State: state, Steps: steps}
	}
	done := func(name states.Event, took time.Duration) lifecycle.StepView {
		return lifecycle.StepView{Name: name, Status: lifecycle.StepDone, Started: began, Duration: took}
	}
	views := []lifecycle.View{
		view("fast", states.Ready, done("start_pause", time.Second), done("start_shim", time.Hour), lifecycle.StepView{Name: "attach_network"}),
		view("slow", states.Ready, done("attach_network", 2*time.Second)),
		view("pending", states.CleanupOwed),
	}
	status := Status(views)
	require.Equal(t, map[string]uint32{"Ready": 2, "CleanupOwed": 1}, status.GetSandboxes())
	require.EqualValues(t, 1, status.GetPendingCleanups())
	require.Equal(t, "attach_network", status.GetSlowestStep().GetStep(), "containers' steps are not of the creation")
	require.Equal(t, "slow", status.GetSlowestStep().GetPodName())
	require.Equal(t, 2*time.Second, status.GetSlowestStep().GetDuration().AsDuration())

	hanging := lifecycle.StepView{Name: "capture_netns", Status: lifecycle.StepRunning, Started: began}
	slowest := Status(append(views, view("hangs", "PauseStarted", hanging))).GetSlowestStep()
	require.Equal(t, "capture_netns", slowest.GetStep())
	require.Nil(t, slowest.GetDuration(), "it is running")
	require.Nil(t, Status(nil).GetSlowestStep())
}
