package host

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestGroup(t *testing.T) {
	for kind, groups := range kinds(t) {
		names, err := groups.Names()
		require.NoError(t, err)
		require.Empty(t, names)
		g, err := groups.Get("a")
		require.NoError(t, err)
		pids, err := g.Procs()
		require.NoError(t, err)
		require.Empty(t, pids)
		require.NoError(t, g.Kill(t.Context()))
		require.NoError(t, g.Remove(t.Context()))

		g, err = groups.Make("a")
		require.NoError(t, err)
		_, err = groups.Make("a")
		require.Truef(t, errdefs.IsAlreadyExists(err), "%v", err)
		marked, err := g.Marked("kept")
		require.NoError(t, err)
		require.False(t, marked)
		require.NoError(t, g.Mark("kept"))
		marked, err = g.Marked("kept")
		require.NoError(t, err)
		require.True(t, marked)
		// A daemon: a process that forks twice into a session of its own and closes its files.
		cmd := startIn(t, Cgroups{g.Dir()}, "setsid sh -c 'sleep 300 & sleep 300' </dev/null >/dev/null 2>&1 & exit 0")
		require.NoError(t, cmd.Wait())
		soon(t, func() bool {
			pids, err = g.Procs()
			return err == nil && len(pids) == 3
		}, "all descendants are members")
		require.NotContains(t, pids, os.Getpid())

		err = g.Remove(t.Context())
		require.True(t, errdefs.IsFailedPrecondition(err), "%s: %v", kind, err)
		require.NoError(t, os.Mkdir(filepath.Join(g.Dir(), "below"), 0o755))
		names, err = groups.Names()
		require.NoError(t, err)
		require.Equal(t, []string{"a"}, names)

		short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		require.ErrorIs(t, g.Wait(short), context.DeadlineExceeded)
		cancel()
		require.NoError(t, g.Kill(t.Context()))
		require.NoError(t, g.Wait(t.Context()))
		pids, err = g.Procs()
		require.NoError(t, err)
		require.Empty(t, pids)
		require.NoError(t, g.Remove(t.Context()))
		require.NoDirExists(t, groups.Dir())
		marked, err = g.Marked("kept")
		require.NoError(t, err)
		require.False(t, marked)
		names, err = groups.Names()
		require.NoError(t, err)
		require.Empty(t, names)
	}
}

// A process that is started in a group after a Kill lives.
func TestGroupAfterKill(t *testing.T) {
	for kind, groups := range kinds(t) {
		g, err := groups.Make("again")
		require.NoError(t, err)
		require.NoError(t, os.Mkdir(filepath.Join(g.Dir(), "below"), 0o755))
		for range 3 {
			cmd := startIn(t, Cgroups{g.Dir()}, "echo; exec sleep 300")
			soon(t, func() bool {
				name, err := Read(t.Context(), cmd.Process.Pid, "comm")
				return err == nil && string(name) == "sleep\n"
			}, "it runs in "+kind)
			reaped := make(chan error, 1)
			go func() { reaped <- cmd.Wait() }()
			require.NoError(t, g.Kill(t.Context()))
			require.ErrorContains(t, <-reaped, "killed")
		}
	}
}

// TestGroupOfAForkBomb ends processes that fork as fast as they can.
func TestGroupOfAForkBomb(t *testing.T) {
	for kind, groups := range kinds(t) {
		g, err := groups.Make("bomb")
		require.NoError(t, err)
		startIn(t, Cgroups{g.Dir()}, "while :; do (sleep 0.01 &) ; done")
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		require.NoErrorf(t, g.Kill(ctx), kind)
		require.NoErrorf(t, g.Remove(ctx), kind)
		cancel()
	}
}

func TestGroupKillIsBounded(t *testing.T) {
	groups, ok := kinds(t)["v1"]
	if !ok {
		t.Skip("needs the freezer of cgroup v1")
	}
	g, err := groups.Make("frozen")
	require.NoError(t, err)
	cmd := startIn(t, Cgroups{g.Dir()}, "sleep 300")
	require.NoError(t, writeFile(filepath.Join(g.Dir(), "freezer.state"), "FROZEN"))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err = g.Kill(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "don't end")
	require.NoError(t, writeFile(filepath.Join(g.Dir(), "freezer.state"), "THAWED"))
	require.Error(t, cmd.Wait())
	require.NoError(t, g.Kill(t.Context()))
}

