package integration

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// A kill is one cell of the kill matrix: containerd is killed by SIGKILL while something is at a point.
type kill struct {
	phase string // what is under way
	point string // where it is
}

// The phases of the matrix.
const (
	creating    = "create"
	rollingBack = "rollback"
	stopping    = "stop"
	removing    = "remove"
	recovering  = "recovery"
)

// kills is the whole matrix: before a step acts (its intent is on record), while it acts (in the real part), and after it
// acted (its result isn't on record); likewise for what undoes it.
func kills() []kill {
	var all []kill
	add := func(phase string, points ...string) {
		for _, point := range points {
			all = append(all, kill{phase, point})
		}
	}
	for _, step := range steps {
		add(creating, step+".do.before", step+".do.after")
		add(rollingBack, step+".undo.before", step+".undo.after")
		add(recovering, step+".undo.before", step+".undo.after")
	}
	add(creating, "runc.create", "runc.create.after", "runc.start", "runc.start.after",
		"bridge.ADD", "host-local.ADD", "host-local.ADD.after", "bridge.ADD.after", "portmap.ADD", "portmap.ADD.after")
	add(rollingBack, "portmap.DEL", "bridge.DEL", "host-local.DEL", "host-local.DEL.after", "bridge.DEL.after", "runc.delete", "runc.delete.after")
	add(stopping, "start_pause.stop.before", "runc.kill", "runc.kill.after", "runc.delete", "runc.delete.after", "start_pause.stop.after",
		"attach_network.undo.before", "portmap.DEL", "bridge.DEL", "host-local.DEL", "host-local.DEL.after", "bridge.DEL.after", "attach_network.undo.after",
		"capture_netns.undo.before", "capture_netns.undo.after")
	for _, step := range []string{"declare_ready", "start_pause", "remap_snapshot", "allocate_ids"} {
		add(removing, step+".undo.before", step+".undo.after")
	}
	return all
}

func TestKillMatrix(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, cell := range kills() {
		t.Run(cell.phase+" "+cell.point, func(t *testing.T) {
			killAt(t, n, cell)
			require.NoError(t, n.Start(t.Context()))
			require.NoError(t, n.Faults.Release(cell.point), "what has outlived the daemon goes on")
			finish(t, n)
			n.RequireClean(t, before)
			require.NoError(t, n.Restart(t.Context()))
			require.NoError(t, n.Heal())
			n.RequireClean(t, before)
		})
	}
}

// killAt brings a pod to the cell's point and kills containerd there.
func killAt(t *testing.T, n *harness.Node, cell kill) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	defer func() { // the call ends with the daemon
		cancel()
		<-done
	}()
	reach := func(point string, act func()) {
		require.NoError(t, n.Fault(point, "1*block"))
		go func() {
			defer close(done)
			act()
		}()
		require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
		require.NoError(t, n.Kill(t.Context()))
	}
	config := n.PodConfig("pod")
	run := func() { _, _ = n.RunPod(ctx, harness.PodfsmHandler, config) }

	switch cell.phase {
	case creating:
		reach(cell.point, run)
	case rollingBack:
		require.NoError(t, n.Fault("declare_ready.do.after", "1*error(not ready)"))
		reach(cell.point, run)
	case recovering:
		// The first kill leaves a creation to roll back, the second comes while that is done.
		require.NoError(t, n.Fault("declare_ready.do.after", "1*die"))
		run()
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Fault(cell.point, "1*block"))
		reach(cell.point, func() { _ = n.Start(ctx) })
	case stopping, removing:
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, config)
		require.NoError(t, err)
		if cell.phase == removing {
			require.NoError(t, pod.Stop(t.Context()))
			reach(cell.point, func() { _ = pod.Remove(ctx) })
		} else {
			reach(cell.point, func() { _ = pod.Stop(ctx) })
		}
	}
}

// finish does what the kubelet does after a restart: pods that are listed must be sound, and can be stopped and removed.
func finish(t *testing.T, n *harness.Node) {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	for _, item := range list.GetItems() {
		id := item.GetId()
		if item.GetState() == runtime.PodSandboxState_SANDBOX_READY {
			status, err := n.Runtime.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: id})
			require.NoError(t, err)
			require.NotEmpty(t, status.GetStatus().GetNetwork().GetIp(), "a pod that is ready works")
		}
		_, err := n.Runtime.StopPodSandbox(t.Context(), &runtime.StopPodSandboxRequest{PodSandboxId: id})
		require.NoError(t, err)
		_, err = n.Runtime.RemovePodSandbox(t.Context(), &runtime.RemovePodSandboxRequest{PodSandboxId: id})
		require.NoError(t, err)
	}
}
