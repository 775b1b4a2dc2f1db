package plugin

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/internal/roottest"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
)

// A build that recorded no places made a cgroup with a relative path at the root of the hierarchies.
func TestEndCgroupWithoutPlan(t *testing.T) {
	roottest.Require(t)
	top := fmt.Sprintf("podfsm-%d", os.Getpid())
	for _, parent := range []string{top, "/" + top, top + ".slice"} {
		r := &lifecycle.Run{Key: ledger.Key{Namespace: "k8s.io", ID: top}, Spec: &Spec{Config: &runtime.PodSandboxConfig{
			Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: parent},
		}}}
		made, err := host.PodCgroupOf("/"+cgroupPath(r), false, nil)
		require.NoError(t, err)
		above, err := host.PodCgroupOf("/"+top, false, nil)
		require.NoError(t, err)
		t.Cleanup(func() {
			for _, cgroup := range []*host.PodCgroup{made, above} {
				require.NoError(t, cgroup.End(context.Background()))
			}
		})
		require.NotEmpty(t, made.Dirs())
		for _, dir := range made.Dirs() {
			require.NoError(t, os.MkdirAll(dir, 0o755))
		}
		require.NoError(t, (&startPause{}).endCgroup(t.Context(), r))
		for _, dir := range made.Dirs() {
			require.NoDirExists(t, dir)
		}
	}
}

// Probe finds each thing that Undo removes.
func TestProbeOfPause(t *testing.T) {
	roottest.Require(t)
	w, id := newStoresWorld(t), fmt.Sprintf("podfsm-probe-%d", os.Getpid())
	step := &startPause{w.node}
	r := &lifecycle.Run{Key: criKey(id), Spec: &Spec{Config: &runtime.PodSandboxConfig{
		Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "/" + id},
	}}}
	cgroup, err := host.PodCgroupOf(cgroupPath(r), false, nil)
	require.NoError(t, err)
	parent, err := host.PodCgroupOf("/"+id, false, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, parent.End(context.Background())) })

	files := w.node.settings.Files
	for what, leave := range map[string]func() error{
		"the container's record": func() error {
			record := containers.Container{ID: id, Runtime: containers.RuntimeInfo{Name: "runc"}, Spec: &anypb.Any{TypeUrl: "spec"}}
			_, err := w.client.ContainerService().Create(w.ctx, record)
			return err
		},
		"files":                 func() error { return os.MkdirAll(filepath.Join(files.RootDir, "sandboxes", id), 0o755) },
		"the mounts' directory": func() error { return os.MkdirAll(filepath.Join(files.StateDir, "sandboxes", id), 0o755) },
		"the cgroup":            func() error { return os.MkdirAll(cgroup.Dirs()[0], 0o755) },
	} {
		t.Run(what, func(t *testing.T) {
			require.NoError(t, leave())
			there, err := step.Probe(w.ctx, r)
			require.NoError(t, err)
			require.True(t, there)
			require.NoError(t, step.Undo(w.ctx, r))
			there, err = step.Probe(w.ctx, r)
			require.NoError(t, err)
			require.False(t, there)
		})
	}
}
