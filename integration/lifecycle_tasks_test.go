package integration

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// No shim runs pause, but clients of containerd see a container with a task, like that of a stock
// pod. Only podfsm may end it.
func TestTaskOfPause(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	pod := runPod(t, n, n.PodConfig("pod"))
	stock, err := n.RunPod(ctx, harness.StockHandler, n.PodConfig("stock"))
	require.NoError(t, err)
	service := n.Containerd.TaskService()
	pid, err := pod.Pid(ctx)
	require.NoError(t, err)

	see := func(pod *harness.Pod) map[string]string {
		seen := map[string]string{}
		note := func(call string, response any, err error) {
			require.NoError(t, err, call)
			seen[call] = strings.ReplaceAll(response.(interface{ String() string }).String(), pod.ID, "ID")
		}
		pid, err := pod.Pid(ctx)
		require.NoError(t, err)
		got, err := service.Get(ctx, &tasks.GetRequest{ContainerID: pod.ID})
		require.EqualValues(t, pid, got.GetProcess().GetPid())
		got.Process.Pid = 0
		note("get", got, err)
		pids, err := service.ListPids(ctx, &tasks.ListPidsRequest{ContainerID: pod.ID})
		require.Len(t, pids.GetProcesses(), 1)
		require.EqualValues(t, pid, pids.GetProcesses()[0].GetPid())
		require.NoError(t, err)
		metrics, err := service.Metrics(ctx, &tasks.MetricsRequest{Filters: []string{"id==" + pod.ID}})
		require.Len(t, metrics.GetMetrics(), 1)
		require.NoError(t, err)
		require.Equal(t, pod.ID, metrics.GetMetrics()[0].GetID())
		seen["metrics"] = metrics.GetMetrics()[0].GetData().GetTypeUrl()
		return seen
	}
	require.Equal(t, see(stock), see(pod))
	list, err := service.List(ctx, &tasks.ListTasksRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetTasks(), 2)
	others, err := service.List(namespaces.WithNamespace(ctx, "default"), &tasks.ListTasksRequest{})
	require.NoError(t, err)
	require.Empty(t, others.GetTasks(), "another containerd namespace")

	for _, tc := range []struct {
		name string
		call func() error
	}{
		{"kill", func() error {
			_, err := service.Kill(ctx, &tasks.KillRequest{ContainerID: pod.ID, Signal: 9})
			return err
		}},
		{"delete", func() error { _, err := service.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: pod.ID}); return err }},
		{"create", func() error { _, err := service.Create(ctx, &tasks.CreateTaskRequest{ContainerID: pod.ID}); return err }},
		{"start", func() error { _, err := service.Start(ctx, &tasks.StartRequest{ContainerID: pod.ID}); return err }},
		{"exec", func() error {
			_, err := service.Exec(ctx, &tasks.ExecProcessRequest{ContainerID: pod.ID, ExecID: "x"})
			return err
		}},
		{"pause", func() error { _, err := service.Pause(ctx, &tasks.PauseTaskRequest{ContainerID: pod.ID}); return err }},
		{"update", func() error { _, err := service.Update(ctx, &tasks.UpdateTaskRequest{ContainerID: pod.ID}); return err }},
		{"checkpoint", func() error {
			_, err := service.Checkpoint(ctx, &tasks.CheckpointTaskRequest{ContainerID: pod.ID})
			return err
		}},
	} {
		err := tc.call()
		require.Equal(t, codes.FailedPrecondition, status.Code(err), "%s: %v", tc.name, err)
		require.ErrorContains(t, err, "stop or remove the pod instead, crictl stopp "+pod.ID)
	}
	require.NoError(t, unix.Kill(pid, 0), "it still runs")

	// A restart changes nothing.
	seen := see(pod)
	require.NoError(t, n.Restart(ctx))
	service = n.Containerd.TaskService()
	require.Equal(t, seen, see(pod))

	// The daemon starts the calls of a connection in their order: the call waits once the next one
	// has an answer.
	wait, err := n.Containerd.Conn().(*grpc.ClientConn).NewStream(ctx, &grpc.StreamDesc{}, "/containerd.services.tasks.v1.Tasks/Wait")
	require.NoError(t, err)
	require.NoError(t, wait.SendMsg(&tasks.WaitRequest{ContainerID: pod.ID}))
	require.NoError(t, wait.CloseSend())
	_, err = service.Get(ctx, &tasks.GetRequest{ContainerID: pod.ID})
	require.NoError(t, err)
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	require.NoError(t, wait.RecvMsg(&tasks.WaitResponse{}))
	_, err = service.Get(ctx, &tasks.GetRequest{ContainerID: pod.ID})
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
	require.NoError(t, pod.StopAndRemove(ctx))
	require.NoError(t, stock.StopAndRemove(ctx))
	n.RequireClean(t, before)
}