// TestPidZero kills a group with a process of another pid namespace, which is listed as 0. kill(2)
// takes 0 for the whole process group.
func TestPidZero(t *testing.T) {
	t.Parallel()
	dir := t.TempDir() // stands for a v1 cgroup, as it has no cgroup.kill
	for _, tc := range []struct {
		procs string
		is    func(error) bool
	}{
		{"0\n", errdefs.IsFailedPrecondition},
		{"4194305\n0\n", errdefs.IsFailedPrecondition},
		{"-1\n", errdefs.IsDataLoss},
		{"x\n", errdefs.IsDataLoss},
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(tc.procs), 0o644))
		g := Group{dir: dir}
		_, err := g.Procs()
		require.Truef(t, tc.is(err), "%q: %v", tc.procs, err)
		err = g.Kill(t.Context())
		require.Truef(t, tc.is(err), "%q: %v", tc.procs, err)
	}
}

// TestKillFromAnotherPidNamespace ends a group from a process in whose pid namespace the group's
// member has no pid. On v2, the member is listed as 0, and cgroup.kill ends it. On v1 it isn't
// listed, and only the removal of the group fails. Neither the process nor its process group is
// killed.
func TestKillFromAnotherPidNamespace(t *testing.T) {
	if dir := os.Getenv(killEnv); dir != "" { // in there
		g := Group{dir: dir}
		_, err := g.Procs()
		fmt.Println("procs:", err)
		fmt.Println("kill:", g.Kill(t.Context()))
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		fmt.Println("remove:", g.Remove(ctx))
		return
	}
	for _, groups := range kinds(t) {
		g, err := groups.Make("outside")
		require.NoError(t, err)
		member := startIn(t, Cgroups{g.Dir()}, "exec sleep 300")
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestKillFromAnotherPidNamespace$", "-test.v")
		cmd.Env = append(os.Environ(), killEnv+"="+g.Dir())
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setpgid: true}
		unified, err := isUnified(g.Dir())
		require.NoError(t, err)
		out, err := cmd.CombinedOutput()
		require.NoErrorf(t, err, "%s", out)
		if unified {
			require.Contains(t, string(out), "procs: cgroup "+strconv.Quote(g.Dir())+" has a process of another pid namespace")
			require.Contains(t, string(out), "kill: <nil>\nremove: <nil>")
			require.Error(t, member.Wait())
		} else {
			require.Contains(t, string(out), "remove: failed to remove cgroup")
			require.NoError(t, member.Process.Signal(unix.Signal(0)))
		}
	}
}

const killEnv = "HOST_TEST_KILL"

func TestGroupNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", ".", "..", "/", "a/b", "../a", "a/", "a\nb"} {
		_, err := Groups{t.TempDir()}.Make(name)
		require.Truef(t, errdefs.IsInvalidArgument(err), "%q: %v", name, err)
		_, err = GroupsBelow(name)
		require.Truef(t, errdefs.IsInvalidArgument(err), "%q: %v", name, err)
	}
}

