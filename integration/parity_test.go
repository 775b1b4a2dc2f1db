package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// answers are what a caller of the CRI was told in the course of a scenario, field by field.
type answers struct {
	facts
	t       *testing.T
	replace []string // what is a pod's own, and a name for it
}

// own names a text that differs from pod to pod.
func (a *answers) own(text, name string) {
	if text != "" {
		a.replace = append(a.replace, text, name)
	}
}

// note keeps an answer or an error.
func (a *answers) note(call string, m proto.Message, err error) {
	a.t.Helper()
	if err != nil {
		failed, _ := status.FromError(err)
		a.facts[call+" error"] = failed.Code().String() + ": " + failed.Message()
		return
	}
	text, err := protojson.Marshal(m)
	require.NoError(a.t, err)
	a.add(call, text)
}

// add keeps the fields of a JSON object, and those of objects that stand in it as text.
func (a *answers) add(path string, text []byte) {
	a.t.Helper()
	var value any
	decoder := json.NewDecoder(strings.NewReader(string(text)))
	decoder.UseNumber()
	require.NoError(a.t, decoder.Decode(&value))
	a.walk(path, value)
}

func (a *answers) walk(path string, value any) {
	switch v := value.(type) {
	case map[string]any:
		for key, below := range v {
			a.walk(path+"."+key, below)
		}
	case []any:
		for i, below := range v {
			a.walk(fmt.Sprintf("%s[%d]", path, i), below)
		}
	case string:
		var object map[string]any
		if strings.HasPrefix(v, "{") && json.Unmarshal([]byte(v), &object) == nil {
			a.add(path, []byte(v))
			return
		}
		a.facts[path] = v
	default:
		a.facts[path] = fmt.Sprint(v)
	}
}

var (
	isTime = regexp.MustCompile(`(?i)(createdAt|startedAt|finishedAt|timestamp|\.created_at|\.at)$`)
	// The end of pause is told while its network is taken down, and by stock while its state is set; which comes first is chance.
	isLast    = regexp.MustCompile(`^removed event \d+\.podSandboxStatus\.(network\.ip|state)$`)
	isPid     = regexp.MustCompile(`\.info\.pid$`)
	isMAC     = regexp.MustCompile(`([0-9a-f]{2}:){5}[0-9a-f]{2}`)
	isVeth    = regexp.MustCompile(`veth[0-9a-f]{8}`)
	isHandler = regexp.MustCompile(`(?i)\.runtimeHandler$`)
	isNetNS   = regexp.MustCompile(`podfsm-POD$|cni-[0-9a-f-]{36}$`)
	isProcNS  = regexp.MustCompile(`^/proc/\d+/ns/`)
	isFigure  = regexp.MustCompile(`(usageCoreNanoSeconds|usageNanoCores|Bytes|pageFaults|majorPageFaults|inodesUsed)\.value$`)
)

// normal are the facts without what differs from pod to pod.
func (a *answers) normal() facts {
	replacer := strings.NewReplacer(a.replace...)
	normal := facts{}
	for path, value := range a.facts {
		path, value = replacer.Replace(path), replacer.Replace(value)
		value = isMAC.ReplaceAllString(isVeth.ReplaceAllString(isNetNS.ReplaceAllString(value, "NETNS"), "VETH"), "MAC")
		value = isProcNS.ReplaceAllString(value, "/proc/PID/ns/")
		path = isVeth.ReplaceAllString(path, "VETH")
		switch {
		case isTime.MatchString(path) && value != "0":
			value = "a time"
		case isPid.MatchString(path) && value != "0":
			value = "a pid"
		case isLast.MatchString(path):
			continue
		case isHandler.MatchString(path):
			value = "its handler"
		case isFigure.MatchString(path):
			value = "a figure"
		}
		normal[path] = value
	}
	return normal
}