// containerd's events of a pause are those of a stock pod.
func TestEventsOfPause(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	of := func(handler string) (topics []string) {
		ctx, cancel := context.WithCancel(namespaces.WithNamespace(t.Context(), "k8s.io"))
		defer cancel()
		stream, failed := n.Containerd.Subscribe(ctx, `topic~="^/tasks/"`, `topic=="/containers/delete"`)
		pod, err := n.RunPod(ctx, handler, n.PodConfig("pod"))
		require.NoError(t, err)
		require.NoError(t, pod.StopAndRemove(ctx))
		for len(topics) < 5 {
			select {
			case e := <-stream:
				topics = append(topics, e.Topic+" "+exitOf(t, e))
			case err := <-failed:
				require.NoError(t, err)
			case <-time.After(waitFor):
				return topics
			}
		}
		slices.Sort(topics[3:]) // the task and its container are deleted at the same time
		return topics
	}
	ours := of(harness.PodfsmHandler)
	require.Equal(t, []string{"/tasks/create ", "/tasks/start ", "/tasks/exit Code(137)", "/containers/delete ", "/tasks/delete Code(137)"}, ours)
	// A stock shim ends while its events are on their way: on a busy node one overtakes another, or is lost.
	var stock []string
	for range 5 {
		if stock = of(harness.StockHandler); len(stock) == len(ours) {
			break
		}
	}
	require.ElementsMatch(t, stock, ours)
	n.RequireClean(t, before)
}

// exitOf returns what an event says about the end of a task.
func exitOf(t *testing.T, e *events.Envelope) string {
	t.Helper()
	event, err := typeurl.UnmarshalAny(e.Event)
	require.NoError(t, err)
	switch event := event.(type) {
	case *eventtypes.TaskExit:
		require.Equal(t, event.GetContainerID(), event.GetID())
		return status.New(codes.Code(event.GetExitStatus()), "").Code().String()
	case *eventtypes.TaskDelete:
		return status.New(codes.Code(event.GetExitStatus()), "").Code().String()
	default:
		return ""
	}
}

