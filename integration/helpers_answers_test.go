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

	"github.com/podfsm/podfsm/integration/harness"
)

// answers are the answers to a caller of the CRI during a scenario, by field.
type answers struct {
	facts
	t       *testing.T
	replace []string // texts of a single pod, each with a placeholder
}

// own sets the placeholder of a text that differs from pod to pod.
func (a *answers) own(text, name string) {
	if text != "" {
		a.replace = append(a.replace, text, name)
	}
}

// note adds an answer or an error.
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

// add adds the fields of a JSON object, and those of objects that are encoded in its texts.
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
	// podfsm sends the event of the end of pause during the network teardown, stock during the
	// change of the state: the order is random.
	isLast    = regexp.MustCompile(`^removed event \d+\.podSandboxStatus\.(network\.ip|state)$`)
	isPid     = regexp.MustCompile(`\.info\.pid$`)
	isMAC     = regexp.MustCompile(`([0-9a-f]{2}:){5}[0-9a-f]{2}`)
	isVeth    = regexp.MustCompile(`veth[0-9a-f]{8}`)
	isHandler = regexp.MustCompile(`(?i)\.runtimeHandler$`)
	isNetNS   = regexp.MustCompile(`podfsm-POD$|cni-[0-9a-f-]{36}$`)
	isProcNS  = regexp.MustCompile(`^/proc/\d+/ns/`)
	isFigure  = regexp.MustCompile(`(usageCoreNanoSeconds|usageNanoCores|Bytes|pageFaults|majorPageFaults|inodesUsed)\.value$`)
)

// normal returns the fields without what differs from pod to pod.
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

// addEvents adds the events of a pod until the last one, which is of the object with an id.
func (a *answers) addEvents(when string, events *harness.Events, pod *harness.Pod, id string, last runtime.ContainerEventType) {
	a.t.Helper()
	all, err := events.WaitFor(a.t.Context(), func(all []*runtime.ContainerEventResponse) bool { return len(harness.OfType(all, id, last)) > 0 })
	require.NoError(a.t, err)
	events.Close()
	// Unread events are kept for the next subscriber.
	all = slices.DeleteFunc(all, func(e *runtime.ContainerEventResponse) bool {
		return e.GetPodSandboxStatus().GetId() != pod.ID && e.GetContainerId() != pod.ID
	})
	for i, event := range all {
		a.note(fmt.Sprintf("%s event %d", when, i), event, nil)
	}
}

// addPod adds the answers to all calls that show a pod.
func (a *answers) addPod(when string, n *harness.Node, pod *harness.Pod) {
	a.t.Helper()
	ctx := a.t.Context()
	resp, err := n.Runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod.ID, Verbose: true})
	if err == nil {
		delete(resp.Info, "podfsm")
	}
	a.note(when+" status", resp, err)
	for _, tc := range []struct {
		name   string
		filter *runtime.PodSandboxFilter
	}{
		{"id", &runtime.PodSandboxFilter{Id: pod.ID[:20]}},
		{"label", &runtime.PodSandboxFilter{LabelSelector: map[string]string{"io.kubernetes.pod.uid": pod.Config.GetMetadata().GetUid()}}},
		{"ready", &runtime.PodSandboxFilter{Id: pod.ID, State: &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}}},
	} {
		list, err := n.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: tc.filter})
		a.note(when+" list by "+tc.name, list, err)
		stream, err := n.Runtime.StreamPodSandboxes(ctx, &runtime.StreamPodSandboxesRequest{Filter: tc.filter})
		require.NoError(a.t, err)
		for err == nil {
			var piece *runtime.StreamPodSandboxesResponse
			piece, err = stream.Recv()
			a.note(when+" stream by "+tc.name, piece, err)
		}
	}
	stats, err := n.Runtime.PodSandboxStats(ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: pod.ID})
	if err == nil {
		stats.Stats.Linux = nil // TestStatsLikeStock
	}
	a.note(when+" stats", stats, err)
}

// update changes the resources of a pod, and adds the answers.
func (a *answers) update(when string, n *harness.Node, pod *harness.Pod, megabytes int64) {
	a.t.Helper()
	resp, err := n.Runtime.UpdatePodSandboxResources(a.t.Context(), &runtime.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod.ID,
		Overhead:     &runtime.LinuxContainerResources{CpuShares: 10},
		Resources:    &runtime.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: megabytes << 20},
	})
	a.note(when, resp, err)
	a.addPod(when, n, pod)
}

// addProcesses adds the state of pause and of a container in the kernel: cgroups, namespaces and
// who shares them, mounts.
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
