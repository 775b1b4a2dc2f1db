package integration

import (
	"bufio"
	"context"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	cg1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/integration/harness"
)

// makeCgroup makes a cgroup of a node in every hierarchy, as the kubelet does. It is removed with
// the node.
func makeCgroup(t *testing.T, path string) {
	t.Helper()
	for _, top := range hierarchies(t) {
		require.NoError(t, os.MkdirAll(filepath.Join(top, path), 0o755))
	}
}

// hierarchies returns the directories at which the hierarchies of this machine are mounted.
func hierarchies(t *testing.T) []string {
	t.Helper()
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	tops, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	require.NoError(t, err)
	require.NotEmpty(t, tops)
	for i := range tops {
		tops[i] = filepath.Dir(tops[i])
	}
	return tops
}

// cgroupsOf returns the cgroups of a process by hierarchy.
func cgroupsOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	require.NoError(t, err)
	return host.ParseCgroups(text)
}

// cgroupFacts returns the cgroups of the processes of a pod, and whether it has stats. The pod is
// removed without leftovers.
func cgroupFacts(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) (_ facts, figures bool) {
	t.Helper()
	pod, err := n.RunPod(t.Context(), handler, config)
	require.NoError(t, err)
	main := startContainer(t, pod, "main")
	pause, err := pod.Pid(t.Context())
	require.NoError(t, err)
	inMain, err := main.Pid(t.Context())
	require.NoError(t, err)
	seen := facts{}
	own := strings.NewReplacer(pod.ID, "POD", main.ID, "MAIN")
	for name, pid := range map[string]int{"pause": pause, "main": inMain} {
		for hierarchy, path := range cgroupsOf(t, pid) {
			if !strings.HasPrefix(hierarchy, "name=podfsm-node") { // the harness's marks
				seen[name+" in "+hierarchy] = own.Replace(path)
			}
		}
	}
	_, noStats := n.Runtime.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{PodSandboxId: pod.ID})
	require.NoError(t, pod.StopAndRemove(t.Context()))
	left, err := host.FindPodCgroups([]string{pod.ID, main.ID})
	require.NoError(t, err)
	require.Empty(t, left)
	return seen, noStats == nil
}

const slicesConfig = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.slices]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  options = {SystemdCgroup = true}
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.slices-stock]
  runtime_type = "io.containerd.runc.v2"
  options = {SystemdCgroup = true}
`

// For every accepted cgroup parent, the processes of a pod are where those of a stock pod are. A
// kubelet with the systemd driver sends slices, also to a runtime handler that is not configured
// for systemd.
func TestCgroupParentsLikeStock(t *testing.T) {
	if os.Getenv("PODFSM_CGROUPS") == "systemd" {
		t.Skip("the parents are for the other driver")
	}
	n := harness.StartNode(t, harness.Config{TOML: slicesConfig})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	t.Run("parents", func(t *testing.T) {
		slice := n.SliceParent("pod1")
		makeCgroup(t, slice)
		for _, tc := range []struct{ name, parent string }{
			{"slice", slice},
			{"slice and slash", slice + "/"},
			{"below a slice", filepath.Dir(slice) + "/pod1"},
			{"slashes", "//" + n.Name() + "//pod1//"},
			{"dots", "/" + n.Name() + "/./x/../pod1"},
			{"above the root", "/../../" + n.Name() + "/pod1"},
			{"relative", n.Name() + "/pod1"},
			{"none", ""},
		} {
			t.Run(tc.name, func(t *testing.T) {
				config := n.PodConfig("pod", func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = tc.parent })
				stock, figures := cgroupFacts(t, n, harness.StockHandler, config)
				ours, oursToo := cgroupFacts(t, n, harness.PodfsmHandler, config)
				require.NotEmpty(t, stock)
				require.Equal(t, stock, ours)
				require.True(t, oursToo || !figures)
			})
		}
		harness.RemoveEmptyDirs()
	})
	for _, bad := range []struct{ what, says string }{
		{"a\nb", "line break"}, {"a\x00", "NUL"}, {strings.Repeat("x", 256), "more than 255 bytes"},
	} {
		for _, in := range []struct{ handler, parent string }{
			{harness.PodfsmHandler, "/" + n.Name() + "/" + bad.what}, {"slices", "/" + bad.what + ".slice"},
		} {
			config := n.PodConfig("refused", func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = in.parent })
			err := failRun(t, n, in.handler, config)
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
			require.ErrorContains(t, err, bad.says)
			require.ErrorContains(t, err, fmt.Sprintf("runtime handler %q", in.handler))
		}
	}
	// The handlers use the systemd driver, and the kubelet does not.
	require.Error(t, failRun(t, n, "slices-stock", n.PodConfig("path")))
	err = failRun(t, n, "slices", n.PodConfig("path"))
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
	require.ErrorContains(t, err, `runtime handler "slices" has SystemdCgroup = true; set SystemdCgroup = false in the options of the handler, or cgroupDriver: systemd in the kubelet's configuration`)

	for _, category := range []string{harness.Cgroups, harness.Processes} {
		delete(before, category) // runc leaves the parents of a relative path
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		after, err := n.TidyCensus(t.Context())
		require.NoError(c, err)
		require.Empty(c, after[harness.Processes])
		delete(after, harness.Cgroups)
		require.Empty(c, before.Diff(after))
	}, waitFor, tick)
}