// The sysctls of a pod are set after its interfaces exist, and override those of the plugins.
// Sysctls of the node are refused before anything is made.
func TestSysctls(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet, "fd00:91::/64"), harness.Plugin{
		"type": "tuning", "dataDir": filepath.Join(n.Dir(), "tuning"), "sysctl": map[string]string{"net.ipv4.conf.eth0.rp_filter": "2"},
	}))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, tc := range []struct {
		name    string
		sysctls map[string]string
		shape   harness.PodOption
		file    string // below /proc/sys, in the pod
		want    string
		refused string
	}{
		{name: "of an interface", sysctls: map[string]string{"net.ipv4.conf.eth0.arp_ignore": "1"}, file: "net/ipv4/conf/eth0/arp_ignore", want: "1"},
		{name: "with slashes", sysctls: map[string]string{"net/ipv4/conf/eth0/arp_announce": "2"}, file: "net/ipv4/conf/eth0/arp_announce", want: "2"},
		{name: "against a plugin", sysctls: map[string]string{"net.ipv4.conf.eth0.rp_filter": "1"}, file: "net/ipv4/conf/eth0/rp_filter", want: "1"},
		{name: "groups that may ping", sysctls: map[string]string{"net.ipv4.ping_group_range": "5 65535"}, file: "net/ipv4/ping_group_range", want: "5\t65535"},
		{name: "of every interface", sysctls: map[string]string{"net.ipv4.conf.all.rp_filter": "0"}, file: "net/ipv4/conf/all/rp_filter", want: "0"},
		{name: "no IPv6 on one interface", sysctls: map[string]string{"net.ipv6.conf.eth0.disable_ipv6": "1"}, file: "net/ipv6/conf/eth0/disable_ipv6", want: "1"},
		{name: "no IPv6", sysctls: map[string]string{"net.ipv6.conf.all.disable_ipv6": "1"}, file: "net/ipv6/conf/eth0/disable_ipv6", want: "1"},
		{name: "of the IPC namespace", sysctls: map[string]string{"kernel.shm_rmid_forced": "1"}, file: "kernel/shm_rmid_forced", want: "1"},
		{name: "of the IPC namespace, on the node's users", sysctls: map[string]string{"kernel.msgmax": "9000"}, shape: harness.HostUsers(), file: "kernel/msgmax", want: "9000"},
		{name: "the node's kernel", sysctls: map[string]string{"kernel.core_pattern": "|/x"}, refused: `sysctl "kernel.core_pattern" is not of a namespace`},
		{name: "a way out", sysctls: map[string]string{"net/../kernel/core_pattern": "|/x"}, refused: "is not of a namespace"},
		{name: "groups beyond the pod's", sysctls: map[string]string{"net.ipv4.ping_group_range": "0 2147483647"}, refused: "beyond the 65536 ids of its user namespace"},
		{name: "the node's network", sysctls: map[string]string{"net.ipv4.ip_forward": "0"}, shape: harness.HostNetwork(), refused: "would change the node's"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			options := []harness.PodOption{func(c *runtime.PodSandboxConfig) { c.Linux.Sysctls = tc.sysctls }}
			if tc.shape != nil {
				options = append(options, tc.shape)
			}
			config := n.PodConfig("pod", options...)
			if tc.refused != "" {
				err := failRun(t, n, harness.PodfsmHandler, config)
				require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
				require.ErrorContains(t, err, tc.refused)
				return
			}
			node, _ := os.ReadFile(filepath.Join("/proc/sys", tc.file)) // of an interface that the node hasn't
			pod := runPod(t, n, config)
			c := startContainer(t, pod, "main")
			require.Equal(t, tc.want, strings.TrimSpace(exec(t, c, "cat", "/proc/sys/"+tc.file)))
			if strings.HasPrefix(tc.name, "no IPv6") {
				require.NotContains(t, exec(t, c, "ip", "addr", "show", "eth0"), "inet6")
			}
			after, _ := os.ReadFile(filepath.Join("/proc/sys", tc.file))
			require.Equal(t, string(node), string(after), "the node's own")
			require.NoError(t, pod.StopAndRemove(t.Context()))
		})
	}

	// A sysctl that the pod has changed itself is no damage to report after a restart.
	t.Run("checked after a restart", func(t *testing.T) {
		for _, tc := range []struct {
			name    string
			sysctls map[string]string
		}{
			{"against-a-plugin", map[string]string{"net/ipv4/conf/eth0/rp_filter": "1"}},
			{"no-ipv6", map[string]string{"net.ipv6.conf.all.disable_ipv6": "1"}},
		} {
			startPod(t, n, harness.PodfsmHandler, n.PodConfig(tc.name, func(c *runtime.PodSandboxConfig) { c.Linux.Sysctls = tc.sysctls }))
		}
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		require.Eventually(t, func() bool { return strings.Contains(n.Log(), "checked 2 adopted sandboxes") }, waitFor, tick)
		require.NotContains(t, n.Log(), "CNI CHECK failed, sandbox left running")
	})
	require.NoError(t, n.SetChain(t.Context(), n.DefaultChain()...))
	n.RequireClean(t, before)
}

// A running container keeps the shim of the pod from ending. The removal of the pod ends both.
func TestShimWithContainerEnds(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	pod := runPod(t, n, n.PodConfig("pod"))
	container := startContainer(t, pod, "stays", harness.Run("sleep", "600"))
	pid, err := container.Pid(t.Context())
	require.NoError(t, err)
	within(t, "the end of a pod", func(ctx context.Context) {
		require.NoError(t, n.Containerd.SandboxController("podfsm").Shutdown(namespaces.WithNamespace(ctx, "k8s.io"), pod.ID))
	})
	require.Eventually(t, func() bool { return ended(pid) }, waitFor, tick)
	require.Eventually(t, func() bool {
		census, err := n.Census(t.Context())
		return err == nil && len(census[harness.Shims]) == 0
	}, waitFor, tick)
}

// A daemon that is killed after the start of a shim, before containerd has recorded it, leaves a
// shim that never ends by itself. The pod gets another shim for its next container, and its removal
// ends both.
func TestKilledWhileShimStarts(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, tc := range []struct {
		name string
		used bool
	}{
		{"stopped at once", false}, {"used again", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := runPod(t, n, n.PodConfig("pod"))
			bundle := filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io", pod.ID)
			require.NoError(t, n.StallBefore(t.Context(), "openat", filepath.Join(bundle, "shim-binary-path")))
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = pod.StartContainer(context.Background(), "interrupted")
			}()
			require.Eventually(t, func() bool {
				census, err := n.Census(t.Context())
				return err == nil && len(census[harness.Shims]) == 1 && !strings.Contains(census[harness.Shims][0], " start")
			}, waitFor, tick)
			require.NoError(t, n.Kill(t.Context()))
			<-done
			require.NoError(t, n.Start(t.Context()))
			if tc.used {
				require.Equal(t, "0\n", exec(t, startContainer(t, pod, "next"), "id", "-u"))
			}
			require.NoError(t, pod.StopAndRemove(t.Context()))
		})
	}
	n.RequireClean(t, before)
}
