package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// containedDaemon runs the daemon as the first process of a container, as kind and k3d do: with
// private mounts, its own pid namespace, and its state directory on an overlay that outlives the
// container.
const containedDaemon = `#!/bin/sh
set -e
mkdir -p %[1]s/state %[1]s/upper %[1]s/work
exec unshare --mount --propagation private --pid --fork --kill-child --mount-proc sh -ec '
	mount -t overlay overlay -o lowerdir=%[1]s/state,upperdir=%[1]s/upper,workdir=%[1]s/work %[1]s/state
	%[2]s
	exec %[3]s "$@"' node "$@"
`

// contain runs the daemon of a node in a container, after a command.
func contain(first string) func(*harness.Node) (string, error) {
	return func(n *harness.Node) (string, error) {
		dir := filepath.Join(n.Dir(), "contained")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", err
		}
		if err := os.Symlink(n.CLI(), filepath.Join(dir, "podfsm")); err != nil {
			return "", err
		}
		program := filepath.Join(dir, "containerd")
		script := fmt.Sprintf(containedDaemon, n.Dir(), first, filepath.Join(filepath.Dir(n.CLI()), "containerd-podfsm"))
		return program, os.WriteFile(program, []byte(script), 0o755)
	}
}

// A node that is a container runs pods. Its restart ends all its processes and mounts, but its
// files and the boot id stay.
func TestNodeInAContainer(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{Install: contain("")})
	for _, finding := range examine(t, n) {
		require.NotEqual(t, "fail", finding.GetStatus(), "%v", finding)
	}
	pod := runPod(t, n, n.PodConfig("pod"))
	exec(t, startContainer(t, pod, "main"), "true")

	require.NoError(t, n.Kill(t.Context()))
	require.NoError(t, n.Start(t.Context()))
	state, err := pod.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, runtime.PodSandboxState_SANDBOX_NOTREADY, state.GetState())
	next := runPod(t, n, n.PodConfig("pod", attempt(1)))
	exec(t, startContainer(t, next, "again"), "true")
	for _, pod := range []*harness.Pod{pod, next} {
		require.NoError(t, pod.StopAndRemove(t.Context()))
	}
	require.Empty(t, settled(t, n))
	require.Empty(t, reserved(t, n))
}

// Without cgroups a node can not run pods, and refuses them before anything is made.
func TestNodeInAContainerWithoutCgroups(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{Install: contain("umount --lazy /sys/fs/cgroup")})
	failed := map[string]string{}
	for _, finding := range examine(t, n) {
		if finding.GetStatus() == "fail" {
			failed[finding.GetCheck()] = finding.GetRemedy()
		}
	}
	require.Equal(t, "mount the cgroup hierarchies below /sys/fs/cgroup", failed["cgroups"], "%v", failed)
	err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	require.ErrorContains(t, err, "mount cgroup2 on /sys/fs/cgroup")
	pods, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Empty(t, pods.GetItems())
}
