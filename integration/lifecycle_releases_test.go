package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// releaseNode is a node whose daemon can have the steps of another release.
type releaseNode struct {
	*harness.Node
	word string // the file that selects the release
}

func startReleaseNode(t *testing.T, release string) *releaseNode {
	n := &releaseNode{word: filepath.Join(t.TempDir(), "release")}
	require.NoError(t, os.WriteFile(n.word, []byte(release), 0o600))
	n.Node = harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, Env: []string{"PODFSM_STEPS_FILE=" + n.word}})
	return n
}

// become restarts the daemon as another release.
func (n *releaseNode) become(t *testing.T, release string) {
	t.Helper()
	require.NoError(t, n.Kill(t.Context()))
	require.NoError(t, os.WriteFile(n.word, []byte(release), 0o600))
	require.NoError(t, n.Start(t.Context()))
}

// marks returns the pods that the release's own step has marked.
func (n *releaseNode) marks(t *testing.T) (ids []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(n.word))
	require.NoError(t, err)
	for _, entry := range entries {
		if entry.Name() != filepath.Base(n.word) {
			ids = append(ids, entry.Name())
		}
	}
	return ids
}

// interruptIn kills the daemon at the beginning of a step of a pod, and returns the id of the pod.
func (n *releaseNode) interruptIn(t *testing.T, step string) (id string) {
	t.Helper()
	point := step + ".do.after"
	require.NoError(t, n.Fault(point, "1*block"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = n.RunPod(context.Background(), harness.PodfsmHandler, n.PodConfig("half-made"))
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
	id = inspect(t, n.Node, "half-made").GetSandbox().GetId()
	require.NoError(t, n.Kill(t.Context()))
	<-done
	return id
}

// Pods of a release continue to run under a release with a step more, a step less, a step at
// another place, or a renamed step: with the same processes, ready, usable, and removable. A mark
// that the other release does not know stays pending until its own release is back.
func TestReleases(t *testing.T) {
	for _, tc := range []struct {
		from, to string
		knows    bool // the second release knows all steps of the first
	}{
		{"", "late", true},
		{"early", "late", true},
		{"late", "", false},
		{"late", "renamed", false},
	} {
		t.Run(fmt.Sprintf("from %q to %q", tc.from, tc.to), func(t *testing.T) {
			n := startReleaseNode(t, tc.from)
			before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
			require.NoError(t, err)
			stays, goes := runPod(t, n.Node, n.PodConfig("stays")), runPod(t, n.Node, n.PodConfig("goes"))
			main := startContainer(t, stays, "main")
			pid, err := stays.Pid(t.Context())
			require.NoError(t, err)
			half := n.interruptIn(t, "attach_network")
			marked := n.marks(t)

			n.become(t, tc.to)
			for _, pod := range []*harness.Pod{stays, goes} {
				shown := inspect(t, n.Node, pod.ID)
				require.Equal(t, "Ready", shown.GetSandbox().GetState())
				require.Empty(t, shown.GetSandbox().GetError())
				status, err := pod.Status(t.Context())
				require.NoError(t, err)
				require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
			}
			require.Equal(t, "0\n", exec(t, main, "id", "-u"))
			require.NoError(t, unix.Kill(pid, 0))
			require.Equal(t, slices.Contains(marked, stays.ID), slices.Contains(n.marks(t), stays.ID), "a healthy pod is not touched")
			require.NoError(t, runPod(t, n.Node, n.PodConfig("new")).StopAndRemove(t.Context()))

			require.NoError(t, goes.Stop(t.Context()))
			removal := goes.Remove(t.Context())
			if tc.knows {
				require.NoError(t, removal)
			} else {
				n.requirePending(t, goes.ID)
				require.ErrorContains(t, removal, "recorded the step, and podfsm")
			}
			if slices.Contains(marked, half) && !tc.knows {
				n.requirePending(t, half)
			} else {
				n.requireGone(t, half)
			}

			n.become(t, tc.from)
			require.Equal(t, "0\n", exec(t, main, "id", "-u"))
			n.requireGone(t, goes.ID)
			n.requireGone(t, half)
			require.NoError(t, stays.StopAndRemove(t.Context()))
			require.Empty(t, n.marks(t))
			n.RequireClean(t, before)
		})
	}
}

// requirePending requires that the cleanup of a pod waits for the release that marked it. Only the
// ids wait, too.
func (n *releaseNode) requirePending(t *testing.T, id string) {
	t.Helper()
	var pending []string
	for _, cleanup := range waitPending(t, n.Node, id).GetPendingCleanups() {
		pending = append(pending, cleanup.GetStep())
	}
	require.Equal(t, []string{"mark_pod", "allocate_ids"}, pending)
	require.Contains(t, n.marks(t), id)
}

// requireGone waits until nothing of a pod is left.
func (n *releaseNode) requireGone(t *testing.T, id string) {
	t.Helper()
	require.Eventually(t, func() bool {
		list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
		require.NoError(t, err)
		return !slices.ContainsFunc(list.GetSandboxes(), func(s *podfsmv1.Sandbox) bool { return s.GetId() == id })
	}, 30*time.Second, 10*time.Millisecond)
	require.NotContains(t, n.marks(t), id)
}
