package integration

import (
	"context"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestReboot simulates a reboot while pods are ready, stopped, half made, ended, or have a pending
// cleanup.
func TestReboot(t *testing.T) {
	for _, tc := range []struct {
		name              string
		keepState, killed bool
	}{
		{name: "state on a tmpfs"},
		{name: "state on disk", keepState: true},
		{name: "state on a tmpfs, killed while it recovers", killed: true},
		{name: "state on disk, killed while it recovers", keepState: true, killed: true},
	} {
		if !full() && tc.keepState != tc.killed {
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			n, before := warmNode(t)
			old := []*harness.Pod{
				runPod(t, n, n.PodConfig("private")),
				runPod(t, n, n.PodConfig("host-users", harness.HostUsers())),
				runPod(t, n, n.PodConfig("host-net", harness.HostNetwork())),
				runPod(t, n, n.PodConfig("stopped")),
			}
			startContainer(t, old[0], "main")
			require.NoError(t, old[3].Stop(t.Context()))
			seen := make([]*runtime.PodSandboxStatus, len(old))
			for i, pod := range old {
				var err error
				seen[i], err = pod.Status(t.Context())
				require.NoError(t, err)
			}
			require.NoError(t, runPod(t, n, n.PodConfig("ended")).StopAndRemove(t.Context()))
			ended := looked(t, n, "default/ended")
			leaveRollbackPending(t, n)
			rebootInCreation(t, n, tc.keepState)

			// DEL uses the recorded configuration, not the current one.
			require.NoError(t, n.SetChain(t.Context()))
			if tc.killed {
				require.NoError(t, n.Fault("attach_network.undo.before", "1*block"))
				require.NoError(t, n.Start(t.Context()))
				require.NoError(t, n.Faults.WaitReached(t.Context(), "attach_network.undo.before", 1))
				require.NoError(t, n.Kill(t.Context()))
			}
			require.NoError(t, n.Start(t.Context()))

			t.Run("old pods are listed as not ready, others aren't", func(t *testing.T) {
				requireListed(t, n, seen)
			})
			t.Run("what they had is undone before anybody asks", func(t *testing.T) {
				states := settled(t, n)
				for _, pod := range old {
					require.Equal(t, "Stopped", states[pod.ID])
				}
				require.Len(t, states, len(old), "half-made pods and pending rollbacks are gone")
				census, err := n.Census(t.Context())
				require.NoError(t, err)
				require.Equal(t, before[harness.IPAM], census[harness.IPAM], "addresses")
				require.Len(t, census[harness.NetNSMounts], 1, "the node's own")
				pins, err := filepath.Glob(filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/netns/*"))
				require.NoError(t, err)
				require.Empty(t, pins)
				requireListed(t, n, seen)
			})
			t.Run("what became of a pod is still known", func(t *testing.T) {
				require.True(t, proto.Equal(ended, looked(t, n, "default/ended")))
				require.Regexp(t, `(?m)^attach_network +`, timelineOf(t, n, "default/ended"))
			})
			t.Run("the next attempt of a pod runs at once", func(t *testing.T) {
				require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
				next := proto.CloneOf(old[0].Config)
				next.Metadata.Attempt++
				pod := runPod(t, n, next)
				works(t, pod, "next")
				require.NoError(t, pod.StopAndRemove(t.Context()))
			})
			require.NoError(t, n.Restart(t.Context()))
			requireListed(t, n, seen)
			for _, pod := range old {
				require.NoError(t, pod.StopAndRemove(t.Context()))
			}
			require.Empty(t, listed(t, n))
			after, err := n.WarmUp(t.Context(), harness.PodfsmHandler) // the bridge, as before
			require.NoError(t, err)
			delete(before, harness.NetNSMounts) // the node's own namespace is a new one
			delete(after, harness.NetNSMounts)
			require.Empty(t, before.Diff(after))
		})
	}
}

// leaveRollbackPending leaves a failed pod whose DEL is pending until the faults are healed.
func leaveRollbackPending(t *testing.T, n *harness.Node) {
	t.Helper()
	require.NoError(t, n.Fault("declare_ready.do.after", "1*error(not ready)"))
	require.NoError(t, n.Fault("bridge.DEL", "error(no luck)"))
	_, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pending"))
	require.ErrorContains(t, err, "the cleanup is pending")
}

// rebootInCreation reboots during the creation of a pod that has an address already.
func rebootInCreation(t *testing.T, n *harness.Node, keepState bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var calls sync.WaitGroup
	defer calls.Wait()
	defer cancel()
	require.NoError(t, n.Fault("attach_network.do.after", "1*block"))
	calls.Go(func() { _, _ = n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("half-made")) })
	require.NoError(t, n.Faults.WaitReached(t.Context(), "attach_network.do.after", 1))
	require.NoError(t, n.Reboot(t.Context(), keepState))
	require.NoError(t, n.Heal())
}

// requireListed requires that the kubelet sees exactly these pods, unchanged except that they are
// not ready.
func requireListed(t *testing.T, n *harness.Node, seen []*runtime.PodSandboxStatus) {
	t.Helper()
	items := listed(t, n)
	require.Len(t, items, len(seen))
	for _, was := range seen {
		is, err := n.FindPod(was.GetId(), nil).Status(t.Context())
		require.NoError(t, err)
		want := proto.CloneOf(was)
		want.State, want.Network = runtime.PodSandboxState_SANDBOX_NOTREADY, is.GetNetwork()
		require.True(t, proto.Equal(want, is), "was %v, is %v", want, is)
		found := false
		for _, item := range items {
			if item.GetId() == was.GetId() {
				found = true
				require.Equal(t, was.GetMetadata().String(), item.GetMetadata().String())
				require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, item.GetState())
				require.Equal(t, was.GetCreatedAt(), item.GetCreatedAt())
				require.Equal(t, was.GetLabels(), item.GetLabels())
				require.Equal(t, was.GetAnnotations(), item.GetAnnotations())
				require.Equal(t, was.GetRuntimeHandler(), item.GetRuntimeHandler())
			}
		}
		require.True(t, found, "%v isn't listed", was)
	}
}