// parityOf runs the scenario by a handler.
func parityOf(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) facts {
	t.Helper()
	a := &answers{facts: facts{}, t: t}
	ctx := t.Context()
	a.own(n.Dir(), "NODE")
	a.own(n.Name(), "NODE")
	events, err := n.Events(ctx)
	require.NoError(t, err)
	var pod *harness.Pod
	noteEvents := func(when, id string, last runtime.ContainerEventType) {
		t.Helper()
		all, err := events.WaitFor(ctx, func(all []*runtime.ContainerEventResponse) bool { return len(harness.OfType(all, id, last)) > 0 })
		require.NoError(t, err)
		events.Close()
		// Events that nobody has waited for are kept for the next subscriber.
		all = slices.DeleteFunc(all, func(e *runtime.ContainerEventResponse) bool {
			return e.GetPodSandboxStatus().GetId() != pod.ID && e.GetContainerId() != pod.ID
		})
		for i, event := range all {
			a.note(fmt.Sprintf("%s event %d", when, i), event, nil)
		}
	}

	pod, err = n.RunPod(ctx, handler, config)
	require.NoError(t, err)
	a.own(pod.ID, "POD")
	ip, err := pod.IP(ctx)
	require.NoError(t, err)
	a.own(ip, "IP")
	look := func(when string) {
		t.Helper()
		resp, err := n.Runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod.ID, Verbose: true})
		if err == nil {
			delete(resp.Info, "podfsm")
		}
		a.note(when+" status", resp, err)
		for name, filter := range map[string]*runtime.PodSandboxFilter{
			"id":    {Id: pod.ID[:20]},
			"label": {LabelSelector: map[string]string{"io.kubernetes.pod.uid": config.GetMetadata().GetUid()}},
			"ready": {Id: pod.ID, State: &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}},
		} {
			list, err := n.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: filter})
			a.note(when+" list by "+name, list, err)
			stream, err := n.Runtime.StreamPodSandboxes(ctx, &runtime.StreamPodSandboxesRequest{Filter: filter})
			require.NoError(t, err)
			for err == nil {
				var piece *runtime.StreamPodSandboxesResponse
				piece, err = stream.Recv()
				a.note(when+" stream by "+name, piece, err)
			}
		}
		stats, err := n.Runtime.PodSandboxStats(ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: pod.ID})
		if err == nil {
			stats.Stats.Linux = nil // TestStatsLikeStock
		}
		a.note(when+" stats", stats, err)
	}
	look("running")

	main, err := pod.StartContainer(ctx, "main")
	require.NoError(t, err)
	a.own(main.ID, "MAIN")
	noteEvents("running", main.ID, runtime.ContainerEventType_CONTAINER_STARTED_EVENT)
	a.addProcesses(n, pod, main)
	containerStatus, err := n.Runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: main.ID, Verbose: true})
	a.note("container", containerStatus, err)

	update := func(when string, megabytes int64) {
		t.Helper()
		resp, err := n.Runtime.UpdatePodSandboxResources(ctx, &runtime.UpdatePodSandboxResourcesRequest{
			PodSandboxId: pod.ID,
			Overhead:     &runtime.LinuxContainerResources{CpuShares: 10},
			Resources:    &runtime.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: megabytes << 20},
		})
		a.note(when, resp, err)
		look(when)
	}
	update("updated", 64)

	require.NoError(t, n.Stop(ctx))
	require.NoError(t, n.Start(ctx))
	look("restarted")
	update("updated again", 32)
	events, err = n.Events(ctx)
	require.NoError(t, err)

	a.note("stop", &runtime.StopPodSandboxResponse{}, pod.Stop(ctx))
	look("stopped")
	a.note("stop again", &runtime.StopPodSandboxResponse{}, pod.Stop(ctx))
	_, err = pod.StartContainer(ctx, "late")
	a.note("late container", &runtime.CreateContainerResponse{}, err)
	_, err = n.Runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: pod.ID})
	a.note("late forward", &runtime.PortForwardResponse{}, err)
	a.note("remove", &runtime.RemovePodSandboxResponse{}, pod.Remove(ctx))
	a.note("remove again", &runtime.RemovePodSandboxResponse{}, pod.Remove(ctx))
	a.note("stop removed", &runtime.StopPodSandboxResponse{}, pod.Stop(ctx))
	look("removed")

	noteEvents("removed", pod.ID, runtime.ContainerEventType_CONTAINER_DELETED_EVENT)
	return a.normal()
}