// nesting runs a daemon like a container engine that runs a node in a container: each hierarchy is
// mounted at the cgroup of the container. Without a cgroup namespace, /proc/PID/cgroup shows the
// paths of the host.
const nesting = `set -e
node=$1 cgroup=$2 namespace=$3
cpuset() {
	for file in cpuset.cpus cpuset.mems; do
		[ ! -e "$1/$file" ] || cat "$1/../$file" >"$1/$file"
	done
}
for top in /sys/fs/cgroup/*; do
	[ -e "$top/cgroup.procs" ] || continue
	mkdir -p "$top/$cgroup/daemon"
	for dir in "$top/${cgroup%/*}" "$top/$cgroup" "$top/$cgroup/daemon"; do cpuset "$dir"; done
	echo $$ >"$top/$cgroup/cgroup.procs"
done
exec unshare --mount --propagation private $namespace sh -e -c '
	mount -t tmpfs tmpfs "$1/cgroups"
	for top in /sys/fs/cgroup/*; do
		[ -e "$top/cgroup.procs" ] || continue
		at="$1/cgroups/${top##*/}"
		mkdir "$at"
		case "$3 ${top##*/}" in
		" "*) mount --bind "$top/$2" "$at" ;;
		*" unified") mount -t cgroup2 cgroup2 "$at" ;;
		*" systemd") mount -t cgroup -o none,name=systemd cgroup "$at" ;;
		*) mount -t cgroup -o "${top##*/}" cgroup "$at" ;;
		esac
	done
	umount --lazy /sys/fs/cgroup
	mount --move "$1/cgroups" /sys/fs/cgroup
	echo nested
	exec sleep infinity' nested "$node" "$cgroup" "$namespace"
`

// nestedDaemon starts the daemon in the namespaces of a process, in a cgroup below the node's that a file names.
const nestedDaemon = `#!/bin/sh
set -e
for top in /sys/fs/cgroup/*; do
	[ -e "$top/cgroup.procs" ] || continue
	mkdir -p "$top/%[1]s/$(cat %[2]s/within)"
	for file in cpuset.cpus cpuset.mems; do
		[ ! -e "$top/$file" ] || cat "$top/%[1]s/$file" >"$top/%[1]s/$(cat %[2]s/within)/$file"
	done
	echo $$ >"$top/%[1]s/$(cat %[2]s/within)/cgroup.procs"
done
exec nsenter --target %[3]d --mount %[4]s -- %[5]s "$@"
`

