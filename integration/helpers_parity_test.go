package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// specConfig lets both handlers pass some of a pod's annotations to the runtime.
const specConfig = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  pod_annotations = ["example.com/*", "io.kubernetes.cri.*"]
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.podfsm]
  pod_annotations = ["example.com/*", "io.kubernetes.cri.*"]
`

// shape is a pod by what is particular about it.
type shape struct {
	name   string
	option harness.PodOption
}

// plainShapes differ in the namespaces that most pods differ in.
var plainShapes = []shape{
	{"userns", func(*runtime.PodSandboxConfig) {}},
	{"host users", harness.HostUsers()},
	{"host network", harness.HostNetwork()},
}

func security(c *runtime.PodSandboxConfig) *runtime.LinuxSandboxSecurityContext {
	return c.Linux.SecurityContext
}

func onNodeNetwork(c *runtime.PodSandboxConfig) bool {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtime.NamespaceMode_NODE
}

// facts are the properties of a pod by path.
type facts map[string]string

// take removes the facts whose paths match from f and returns them.
func (f facts) take(paths *regexp.Regexp) facts {
	taken := facts{}
	maps.DeleteFunc(f, func(path, value string) bool {
		if paths.MatchString(path) {
			taken[path] = value
		}
		return paths.MatchString(path)
	})
	return taken
}

// diff returns the fields that differ. A missing field is "".
func (f facts) diff(other facts) map[string][2]string {
	all := maps.Clone(f)
	maps.Copy(all, other)
	differ := map[string][2]string{}
	for field := range all {
		if f[field] != other[field] {
			differ[field] = [2]string{f[field], other[field]}
		}
	}
	return differ
}

// addRecords adds containerd's record of the pod's pause container: what its shim and runtime get.
func (f facts) addRecords(t *testing.T, n *harness.Node, pod *harness.Pod) {
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	container, err := n.Containerd.ContainerService().Get(ctx, pod.ID)
	require.NoError(t, err)
	snapshot, err := n.Containerd.SnapshotService(container.Snapshotter).Stat(ctx, container.SnapshotKey)
	require.NoError(t, err)
	f.add(t, "container", map[string]any{
		"labels": container.Labels, "image": container.Image, "snapshotter": container.Snapshotter, "key": container.SnapshotKey,
		"runtime": container.Runtime.Name, "options": container.Runtime.Options.GetValue(), "options type": container.Runtime.Options.GetTypeUrl(),
		"extensions": strings.Join(slices.Sorted(maps.Keys(container.Extensions)), " "),
	})
	f.add(t, "snapshot", map[string]any{"labels": snapshot.Labels, "parent": snapshot.Parent, "kind": snapshot.Kind})
	f.add(t, "spec", json.RawMessage(container.Spec.GetValue()))
}

func (f facts) add(t *testing.T, name string, value any) {
	text, err := json.Marshal(value)
	require.NoError(t, err)
	var plain any
	require.NoError(t, json.Unmarshal(text, &plain))
	f.flatten(name, plain)
}

// elements are the lists whose objects have a name, and the field with the name. Other objects are
// identified by their index.
var elements = map[string]string{"spec.mounts": "destination", "spec.linux.namespaces": "type"}

func (f facts) flatten(path string, value any) {
	switch value := value.(type) {
	case map[string]any:
		for key, below := range value {
			f.flatten(path+"."+key, below)
		}
	case []any:
		var names []string
		for i, below := range value {
			name := fmt.Sprint(i)
			object, ok := below.(map[string]any)
			if !ok {
				names = append(names, fmt.Sprint(below))
				continue
			}
			if key, ok := elements[path]; ok {
				name = object[key].(string)
			}
			names = append(names, name)
			f.flatten(path+"["+name+"]", below)
		}
		f[path] = strings.Join(names, " ")
	case nil:
	default:
		f[path] = fmt.Sprint(value)
	}
}

// addFiles adds the tree at dir, but not what is below a mount.
func (f facts) addFiles(t *testing.T, name, dir string) {
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		below := filepath.Join(name, strings.TrimPrefix(path, dir))
		owner := info.Sys().(*syscall.Stat_t)
		f[below] = fmt.Sprintf("%v %d:%d", info.Mode(), owner.Uid, owner.Gid)
		if info.Size() > 0 && d.Type().IsRegular() { // a namespace has neither size nor content
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f[below+" content"] = string(content)
		}
		return nil
	}))
}

func (f facts) addMount(t *testing.T, name, path string) {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	require.NoError(t, err)
	for _, m := range mounts {
		f[name+" mount"] = strings.Join([]string{m.Source, m.FSType, m.Options, m.VFSOptions}, " ")
	}
}

var (
	// chance matches what differs from call to call: ids, ports, secrets, times, handlers, amounts
	// of memory.
	chance = regexp.MustCompile(`[0-9a-f]{64}|127\.0\.0\.1:\d+/\w+/[^"]*|"createdAt":"\d+"|"runtimeHandler":"\w+"|current usage: \d+, peak usage: \d+`)
	// failedTo matches what each side puts before the error of a shared part.
	failedTo = regexp.MustCompile(`^failed to start sandbox "…": failed to create containerd (task|container): |` +
		`^step \w+ of pod "default/odd" failed: failed to create the pause (task|container) of sandbox "ID": `)
)

// podStats returns all answers about the stats of a pod: alone, in a list, and as a stream.
func podStats(t *testing.T, n *harness.Node, pod *harness.Pod) map[string]*runtime.PodSandboxStats {
	t.Helper()
	alone, err := n.Runtime.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{PodSandboxId: pod.ID})
	require.NoError(t, err)
	filter := &runtime.PodSandboxStatsFilter{Id: pod.ID}
	list, err := n.Runtime.ListPodSandboxStats(t.Context(), &runtime.ListPodSandboxStatsRequest{Filter: filter})
	require.NoError(t, err)
	require.Len(t, list.GetStats(), 1)
	stream, err := n.Runtime.StreamPodSandboxStats(t.Context(), &runtime.StreamPodSandboxStatsRequest{Filter: filter})
	require.NoError(t, err)
	sent, err := stream.Recv()
	require.NoError(t, err)
	require.Len(t, sent.GetPodSandboxStats(), 1)
	return map[string]*runtime.PodSandboxStats{"alone": alone.GetStats(), "list": list.GetStats()[0], "stream": sent.GetPodSandboxStats()[0]}
}
