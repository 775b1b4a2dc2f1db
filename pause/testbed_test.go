package pause

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
)

// told is an exit as it was told.
type told struct {
	key  string
	exit Exit
}

// testbed starts pauses and ends them with the test, after which nothing of them may be left.
type testbed struct {
	*Processes
	files   Files
	seccomp *os.File
	image   string // a directory, the root filesystem of the image
	cgroup  string // the parent of all
	exits   chan told
}

func newTestbed(t *testing.T) *testbed {
	t.Helper()
	b := &testbed{files: testFiles(t), exits: make(chan told, 1000)}
	b.image = newImage(t)
	b.cgroup = newCgroupParent(t)
	var err error
	b.seccomp, err = SeccompFilter()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.seccomp.Close()) })
	b.Processes, err = NewProcesses(func(key string, exit Exit) { b.exits <- told{key, exit} })
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	require.NoError(t, b.Load(programs.init))
	return b
}

// newImage makes a root filesystem. Its mount points are there, because a test's user namespace doesn't own the directory.
func newImage(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "image")
	for _, sub := range []string{"dev", "work"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	for name, file := range map[string]string{"pause": programs.pause, "prober": programs.prober} {
		program, err := os.ReadFile(file)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), program, 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "text"), []byte("text"), 0o644))
	return dir
}

// newCgroupParent names a cgroup that is removed, with all below it, in every hierarchy.
func newCgroupParent(t *testing.T) string {
	t.Helper()
	parent := fmt.Sprintf("/podfsm-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	t.Cleanup(func() {
		cgroup, err := host.PodCgroupOf(parent, false, nil)
		require.NoError(t, err)
		require.NoError(t, cgroup.End(context.Background()))
	})
	return parent
}

// request is for a pod, whose process may be started once.
func (b *testbed) request(t *testing.T, pod Pod) StartRequest {
	t.Helper()
	settings := Settings{Files: b.files, RestrictOOMScoreAdj: true}
	if pod.Config.Linux.CgroupParent == "" {
		pod.Config.Linux.CgroupParent = b.cgroup
	}
	spec, err := complete(t, settings, pod)
	require.NoError(t, err)
	require.NoError(t, b.files.Setup(pod.ID, pod.Config))
	cgroup, err := host.PodCgroupOf(spec.Linux.CgroupsPath, false, nil)
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := b.End(context.Background(), pod.ID)
		require.NoError(t, err)
		b.Forget(pod.ID)
		require.NoError(t, cgroup.End(context.Background()))
		require.NoError(t, b.files.Remove(context.Background(), pod.ID))
	})
	return StartRequest{Key: pod.ID, Spec: spec, Rootfs: rootfsOf(b.files, pod.ID, b.image), Seccomp: b.seccomp, Cgroup: cgroup}
}

// rootfsOf mounts an image as the root filesystem of a sandbox.
func rootfsOf(files Files, id, image string) func(*os.File) (*os.File, error) {
	return func(userns *os.File) (*os.File, error) {
		return files.MountRootfs(id, []mount.Mount{{Type: "bind", Source: image, Options: []string{"rbind", "rw"}}}, "", userns)
	}
}

// start starts the pause of a pod.
func (b *testbed) start(t *testing.T, pod Pod) (StartRequest, Record) {
	t.Helper()
	r := b.request(t, pod)
	record, err := b.Start(t.Context(), r)
	require.NoError(t, err)
	return r, record
}

// exit is the next one that is told.
func (b *testbed) exit(t *testing.T) told {
	t.Helper()
	select {
	case exit := <-b.exits:
		return exit
	case <-time.After(10 * time.Second):
		require.Fail(t, "no exit is told")
		return told{}
	}
}

// prober is a pod whose pause is the prober.
func prober(args ...string) Pod {
	pod := testPod()
	pod.ImageConfig.Entrypoint = append([]string{"/prober"}, args...)
	return pod
}

func inUserNS(pod Pod) Pod {
	pod.UIDs, pod.GIDs = podUIDs, podGIDs
	return pod
}

func with(change func(*runtime.NamespaceOption)) Pod {
	pod := testPod()
	change(pod.Config.Linux.SecurityContext.NamespaceOptions)
	return pod
}

func proc(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

func link(t *testing.T, path string) string {
	t.Helper()
	target, err := os.Readlink(path)
	require.NoError(t, err)
	return target
}

// status reads fields of a /proc/PID/status.
func status(t *testing.T, pid int) map[string]string {
	t.Helper()
	fields := map[string]string{}
	for line := range strings.Lines(read(t, proc(pid, "status"))) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.Join(strings.Fields(value), " ")
	}
	return fields
}

// soon waits for a condition that needs no more than a moment.
func soon(t *testing.T, condition func() bool, what string) {
	t.Helper()
	for begun := time.Now(); !condition(); time.Sleep(time.Millisecond) {
		require.Less(t, time.Since(begun), 5*time.Second, what)
	}
}

// listens waits until pause handles signals: the first process of a pid namespace gets no other.
func listens(t *testing.T, pid int) {
	t.Helper()
	soon(t, func() bool { return strings.HasSuffix(status(t, pid)["SigCgt"], "14002") }, "it handles no signals")
}

func children(t *testing.T) []string {
	t.Helper()
	var all []string
	tasks, err := os.ReadDir("/proc/self/task")
	require.NoError(t, err)
	for _, task := range tasks {
		data, err := os.ReadFile(filepath.Join("/proc/self/task", task.Name(), "children"))
		if err == nil {
			all = append(all, strings.Fields(string(data))...)
		}
	}
	return all
}

// countFDs counts the descriptors of this process, without the one that the cgroups library keeps.
func countFDs(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, entry := range entries {
		if file, _ := os.Readlink("/proc/self/fd/" + entry.Name()); file != "/sys/fs/cgroup" {
			n++
		}
	}
	return n
}
