package pause

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What isn't proven to be the pod's pause isn't found.
func TestFindRefuses(t *testing.T) {
	b := newTestbed(t)
	r, record := b.start(t, inUserNS(testPod()))
	refused := func(t *testing.T, spec *specs.Spec) {
		t.Helper()
		_, err := Find(t.Context(), r.Cgroup, spec)
		require.True(t, errdefs.IsNotFound(err), "%v", err)
	}
	change := func(change func(*specs.Linux)) *specs.Spec {
		linux := *r.Spec.Linux
		linux.UIDMappings = slices.Clone(linux.UIDMappings)
		linux.Namespaces = slices.Clone(linux.Namespaces)
		change(&linux)
		return &specs.Spec{Linux: &linux}
	}
	fds := countFDs(t)
	t.Run("other ids", func(t *testing.T) {
		refused(t, change(func(l *specs.Linux) { l.UIDMappings[0].HostID++ }))
	})
	for i, namespace := range r.Spec.Linux.Namespaces {
		t.Run("the host's "+string(namespace.Type), func(t *testing.T) {
			refused(t, change(func(l *specs.Linux) { l.Namespaces = slices.Delete(l.Namespaces, i, i+1) }))
		})
	}
	t.Run("a namespace of the host's instead of its own", func(t *testing.T) {
		pod := inUserNS(with(func(o *runtime.NamespaceOption) {
			o.Network, o.Pid = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
		}))
		pod.ID = "on-node"
		other, _ := b.start(t, pod)
		_, err := Find(t.Context(), other.Cgroup, r.Spec)
		require.True(t, errdefs.IsNotFound(err), "%v", err)
	})
	t.Run("somebody else is in the cgroup", func(t *testing.T) {
		cmd := exec.Command("sleep", "100")
		require.NoError(t, cmd.Start())
		for _, dir := range r.Cgroup.Dirs() {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0))
		}
		refused(t, r.Spec)
		require.NoError(t, cmd.Process.Kill())
		require.Error(t, cmd.Wait())
		found, err := Find(t.Context(), r.Cgroup, r.Spec)
		require.NoError(t, err)
		require.Equal(t, record, found)
	})
	t.Run("it has ended", func(t *testing.T) {
		_, err := b.End(t.Context(), r.Key)
		require.NoError(t, err)
		refused(t, r.Spec)
	})
	require.LessOrEqual(t, countFDs(t), fds, "file descriptors leak")
}
