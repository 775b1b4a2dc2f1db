package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/cgroups"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

func TestPodCgroupOf(t *testing.T) {
	for _, tc := range []struct {
		path    string
		systemd bool
		own     bool   // below the cgroup of this process, as runc has it
		want    string // below every hierarchy
		is      func(error) bool
		text    string
	}{
		{path: "/kubepods/pod1/id", want: "/kubepods/pod1/id"},
		{path: "/kubepods/pod1//id/", want: "/kubepods/pod1/id"},
		{path: "//kubepods///pod1/id", want: "/kubepods/pod1/id"},
		{path: "/kubepods/pod1/./id", want: "/kubepods/pod1/id"},
		{path: "/" + strings.Repeat("x", 255) + "/id", want: "/id"},
		{path: "kubepods/id", own: true, want: "/kubepods/id"},
		{path: "kubepods//id/", own: true, want: "/kubepods/id"},
		{path: "../../id", own: true, want: "/id"},
		{path: "a/../../id", own: true, want: "/id"},
		{path: "/a/../../../id", want: "/id"},
		{path: "/kubepods/a:b/id", want: "/kubepods/a:b/id"},
		{path: "kubepods.slice:cri-containerd:id", own: true, want: "/kubepods.slice:cri-containerd:id"},
		{path: "/kubepods.slice/id", want: "/kubepods.slice/id"},
		{path: "", is: errdefs.IsInvalidArgument, text: "is the root of the hierarchy"},
		{path: "/", is: errdefs.IsInvalidArgument, text: "is the root of the hierarchy"},
		{path: "//", is: errdefs.IsInvalidArgument, text: "is the root of the hierarchy"},
		{path: ".", is: errdefs.IsInvalidArgument, text: "is the root of the hierarchy"},
		{path: "/a/..", is: errdefs.IsInvalidArgument, text: "is the root of the hierarchy"},
		{path: "a/../..", is: errdefs.IsInvalidArgument, text: "is the root of the hierarchy"},
		{path: "/" + strings.Repeat("x", 256) + "/id", is: errdefs.IsInvalidArgument, text: "more than 255 bytes"},
		{path: "/a\nb/id", is: errdefs.IsInvalidArgument, text: "has a line break"},
		{path: "/a\x00/id", is: errdefs.IsInvalidArgument, text: "has a line break"},
		{path: strings.Repeat("x", 250) + ".slice:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "more than 255 bytes"},
		{path: "a.slice:b:" + strings.Repeat("x", 248), systemd: true, is: errdefs.IsInvalidArgument, text: "more than 255 bytes"},
		{path: "a\nb.slice:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "has a line break"},
		{path: "a\x00.slice:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "has a line break"},
		{path: "/kubepods/pod1/id", systemd: true, is: errdefs.IsInvalidArgument, text: "set SystemdCgroup = false"},
		{path: "a.slice:b", systemd: true, is: errdefs.IsInvalidArgument, text: "slice:prefix:name"},
		{path: "a.slice:b:", systemd: true, is: errdefs.IsInvalidArgument, text: "slice:prefix:name"},
		{path: "a.slice:b:c:d", systemd: true, is: errdefs.IsInvalidArgument, text: "slice:prefix:name"},
		{path: "", systemd: true, is: errdefs.IsInvalidArgument, text: "slice:prefix:name"},
		{path: "a:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "is in no slice of systemd's"},
		{path: "/a/b.slice:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "is in no slice of systemd's"},
		{path: "a--b.slice:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "is in no slice of systemd's"},
		{path: ".slice:b:c", systemd: true, is: errdefs.IsInvalidArgument, text: "is in no slice of systemd's"},
		{path: "kubepods.slice:cri-containerd:id", systemd: true, want: "/kubepods.slice/cri-containerd-id.scope"},
		{path: "kubepods-besteffort-pod1.slice:cri-containerd:id", systemd: true, want: "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-id.scope"},
		{path: "a.slice:b:" + strings.Repeat("x", 247), systemd: true, want: "/a.slice/b-" + strings.Repeat("x", 247) + ".scope"},
	} {
		c, err := PodCgroupOf(tc.path, tc.systemd, nil)
		if tc.systemd && tc.is == nil && !systemdRuns() {
			require.True(t, errdefs.IsFailedPrecondition(err), "%q: %v", tc.path, err)
			require.ErrorContains(t, err, "set SystemdCgroup = false for the runtime handler")
			continue
		}
		if tc.is != nil {
			require.Truef(t, tc.is(err), "%q: %v", tc.path, err)
			require.ErrorContains(t, err, tc.text, tc.path)
			continue
		}
		require.NoError(t, err, tc.path)
		require.NotEmpty(t, c.Dirs())
		require.Equal(t, tc.own, c.Places() != nil, tc.path)
		var below []string
		if tc.own {
			below = belowThisProcess(t, tc.want)
		}
		for _, dir := range c.Dirs() {
			require.Truef(t, strings.HasPrefix(dir, "/sys/fs/cgroup/") && strings.HasSuffix(dir, tc.want), "%q: %q", tc.path, dir)
			require.Equal(t, tc.own, slices.Contains(below, dir), "%q: %q", tc.path, dir)
			require.NoDirExists(t, dir, "nothing is made")
		}
	}
}

// systemd makes a scope, unless the name is that of a slice.
func TestNameBySlice(t *testing.T) {
	for path, want := range map[string]string{
		"kubepods-pod1.slice:cri-containerd:id": "/kubepods.slice/kubepods-pod1.slice/cri-containerd-id.scope",
		"-.slice:cri-containerd:id":             "/cri-containerd-id.scope",
		":cri-containerd:id":                    "/system.slice/cri-containerd-id.scope",
		"a.slice:cri-containerd:a-id.slice":     "/a.slice/a-id.slice",
	} {
		_, inner, err := nameBySlice(path)
		require.NoError(t, err, path)
		require.Equal(t, want, inner, path)
	}
}

// belowThisProcess returns the directories in which runc puts a relative path.
func belowThisProcess(t *testing.T, path string) (dirs []string) {
	t.Helper()
	paths, err := CgroupPaths(t.Context(), os.Getpid())
	require.NoError(t, err)
	if cgroups.IsCgroup2UnifiedMode() {
		return []string{filepath.Join("/sys/fs/cgroup", filepath.Dir(paths[""]), path)}
	}
	for controller, own := range paths {
		if controller == "" { // v2 beside v1 has no controllers
			dirs = append(dirs, filepath.Join("/sys/fs/cgroup/unified", path))
			continue
		}
		dirs = append(dirs, filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(controller, "name="), own, path))
	}
	return dirs
}

func systemdRuns() bool {
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// newPodCgroup returns a cgroup that is ended at the end of the test, with its parent.
func newPodCgroup(t *testing.T) *PodCgroup {
	t.Helper()
	roottest.Require(t)
	parent := fmt.Sprintf("/podfsm-host-%d-%d", os.Getpid(), time.Now().UnixNano())
	for _, path := range []string{parent, parent + "/id"} {
		c, err := PodCgroupOf(path, false, nil)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, c.End(context.Background())) })
		if path != parent {
			return c
		}
	}
	return nil
}

// startScript starts a shell script in the cgroup, and reaps it at the end of the test.
func (c *PodCgroup) startScript(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	return startScript(t, c.Start, script)
}

func startScript(t *testing.T, startIn func(func(cgroupFD int) (int, error)) error, script string) *exec.Cmd {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) // it can't be opened in the cgroup
	require.NoError(t, err)
	defer null.Close()
	cmd := exec.Command("sh", "-c", script)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	require.NoError(t, startIn(func(cgroupFD int) (int, error) {
		if cgroupFD >= 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: cgroupFD}
		}
		err := cmd.Start()
		if err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	}))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// A pod's processes may use all of the pod's CPU time. A process that is about to become pause must
// not depend on that until it executes its program.
func TestStartThenMove(t *testing.T) {
	c := newPodCgroup(t)
	require.Contains(t, c.Dirs(), c.cpu)
	var meanwhile []byte
	var readErr error
	cmd := startScript(t, func(start func(int) (int, error)) error {
		return c.StartThenMove(func(cgroupFD int) (int, error) {
			pid, err := start(cgroupFD)
			meanwhile, readErr = os.ReadFile(filepath.Join(c.cpu, "cgroup.procs"))
			return pid, err
		})
	}, "sleep 600")
	require.NoError(t, readErr)
	require.Empty(t, meanwhile)
	for _, dir := range c.Dirs() {
		pids, err := Group{dir: dir}.Procs()
		require.NoError(t, err)
		require.Contains(t, pids, cmd.Process.Pid, dir)
	}
}

func TestPodCgroup(t *testing.T) {
	c := newPodCgroup(t)
	pids, err := c.Pids()
	require.NoError(t, err)
	require.Empty(t, pids)
	require.NoError(t, c.End(t.Context()), "there is no cgroup")

	cmd := c.startScript(t, "setsid -f sleep 300; setsid -f sleep 300; exec sleep 300")
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	require.NoError(t, err)
	for hierarchy, path := range ParseCgroups(groups) {
		require.Truef(t, strings.HasSuffix(path, "/id"), "%q: %q", hierarchy, path)
	}
	soon(t, func() bool {
		pids, err = c.Pids()
		return err == nil && len(pids) == 3
	}, "all descendants are members")
	for _, dir := range c.Dirs() {
		require.NoError(t, os.Mkdir(filepath.Join(dir, "below"), 0o755))
	}
	// Pause has the least CPU weight and no device.
	for file, want := range map[string]string{"/sys/fs/cgroup/cpu": "cpu.shares 2", "/sys/fs/cgroup/devices": "devices.list "} {
		name, value, _ := strings.Cut(want, " ")
		data, err := os.ReadFile(filepath.Join(file, c.path, name))
		if !errors.Is(err, os.ErrNotExist) { // v2
			require.NoError(t, err)
			require.Equal(t, value, strings.TrimSpace(string(data)))
		}
	}
	reaped := make(chan error, 1)
	go func() { reaped <- cmd.Wait() }()
	for range 2 {
		require.NoError(t, c.End(t.Context()))
		for _, dir := range c.Dirs() {
			require.NoDirExists(t, dir)
		}
	}
	require.Error(t, <-reaped)
}

func TestPodCgroupThatCantBe(t *testing.T) {
	roottest.Require(t)
	for _, path := range []string{"/cgroup.procs/s1", "/" + strings.Repeat("x/", 4096) + "s1"} {
		c, err := PodCgroupOf(path, false, nil)
		require.NoError(t, err)
		pids, err := c.Pids()
		require.NoError(t, err, "%.20s", path)
		require.Empty(t, pids)
		require.NoError(t, c.End(t.Context()), "%.20s", path)
		there, err := c.Exists()
		require.NoError(t, err, "%.20s", path)
		require.False(t, there)
	}
	c, err := PodCgroupOf("/cgroup.procs/s1", false, nil)
	require.NoError(t, err)
	require.ErrorContains(t, c.Start(func(int) (int, error) { panic("it was called") }), "failed to make cgroup")
}

// A cgroup with a relative path is below the cgroup of the process that made it. Another process
// finds it by its places.
func TestPodCgroupBelowThisProcess(t *testing.T) {
	roottest.Require(t)
	path := fmt.Sprintf("podfsm_host_%d.slice:cri-containerd:id", os.Getpid())
	c, err := PodCgroupOf(path, false, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.End(context.Background())) })
	cmd := c.startScript(t, "exec sleep 300")
	for _, dir := range c.Dirs() {
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintln(cmd.Process.Pid), string(procs), dir)
	}
	found, err := FindPodCgroups([]string{"id"})
	require.NoError(t, err)
	for _, dir := range c.Dirs() {
		require.Equal(t, "id", found[dir], dir)
	}

	// As if this process had been moved to another cgroup.
	elsewhere, err := PodCgroupOf("podfsm_elsewhere/"+path, false, nil)
	require.NoError(t, err)
	require.NotEqual(t, c.Dirs(), elsewhere.Dirs())
	again, err := PodCgroupOf("podfsm_elsewhere/"+path, false, c.Places())
	require.NoError(t, err)
	require.Equal(t, c.Dirs(), again.Dirs())
	reaped := make(chan error, 1)
	go func() { reaped <- cmd.Wait() }()
	require.NoError(t, again.End(t.Context()))
	require.Error(t, <-reaped)
	for _, dir := range c.Dirs() {
		require.NoDirExists(t, dir)
	}
}