// nest runs the daemon of a node nested below a cgroup.
func nest(n *harness.Node, cgroup, namespace string) (string, error) {
	if err := os.Mkdir(filepath.Join(n.Dir(), "cgroups"), 0o755); err != nil {
		return "", err
	}
	holder := osexec.Command("sh", "-c", nesting, "nesting", n.Dir()+"/", cgroup, namespace)
	holder.Stderr = os.Stderr
	out, err := holder.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := holder.Start(); err != nil {
		return "", err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "nested\n" {
		return "", fmt.Errorf("the node can't be nested: %q, %w, %w", line, err, holder.Wait())
	}
	go func() { _ = holder.Wait() }() // it ends with the node
	dir := filepath.Join(n.Dir(), "nested")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := os.Symlink(n.CLI(), filepath.Join(dir, "podfsm")); err != nil {
		return "", err
	}
	program := filepath.Join(dir, "containerd")
	script := fmt.Sprintf(nestedDaemon, cgroup, n.Dir(), holder.Process.Pid, namespace, filepath.Join(filepath.Dir(n.CLI()), "containerd-podfsm"))
	return program, os.WriteFile(program, []byte(script), 0o755)
}

// A node in a container runs pods, adopts them after a restart and removes them, whatever it sees
// of the cgroups of the host.
func TestNestedCgroups(t *testing.T) {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil {
		t.Skip("the nesting is one of cgroup v1")
	}
	for _, tc := range []struct{ name, namespace string }{
		{"the host's paths", ""}, {"a cgroup namespace", "--cgroup"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			within := func(n *harness.Node, cgroup string) error {
				return os.WriteFile(filepath.Join(n.Dir(), "within"), []byte(cgroup), 0o644)
			}
			top := ""
			n := harness.StartNode(t, harness.Config{Install: func(n *harness.Node) (string, error) {
				top = n.Name() + "/container"
				if err := within(n, "daemon"); err != nil {
					return "", err
				}
				return nest(n, top, tc.namespace)
			}})
			warm, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("warm"))
			require.NoError(t, err)
			startContainer(t, warm, "main")
			require.NoError(t, warm.StopAndRemove(t.Context()))
			before, err := n.Rest(t.Context())
			require.NoError(t, err)
			for _, finding := range examine(t, n) {
				if finding.GetCheck() == "cgroups" {
					require.Equal(t, "ok", finding.GetStatus(), "%v", finding)
				}
			}

			pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("pod"))
			require.NoError(t, err)
			main := startContainer(t, pod, "main")
			pause, err := pod.Pid(t.Context())
			require.NoError(t, err)
			check := func() {
				t.Helper()
				for hierarchy, path := range cgroupsOf(t, pause) {
					require.Equal(t, "/"+top+pod.Config.GetLinux().GetCgroupParent()+"/"+pod.ID, path, hierarchy)
				}
				exec(t, main, "true")
				for asked, stats := range podStats(t, n, pod) {
					require.NotZero(t, stats.GetLinux().GetMemory().GetWorkingSetBytes().GetValue(), asked)
				}
				require.NotZero(t, pauseMemory(t, n, pod.ID))
			}
			check()
			slice, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("slice", func(c *runtime.PodSandboxConfig) {
				c.Linux.CgroupParent = n.SliceParent("pod2")
			}))
			require.NoError(t, err)
			inSlice, err := slice.Pid(t.Context())
			require.NoError(t, err)
			want := filepath.Base(n.SliceParent("pod2")) + ":cri-containerd:" + slice.ID
			for hierarchy, path := range cgroupsOf(t, inSlice) {
				if hierarchy == "" { // runc's library knows no own cgroup of v2 beside v1
					require.Equal(t, "/"+top+"/"+want, path)
				} else {
					require.Equal(t, "/"+top+"/daemon/"+want, path, hierarchy)
				}
			}

			// The next daemon is in another cgroup, and one pause has ended in between.
			require.NoError(t, n.Kill(t.Context()))
			require.NoError(t, unix.Kill(inSlice, unix.SIGKILL))
			require.NoError(t, within(n, "another"))
			require.NoError(t, n.Start(t.Context()))
			state, err := pod.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, state.GetState())
			check()
			for _, pod := range []*harness.Pod{pod, slice} {
				require.NoError(t, pod.StopAndRemove(context.WithoutCancel(t.Context())))
			}
			left, err := host.FindPodCgroups([]string{pod.ID, slice.ID, main.ID})
			require.NoError(t, err)
			require.Empty(t, left)
			require.NoError(t, n.Kill(t.Context())) // leaves the first cgroup of the daemon
			require.NoError(t, within(n, "daemon"))
			require.NoError(t, n.Start(t.Context()))
			for _, hierarchy := range hierarchies(t) {
				_ = os.Remove(filepath.Join(hierarchy, top, "another"))
			}
			n.RequireClean(t, before)
		})
	}
}

// pauseMemory returns the memory of a pause in the tasks API.
func pauseMemory(t *testing.T, n *harness.Node, id string) uint64 {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	metrics, err := n.Containerd.TaskService().Metrics(ctx, &tasks.MetricsRequest{Filters: []string{"id==" + id}})
	require.NoError(t, err)
	require.Len(t, metrics.GetMetrics(), 1)
	figures := &cg1.Metrics{}
	require.NoError(t, typeurl.UnmarshalTo(metrics.GetMetrics()[0].GetData(), figures))
	return figures.GetMemory().GetUsage().GetUsage()
}
