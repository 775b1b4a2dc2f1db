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
	main, err := mainHierarchy()
	require.NoError(t, err)
	root := main.Mountpoint
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

// Preparing for a move moves nothing.
func TestExpectMove(t *testing.T) {
	before, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.NoError(t, expectMove())
	after, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))
	main, err := mainHierarchy()
	require.NoError(t, err)
	own, ok := ownCgroup(main, string(before))
	require.True(t, ok)
	pids, err := processesIn(own)
	require.NoError(t, err)
	require.Contains(t, pids, os.Getpid())
}

func TestOwnCgroup(t *testing.T) {
	const v1 = "4:devices:/system.slice/containerd.service\n3:cpu,cpuacct:/elsewhere\n1:name=systemd:/system.slice\n0::/unified\n"
	for name, tc := range map[string]struct {
		mount  mountinfo.Info
		groups string
		want   string
	}{
		"v1":             {mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: "/m"}, v1, "/m/system.slice/containerd.service"},
		"v2":             {mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/m"}, "0::/system.slice/containerd.service\n", "/m/system.slice/containerd.service"},
		"hybrid":         {mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/m"}, v1, "/m/unified"},
		"the root":       {mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/m"}, "0::/\n", "/m"},
		"a part mounted": {mountinfo.Info{FSType: "cgroup2", Root: "/docker/x", Mountpoint: "/m"}, "0::/docker/x\n", ""},
		"out of sight":   {mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/m"}, "0::/../other\n", ""},
		"nothing":        {mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: "/m"}, "0::/\n", ""},
	} {
		got, ok := ownCgroup(&tc.mount, tc.groups)
		require.Equal(t, tc.want, got, name)
		require.Equal(t, tc.want != "", ok, name)
	}
}