func TestOwnCgroup(t *testing.T) {
	t.Parallel()
	v2 := &mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/sys/fs/cgroup/unified", Options: "rw,relatime"}
	v2ReadOnly := &mountinfo.Info{FSType: "cgroup2", Root: "/", Mountpoint: "/elsewhere", Options: "ro"}
	v2Below := &mountinfo.Info{FSType: "cgroup2", Root: "/kind", Mountpoint: "/sys/fs/cgroup", Options: "rw"}
	pids := &mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: "/sys/fs/cgroup/pids", Options: "rw", VFSOptions: "rw,pids"}
	systemd := &mountinfo.Info{FSType: "cgroup", Root: "/", Mountpoint: "/sys/fs/cgroup/systemd", Options: "rw", VFSOptions: "rw,xattr,name=systemd"}
	v2Outside := &mountinfo.Info{FSType: "cgroup2", Root: "/..", Mountpoint: "/sys/fs/cgroup", Options: "rw"}
	pidsOfContainer := &mountinfo.Info{FSType: "cgroup", Root: "/docker/1", Mountpoint: "/sys/fs/cgroup/pids", Options: "rw", VFSOptions: "rw,pids"}
	const hybrid = "9:name=systemd:/a\n8:pids:/b\n1:cpu,cpuacct:/c\n0::/system.slice/containerd.service\n"
	const legacy = "9:name=systemd:/a\n8:pids:/b\n"
	for _, tc := range []struct {
		own    string
		mounts []*mountinfo.Info
		dir    string
	}{
		{hybrid, []*mountinfo.Info{systemd, v2}, "/sys/fs/cgroup/unified/system.slice/containerd.service"},
		{hybrid, []*mountinfo.Info{v2ReadOnly, v2}, "/sys/fs/cgroup/unified/system.slice/containerd.service"},
		{hybrid, []*mountinfo.Info{v2ReadOnly, pids}, "/sys/fs/cgroup/pids/b"},
		{legacy, []*mountinfo.Info{pids, systemd}, "/sys/fs/cgroup/systemd/a"},
		{legacy, []*mountinfo.Info{pids}, "/sys/fs/cgroup/pids/b"},
		{"0::/kind/x\n", []*mountinfo.Info{v2Below}, "/sys/fs/cgroup/x"},
		{"0::/other\n", []*mountinfo.Info{v2Below}, ""},
		{"0::/../other\n", []*mountinfo.Info{v2}, ""},
		// As in a container: the mounts show only the container's cgroup.
		{"8:pids:/docker/1/system.slice\n", []*mountinfo.Info{pidsOfContainer}, "/sys/fs/cgroup/pids/system.slice"},
		{"8:pids:/docker/1\n", []*mountinfo.Info{pidsOfContainer}, "/sys/fs/cgroup/pids"},
		{"8:pids:/docker/12/x\n", []*mountinfo.Info{pidsOfContainer}, ""},
		// A mount from outside of the cgroup namespace.
		{"0::/../other\n", []*mountinfo.Info{v2Outside}, "/sys/fs/cgroup/other"},
		{"0::/\n", []*mountinfo.Info{v2Outside}, "/sys/fs/cgroup"},
		{"8:pids:/x\n0::/\n", []*mountinfo.Info{v2Outside, pids}, "/sys/fs/cgroup/pids/x"},
		{"0::/../../x\n", []*mountinfo.Info{{FSType: "cgroup2", Root: "/../..", Mountpoint: "/m", Options: "rw"}}, "/m/x"},
		{"1:cpu:/\n", []*mountinfo.Info{v2, pids}, ""},
		{"", nil, ""},
	} {
		dir, ok := ownCgroup(ParseCgroups([]byte(tc.own)), tc.mounts)
		require.Equal(t, tc.dir, dir, tc.own)
		require.Equal(t, tc.dir != "", ok, tc.own)
	}
}

func TestBelowMounts(t *testing.T) {
	t.Parallel()
	mounts := []*mountinfo.Info{
		{FSType: "cgroup2", Root: "/elsewhere", Mountpoint: "/a"},
		{FSType: "cgroup2", Root: "/docker/1", Mountpoint: "/b"},
		{FSType: "cgroup", Root: "/docker/1", Mountpoint: "/c", VFSOptions: "rw,cpu,cpuacct"},
		{FSType: "cgroup", Root: "/", Mountpoint: "/d", VFSOptions: "rw,name=systemd"},
	}
	paths := ParseCgroups([]byte("9:name=systemd:/x:y\n8:pids:/b\n3:memory:/docker/1/m\n1:cpu,cpuacct:/docker/1\n0::/docker/1/kubepods/pod1\n"))
	require.Equal(t, map[string]string{"": "/kubepods/pod1", "cpu": "/", "cpuacct": "/", "name=systemd": "/x:y"}, belowMounts(paths, mounts))
}

