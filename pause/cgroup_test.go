package pause

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
)

func TestRemoveCgroup(t *testing.T) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	require.NoError(t, err)
	require.NotEmpty(t, mounts)
	parent := "/podfsm-test-" + strconv.Itoa(os.Getpid())
	path := filepath.Join(parent, "pause")
	for _, m := range mounts {
		dir := filepath.Join(m.Mountpoint, parent)
		require.NoError(t, os.MkdirAll(filepath.Join(m.Mountpoint, path), 0o755))
		t.Cleanup(func() { require.NoError(t, os.Remove(dir)) })
	}
	process := exec.Command("sleep", "600")
	require.NoError(t, process.Start())
	procs := filepath.Join(mounts[len(mounts)-1].Mountpoint, path, "cgroup.procs")
	require.NoError(t, os.WriteFile(procs, []byte(strconv.Itoa(process.Process.Pid)), 0o644))
	reaped := make(chan error, 1)
	go func() { reaped <- process.Wait() }()

	found, err := Cgroups([]string{filepath.Base(parent), "none"})
	require.NoError(t, err)
	require.Len(t, found, len(mounts))
	require.Contains(t, found, filepath.Join(mounts[0].Mountpoint, parent))

	require.NoError(t, RemoveCgroup(t.Context(), path))
	require.ErrorContains(t, <-reaped, "killed")
	for _, m := range mounts {
		require.NoDirExists(t, filepath.Join(m.Mountpoint, path))
	}
	require.NoError(t, RemoveCgroup(t.Context(), path), "there is none")
	// A pod may name any parent; where there can't be a cgroup, none is left.
	for _, impossible := range []string{"/cgroup.procs/s1", "/" + strings.Repeat("x", 256) + "/s1", "/" + strings.Repeat("x/", 4096) + "s1"} {
		require.NoError(t, RemoveCgroup(t.Context(), impossible), "%.20s", impossible)
	}
	for _, other := range []string{"", "/", "//", "kubepods.slice:cri-containerd:s1", "relative"} {
		require.NoError(t, RemoveCgroup(t.Context(), other), other)
	}
}

func TestProcesses(t *testing.T) {
	root, err := mainHierarchy()
	require.NoError(t, err)
	parent := "/podfsm-processes-" + strconv.Itoa(os.Getpid())
	path := filepath.Join(parent, "pause")
	none := func() {
		pids, err := Processes(path)
		require.NoError(t, err)
		require.Empty(t, pids)
	}
	none()
	require.NoError(t, os.MkdirAll(filepath.Join(root, path), 0o755))
	t.Cleanup(func() { require.NoError(t, os.Remove(filepath.Join(root, parent))) })
	t.Cleanup(func() { require.NoError(t, RemoveCgroup(context.WithoutCancel(t.Context()), path)) })
	none()

	process := exec.Command("sleep", "600")
	require.NoError(t, process.Start())
	t.Cleanup(func() {
		require.NoError(t, process.Process.Kill())
		require.Error(t, process.Wait())
	})
	require.NoError(t, os.WriteFile(filepath.Join(root, path, "cgroup.procs"), []byte(strconv.Itoa(process.Process.Pid)), 0o644))
	pids, err := Processes(path)
	require.NoError(t, err)
	require.Equal(t, []int{process.Process.Pid}, pids)

	_, err = Processes("relative")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

func TestCgroupDir(t *testing.T) {
	for path, want := range map[string]string{
		"/kubepods/pod1/id": "/kubepods/pod1/id",
		"/kubepods/a:b/id":  "/kubepods/a:b/id",
		"kubepods-besteffort-pod1.slice:cri-containerd:id": "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-id.scope",
		"system.slice:cri-containerd:id":                   "system.slice/cri-containerd-id.scope",
	} {
		got, err := cgroupDir(path)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}