// addProcesses adds what the kernel has of pause and of a container: cgroups, namespaces and who shares them, mounts.
func (a *answers) addProcesses(n *harness.Node, pod *harness.Pod, main *harness.Container) {
	a.t.Helper()
	pause, err := pod.Pid(a.t.Context())
	require.NoError(a.t, err)
	inMain, err := main.Pid(a.t.Context())
	require.NoError(a.t, err)
	require.EventuallyWithT(a.t, func(c *assert.CollectT) { // runc says that it runs a moment before
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", inMain))
		require.NoError(c, err)
		require.NotContains(c, string(comm), "runc")
	}, harness.Patience(time.Minute), 10*time.Millisecond)
	for name, pid := range map[string]int{"pause": pause, "main": inMain} {
		proc := filepath.Join("/proc", strconv.Itoa(pid))
		read := func(file string) string {
			text, err := os.ReadFile(filepath.Join(proc, file))
			require.NoError(a.t, err)
			return string(text)
		}
		for line := range strings.Lines(read("cgroup")) {
			if _, at, _ := strings.Cut(line, ":"); !strings.HasPrefix(at, "name=podfsm-node") { // the harness's marks
				a.facts[name+" cgroup "+strings.SplitN(at, ":", 2)[0]] = strings.TrimSpace(strings.SplitN(at, ":", 2)[1])
			}
		}
		for _, file := range []string{"uid_map", "gid_map", "oom_score_adj", "limits", "cmdline", "comm"} {
			a.facts[name+" "+file] = read(file)
		}
		for _, file := range []string{"attr/current", "attr/exec", "attr/apparmor/current"} {
			text, err := os.ReadFile(filepath.Join(proc, file)) // an error where no security module is loaded
			a.facts[name+" "+file] = fmt.Sprint(string(text), err != nil)
		}
		for line := range strings.Lines(read("mountinfo")) {
			fields := strings.Fields(line)
			at := slices.Index(fields, "-")
			a.facts[name+" mount "+fields[4]] = strings.Join(append([]string{fields[5]}, fields[at+1]), " ")
		}
		for line := range strings.Lines(read("status")) {
			if key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t"); strings.HasPrefix(key, "Cap") || key == "Seccomp" || key == "NoNewPrivs" || key == "Groups" || key == "Uid" || key == "Gid" {
				a.facts[name+" "+key] = value
			}
		}
		for _, namespace := range []string{"net", "user", "ipc", "uts", "pid", "mnt", "cgroup"} {
			id := func(proc string) string {
				link, err := os.Readlink(filepath.Join(proc, "ns", namespace))
				require.NoError(a.t, err)
				return link
			}
			var shares []string
			for with, other := range map[string]string{"the node": fmt.Sprintf("/proc/%d", n.Pid()), "pause": fmt.Sprintf("/proc/%d", pause)} {
				if proc != other && id(proc) == id(other) {
					shares = append(shares, with)
				}
			}
			slices.Sort(shares)
			a.facts[name+" "+namespace+" namespace shared with"] = strings.Join(shares, ", ")
		}
	}
}

// deliberateAnswers are the differences between what is told of a stock pod and of ours; docs/parity.md lists them. Anything else fails.
var deliberateAnswers = map[string]*regexp.Regexp{
	"the loopback is set up without a plugin, so it is in no plugin's result": regexp.MustCompile(`\.(cniResult|CNIResult)\.Interfaces\.lo\.`),
	"the runtime makes the pod's user namespace, none is there before":        regexp.MustCompile(`\.runtimeSpec\.linux\.namespaces\[\d\]\.path$`),
	"pause has less than a container": regexp.MustCompile( // never more, see TestContainersLikeStock
		`\.runtimeSpec\.(mounts|process\.capabilities|linux\.(maskedPaths|readonlyPaths|seccomp|resources\.devices))[.[]|^pause (mount /|CapBnd)`),
	"a refusal has a code that says why": regexp.MustCompile(`^late forward error$`),
}

// A caller of the CRI can't tell a pod of ours from a stock one, but for what is listed here.
func TestAnswersLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet))) // any network will do, and this one is fast
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	seen := map[string]bool{}
	for name, shape := range map[string]harness.PodOption{
		"userns":       func(*runtime.PodSandboxConfig) {},
		"host users":   harness.HostUsers(),
		"host network": harness.HostNetwork(),
	} {
		t.Run(name, func(t *testing.T) {
			config := n.PodConfig("pod", shape)
			stock, ours := parityOf(t, n, harness.StockHandler, config), parityOf(t, n, harness.PodfsmHandler, config)
			require.Greater(t, len(stock), 200)
			for path, values := range stock.diff(ours) {
				why, ok := deliberately(path)
				seen[why] = true
				if !ok {
					t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
				}
			}
		})
	}
	for why := range deliberateAnswers {
		require.True(t, seen[why], "there is no such difference any more: %s", why)
	}
	n.RequireClean(t, before)
}