func TestCgroupPaths(t *testing.T) {
	c := newPodCgroup(t)
	cmd := c.startScript(t, "exec sleep 300")
	paths, err := CgroupPaths(t.Context(), cmd.Process.Pid)
	require.NoError(t, err)
	require.NotEmpty(t, paths)
	for hierarchy, path := range paths {
		require.Equal(t, c.path, path, hierarchy)
	}
	_, err = CgroupPaths(t.Context(), 1<<22+1)
	require.True(t, errdefs.IsNotFound(err), err)
}

// TestStart starts a process in cgroups of both versions. The threads that start it don't stay in
// them.
func TestStart(t *testing.T) {
	var dirs Cgroups
	for _, groups := range kinds(t) {
		g, err := groups.Make("born")
		require.NoError(t, err)
		dirs = append(dirs, g.Dir())
	}
	for range 50 {
		cmd := startIn(t, dirs, "cat /proc/self/cgroup; exec sleep 300")
		data, err := Read(t.Context(), cmd.Process.Pid, "cgroup")
		require.NoError(t, err)
		require.GreaterOrEqual(t, strings.Count(string(data), "/born\n"), len(dirs), string(data))
		for _, dir := range dirs {
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			require.NoError(t, err)
			require.NotContains(t, strings.Fields(string(procs)), "0")
			for _, pid := range strings.Fields(string(procs)) {
				require.NotEqual(t, pid, strconv.Itoa(os.Getpid()), "a thread has stayed in the cgroup")
			}
		}
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
	}
	tasks, err := filepath.Glob("/proc/self/task/*/cgroup")
	require.NoError(t, err)
	for _, task := range tasks {
		data, _ := os.ReadFile(task)
		require.NotContains(t, string(data), "/born\n", task)
	}
}

func TestStartRefuses(t *testing.T) {
	groups := kinds(t)["own"]
	g, err := groups.Make("one")
	require.NoError(t, err)
	never := func(int) error { t.Error("it was started"); return nil }
	require.ErrorIs(t, Cgroups{filepath.Join(g.Dir(), "none")}.Start(never), unix.ENOENT)
	if unified, err := isUnified(g.Dir()); err == nil && unified {
		err := Cgroups{g.Dir(), g.Dir()}.Start(never)
		require.True(t, errdefs.IsInvalidArgument(err), err)
	}
	require.EqualError(t, g.Start(func(int) error { return os.ErrProcessDone }), os.ErrProcessDone.Error())
}

// TestMakeBesideRemove makes groups while the directory of all groups is removed with the last one.
func TestMakeBesideRemove(t *testing.T) {
	groups := kinds(t)["own"]
	var beside sync.WaitGroup
	for i := range 4 {
		beside.Go(func() {
			for range 100 {
				g, err := groups.Make(strconv.Itoa(i))
				if !assert.NoError(t, err) || !assert.NoError(t, g.Remove(t.Context())) {
					return
				}
			}
		})
	}
	beside.Wait()
	require.NoDirExists(t, groups.Dir())
	_, err := Groups{"/sys/fs/cgroup/none/below"}.Make("a")
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestKeepGroups(t *testing.T) {
	groups := kinds(t)["own"]
	link := filepath.Join(t.TempDir(), "cgroups")
	_, err := LinkedGroups(link)
	require.True(t, errdefs.IsNotFound(err), err)

	name := filepath.Base(groups.Dir())
	kept, err := KeepGroups(link, name)
	require.NoError(t, err)
	require.Equal(t, groups, kept)
	linked, err := LinkedGroups(link)
	require.NoError(t, err)
	require.Equal(t, groups, linked)

	// As long as groups exist, the directory stays the same, also if the process is in another
	// cgroup.
	g, err := kept.Make("a")
	require.NoError(t, err)
	kept, err = KeepGroups(link, "podfsm-elsewhere")
	require.NoError(t, err)
	require.Equal(t, groups, kept)
	require.NoError(t, g.Remove(t.Context()))
	kept, err = KeepGroups(link, "podfsm-elsewhere")
	require.NoError(t, err)
	require.Equal(t, filepath.Join(filepath.Dir(groups.Dir()), "podfsm-elsewhere"), kept.Dir())
	linked, err = LinkedGroups(link)
	require.NoError(t, err)
	require.Equal(t, kept, linked)
}