// End removes a cgroup from every hierarchy, also from one that runc's library doesn't know. The
// test hides one from it.
func TestPodCgroupInAnotherHierarchy(t *testing.T) {
	c := newPodCgroup(t)
	cmd := c.startScript(t, "exec sleep 300")
	unknown := c.dirs[0]
	c.dirs = c.dirs[1:]
	survivor := startIn(t, Cgroups{unknown}, "exec sleep 300")
	reaped := make(chan error, 2)
	for _, cmd := range []*exec.Cmd{cmd, survivor} {
		go func() { reaped <- cmd.Wait() }()
	}
	there, err := c.Exists()
	require.NoError(t, err)
	require.True(t, there)
	require.NoError(t, c.End(t.Context()))
	require.NoDirExists(t, unknown)
	there, err = c.Exists()
	require.NoError(t, err)
	require.False(t, there)
	require.ErrorContains(t, <-reaped, "killed")
	require.ErrorContains(t, <-reaped, "killed")
}

// End waits until systemd has removed its unit. The test has only the unit's file.
func TestPodCgroupWhoseUnitStays(t *testing.T) {
	c := newPodCgroup(t)
	c.startScript(t, "exec sleep 300")
	c.unit = filepath.Join(t.TempDir(), "cri-containerd-id.scope")
	require.NoError(t, os.WriteFile(c.unit, nil, 0o644))

	done := make(chan error)
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { done <- c.End(ctx) }()
	soon(t, func() bool { return !slices.ContainsFunc(c.Dirs(), exists) }, "the cgroup is gone")
	select {
	case err := <-done:
		t.Fatalf("the unit is there: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	there, err := c.Exists()
	require.NoError(t, err)
	require.True(t, there)
	cancel(errors.New("too long"))
	err = <-done
	require.ErrorContains(t, err, `failed to have systemd forget "cri-containerd-id.scope", whose cgroup is gone: too long`)
	require.ErrorContains(t, err, "run systemctl stop cri-containerd-id.scope, then systemctl reset-failed cri-containerd-id.scope")
	require.ErrorContains(t, c.awaitUnit(ctx, errors.New("systemd is busy")), "too long\nsystemd is busy")

	go func() { done <- c.End(t.Context()) }()
	require.NoError(t, os.Remove(c.unit))
	require.NoError(t, <-done)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestPodCgroupStartFails(t *testing.T) {
	c := newPodCgroup(t)
	own, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.EqualError(t, c.Start(func(int) (int, error) { return 0, errors.New("fails") }), "fails")
	again, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.Equal(t, string(own), string(again), "this process stays in its cgroup")
	require.NoError(t, c.End(t.Context()))
}

func TestPodCgroupEndIsBounded(t *testing.T) {
	c := newPodCgroup(t)
	cmd := c.startScript(t, "exec sleep 300") // never reaped, but a zombie is not a member
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("too long"))
	err := c.End(ctx)
	require.ErrorContains(t, err, "processes ["+strconv.Itoa(cmd.Process.Pid)+"] of cgroup")
	require.ErrorContains(t, err, "don't end: too long")
	require.NoError(t, c.End(t.Context()))
}

// End thaws a cgroup, because a process in a frozen cgroup of v1 doesn't die.
func TestPodCgroupThatIsFrozen(t *testing.T) {
	c := newPodCgroup(t)
	c.startScript(t, "exec sleep 300")
	freeze(t, c, true)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	require.NoError(t, c.End(ctx))
}

// freeze freezes a cgroup, or thaws it.
func freeze(t *testing.T, c *PodCgroup, on bool) {
	t.Helper()
	done := 0
	for _, dir := range c.Dirs() {
		for file, values := range map[string][]string{"freezer.state": {"THAWED", "FROZEN"}, "cgroup.freeze": {"0", "1"}} {
			value := values[0]
			if on {
				value = values[1]
			}
			if writeFile(filepath.Join(dir, file), value) == nil {
				done++
			}
		}
	}
	require.NotZero(t, done)
}

func TestPodCgroupBelowOneThatIsFrozen(t *testing.T) {
	parent := newPodCgroup(t)
	parent.startScript(t, "exec sleep 300")
	c, err := PodCgroupOf(parent.path+"/below", false, nil)
	require.NoError(t, err)
	freeze(t, parent, true)
	err = c.Start(func(int) (int, error) { panic("it was called") })
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "is frozen: thaw it")
	freeze(t, parent, false)
	c.startScript(t, "exec sleep 300")
	require.NoError(t, c.End(t.Context()))
}

// End doesn't kill this process, even if it is in the cgroup.
func TestGroupOfThisProcess(t *testing.T) {
	for kind, groups := range kinds(t) {
		g, err := groups.Make("self")
		require.NoError(t, err)
		startIn(t, Cgroups{g.Dir()}, "exec sleep 300")
		own, err := os.ReadFile("/proc/self/cgroup")
		require.NoError(t, err)
		require.NoError(t, writeFile(filepath.Join(g.Dir(), "cgroup.procs"), strconv.Itoa(os.Getpid())))
		killErr := g.Kill(t.Context())
		root := filepath.Dir(groups.Dir())
		require.NoError(t, writeFile(filepath.Join(root, "cgroup.procs"), strconv.Itoa(os.Getpid())))
		require.NoError(t, killErr, kind)
		again, err := os.ReadFile("/proc/self/cgroup")
		require.NoError(t, err)
		require.Equal(t, string(own), string(again))
		pids, err := g.Procs()
		require.NoError(t, err)
		require.Empty(t, pids)
	}
}

func TestFindPodCgroups(t *testing.T) {
	roottest.Require(t)
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	require.NoError(t, err)
	require.NotEmpty(t, mounts)
	id := fmt.Sprintf("podfsm%d", os.Getpid())
	dashes := id + "-with-dashes"
	var want []string
	wantDashes := map[string]string{}
	for _, m := range mounts {
		parent := filepath.Join(m.Mountpoint, "find-"+id)
		theirs := filepath.Join(parent, "theirs")
		for _, dir := range []string{
			filepath.Join(parent, id), filepath.Join(parent, "cri-containerd-"+id+".scope"), filepath.Join(parent, id+"x"),
			filepath.Join(theirs, id), filepath.Join(theirs, "below", id), filepath.Join(parent, "their"+id+".scope"),
			filepath.Join(parent, "cri-containerd-"+dashes+".scope"), filepath.Join(parent, "x-"+dashes),
		} {
			require.NoError(t, os.MkdirAll(dir, 0o755))
		}
		require.NoError(t, os.Chown(theirs, 1000, 1000))
		require.NoError(t, os.Chown(filepath.Join(parent, id), 1000, 1000), "root has chosen its name")
		want = append(want, filepath.Join(parent, id), filepath.Join(parent, "cri-containerd-"+id+".scope"))
		wantDashes[filepath.Join(parent, "cri-containerd-"+dashes+".scope")] = dashes
		t.Cleanup(func() { require.NoError(t, EndCgroupDir(context.Background(), parent)) })
	}
	found, err := FindPodCgroups([]string{dashes})
	require.NoError(t, err)
	require.Equal(t, wantDashes, found)
	found, err = FindPodCgroups([]string{"none", id})
	require.NoError(t, err)
	require.ElementsMatch(t, want, slices.Collect(maps.Keys(found)))
	found, err = FindPodCgroups([]string{"none"})
	require.NoError(t, err)
	require.Empty(t, found)

	cmd := startIn(t, Cgroups{want[0]}, "exec sleep 300")
	reaped := make(chan error, 1)
	go func() { reaped <- cmd.Wait() }()
	for range 2 {
		require.NoError(t, EndCgroupDir(t.Context(), want[0]))
	}
	require.ErrorContains(t, <-reaped, "killed")
	require.NoDirExists(t, want[0])
}

func TestContainerNamed(t *testing.T) {
	known := func(id string) bool { return slices.Contains([]string{"id", "my-id", "b.slice", "c.scope"}, id) }
	for name, want := range map[string]string{
		"id":                                "id",
		"cri-containerd-id.scope":           "id",
		"cri-containerd-my-id.scope":        "my-id",
		"id.scope":                          "id",
		"b.slice":                           "b.slice",
		"c.scope":                           "c.scope",
		"a.slice":                           "",
		"system.slice:cri-containerd:id":    "id",
		"system.slice:cri-containerd:my-id": "my-id",
		"system.slice:cri-containerd:x-id":  "",
		"system.slice:id":                   "",
		"a:b:id":                            "",
		"x-id":                              "",
		"xid.scope":                         "",
		"":                                  "",
	} {
		id, ok := containerNamed(name, known)
		require.Equal(t, want != "", ok, name)
		if ok {
			require.Equal(t, want, id, name)
		}
	}
}

// elsewhere starts a process in a directory and in new namespaces.
func elsewhere(t *testing.T, dir string, flags uintptr) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if flags&unix.CLONE_NEWUSER != 0 {
		ids := []syscall.SysProcIDMap{{HostID: 0, Size: 65536}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
	}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

func TestSiblings(t *testing.T) {
	roottest.Require(t)
	parent := t.TempDir()
	dir := filepath.Join(parent, "s1")
	for _, sub := range []string{"s1", "s12", "gone"} {
		require.NoError(t, os.Mkdir(filepath.Join(parent, sub), 0o755))
	}
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(parent, link))

	ours, other := elsewhere(t, dir, 0), elsewhere(t, filepath.Join(parent, "s12"), 0)
	gone := elsewhere(t, filepath.Join(parent, "gone"), 0)
	require.NoError(t, os.Remove(filepath.Join(parent, "gone")))
	pods := []*exec.Cmd{elsewhere(t, dir, unix.CLONE_NEWNS), elsewhere(t, dir, unix.CLONE_NEWUSER)}
	c := newPodCgroup(t)
	pods = append(pods, c.startScript(t, "cd "+dir+"; exec sleep 300"))
	soon(t, func() bool {
		cwd, err := Readlink(t.Context(), pods[2].Process.Pid, "cwd")
		return err == nil && cwd == dir
	}, "it works there")

	want := map[int]string{ours.Process.Pid: dir, other.Process.Pid: filepath.Join(parent, "s12"), gone.Process.Pid: filepath.Join(parent, "gone")}
	for _, path := range []string{parent, link} {
		found, err := Siblings(t.Context(), path)
		require.NoError(t, err)
		require.Equal(t, want, found)
	}
	found, err := Siblings(t.Context(), filepath.Join(parent, "s1"))
	require.NoError(t, err)
	require.Empty(t, found, "they work below, not in it")

	reaped := make(chan error, 2)
	for _, cmd := range []*exec.Cmd{ours, gone} {
		go func() { reaped <- cmd.Wait() }()
	}
	for range 2 {
		require.NoError(t, KillIn(t.Context(), filepath.Join(link, "s1")))
		require.NoError(t, KillIn(t.Context(), filepath.Join(parent, "gone")))
		require.NoError(t, KillIn(t.Context(), filepath.Join(parent, "absent")))
	}
	for range 2 {
		require.ErrorContains(t, <-reaped, "killed")
	}
	for _, cmd := range append(pods, other) {
		stat, err := ReadStat(t.Context(), cmd.Process.Pid)
		require.NoError(t, err)
		require.NotContains(t, "ZX", string(stat.State), "it is left alone")
	}
}

func TestKillInIsBounded(t *testing.T) {
	roottest.Require(t)
	dir := filepath.Join(t.TempDir(), "s1")
	require.NoError(t, os.Mkdir(dir, 0o755))
	elsewhere(t, dir, 0)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("too long"))
	err := KillIn(ctx, dir)
	if err != nil {
		require.ErrorContains(t, err, "too long")
	}
}

// raising is a manager that raises the limit of locked memory, as that of cgroup v2 does.
type raising struct{ cgroups.Manager }

func (raising) GetCgroups() (*cgroups.Cgroup, error) {
	return &cgroups.Cgroup{Resources: &cgroups.Resources{}}, nil
}

func (raising) Set(*cgroups.Resources) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err
	}
	limit.Cur /= 2 // raising takes a capability that not every machine's root has
	return unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit)
}

// The processes of the daemon inherit the daemon's own limit of locked memory, even if a device
// filter has raised it.
func TestWeighKeepsTheLimitOfLockedMemory(t *testing.T) {
	var before, after unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before))
	require.NoError(t, (&PodCgroup{manager: raising{}}).setResources())
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &after))
	require.Equal(t, before, after)
}