// Pods that name no handler are podfsm's where that is the default one, and a caller sees no other difference to the default of a stock node.
func TestDefaultHandlerLikeStock(t *testing.T) {
	told := map[string]facts{}
	for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
		n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = %q
`, handler)})
		require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
		before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
		require.NoError(t, err)
		told[handler] = parityOf(t, n, "", n.PodConfig("pod"))
		n.RequireClean(t, before)

		resp, err := n.Runtime.Status(t.Context(), &runtime.StatusRequest{})
		require.NoError(t, err)
		for _, of := range resp.GetRuntimeHandlers() {
			told[handler]["features of "+of.GetName()] = of.GetFeatures().String()
		}
		pod := startPod(t, n, "", n.PodConfig("whose"))
		_, err = n.Sandboxes().Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: pod.ID})
		require.Equal(t, handler == harness.PodfsmHandler, err == nil, "%v", err)
	}
	for path, values := range told[harness.StockHandler].diff(told[harness.PodfsmHandler]) {
		if _, ok := deliberately(path); !ok {
			t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
		}
	}
}

func deliberately(path string) (why string, ok bool) {
	for why, paths := range deliberateAnswers {
		if paths.MatchString(path) {
			return why, true
		}
	}
	return "", false
}

// Events that nobody has waited for are kept for the next subscriber. They tell what was so when they were made.
func TestLateEventsLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	pods, ips := map[string]*harness.Pod{}, map[string]string{}
	for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
		pods[handler], err = n.RunPod(t.Context(), handler, n.PodConfig("pod", harness.HostUsers()))
		require.NoError(t, err)
		ips[handler], err = pods[handler].IP(t.Context())
		require.NoError(t, err)
		require.NoError(t, pods[handler].StopAndRemove(t.Context()))
	}
	events, err := n.Events(t.Context())
	require.NoError(t, err)
	defer events.Close()
	all, err := events.WaitFor(t.Context(), func(all []*runtime.ContainerEventResponse) bool {
		return len(harness.OfType(all, pods[harness.PodfsmHandler].ID, runtime.ContainerEventType_CONTAINER_DELETED_EVENT)) > 0
	})
	require.NoError(t, err)
	lateOf := func(handler string) facts {
		a := &answers{facts: facts{}, t: t}
		a.own(pods[handler].ID, "POD")
		for _, kind := range []runtime.ContainerEventType{runtime.ContainerEventType_CONTAINER_CREATED_EVENT, runtime.ContainerEventType_CONTAINER_STARTED_EVENT} {
			of := harness.OfType(all, pods[handler].ID, kind)
			require.Len(t, of, 1)
			require.Equal(t, ips[handler], of[0].GetPodSandboxStatus().GetNetwork().GetIp(), "%s by %s", kind, handler)
			of[0].PodSandboxStatus.Network = nil
			a.note(kind.String(), of[0], nil)
		}
		return a.normal()
	}
	require.Equal(t, lateOf(harness.StockHandler), lateOf(harness.PodfsmHandler))
	n.RequireClean(t, before)
}

// The kubelet asks what the node can do, and runs a pod with a user namespace only where its handler says that it can.
func TestRuntimeStatus(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Traces: true})
	resp, err := n.Runtime.Status(t.Context(), &runtime.StatusRequest{Verbose: true})
	require.NoError(t, err)
	for _, condition := range resp.GetStatus().GetConditions() {
		if slices.Contains([]string{runtime.RuntimeReady, runtime.NetworkReady}, condition.GetType()) {
			require.True(t, condition.GetStatus(), "%s: %s", condition.GetType(), condition.GetMessage())
		}
	}
	features := map[string]*runtime.RuntimeHandlerFeatures{}
	for _, handler := range resp.GetRuntimeHandlers() {
		features[handler.GetName()] = handler.GetFeatures()
	}
	require.True(t, features[harness.PodfsmHandler].GetUserNamespaces())
	require.Equal(t, features[harness.StockHandler].String(), features[harness.PodfsmHandler].String())

	// And what podfsm itself has to say of a pod stands beside what containerd says.
	pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	info, err := pod.Info(t.Context())
	require.NoError(t, err)
	var own struct {
		State       string
		TraceID     string
		Transitions []struct {
			At    time.Time
			Event string
			To    string
		}
		Steps map[string]struct{ Status string }
	}
	require.NoError(t, json.Unmarshal([]byte(info["podfsm"]), &own))
	require.Equal(t, "Ready", own.State)
	require.Regexp(t, "^[0-9a-f]{32}$", own.TraceID)
	require.Equal(t, "Ready", own.Transitions[len(own.Transitions)-1].To)
	require.Equal(t, "done", own.Steps["attach_network"].Status)
}
