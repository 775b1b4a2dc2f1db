package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/traces"
)

// nriConfig lets NRI plugins connect.
const nriConfig = `
[plugins.'io.containerd.nri.v1.nri']
disable = false
`

// nriPlugin is an NRI plugin that keeps its calls about pods.
type nriPlugin struct {
	mu     sync.Mutex
	told   []nriCall
	synced chan struct{}
	pods   []*api.PodSandbox // of Synchronize, when it connected
	run    func(*api.PodSandbox) error
}

type nriCall struct {
	event string
	pod   *api.PodSandbox
	more  []*api.LinuxResources
	links string // the interfaces in the pod's network namespace, at this moment
}

// connectNRI connects a plugin of this process to the node's daemon until the end of the test.
func connectNRI(t *testing.T, n *harness.Node) *nriPlugin {
	t.Helper()
	p := &nriPlugin{synced: make(chan struct{})}
	s, err := stub.New(p, stub.WithPluginName("watch"), stub.WithPluginIdx("10"), stub.WithSocketPath(filepath.Join(n.Dir(), "nri.sock")))
	require.NoError(t, err)
	require.NoError(t, s.Start(t.Context()))
	t.Cleanup(func() {
		s.Stop()
		s.Wait()
	})
	<-p.synced
	return p
}

func (p *nriPlugin) Synchronize(_ context.Context, pods []*api.PodSandbox, _ []*api.Container) ([]*api.ContainerUpdate, error) {
	p.pods = pods
	close(p.synced)
	return nil, nil
}

func (p *nriPlugin) tell(event string, pod *api.PodSandbox, more ...*api.LinuxResources) {
	call := nriCall{event: event, pod: proto.CloneOf(pod), more: more}
	for _, namespace := range pod.GetLinux().GetNamespaces() {
		if namespace.GetType() != "network" {
			continue
		}
		err := ns.WithNetNSPath(namespace.GetPath(), func(ns.NetNS) error {
			links, err := netlink.LinkList()
			for _, link := range links {
				call.links += link.Attrs().Name + " "
			}
			return err
		})
		if err != nil {
			call.links = "none: " + err.Error()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = append(p.told, call)
}

func (p *nriPlugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.tell("run", pod)
	if p.run != nil {
		return p.run(pod)
	}
	return nil
}

func (p *nriPlugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	p.tell("update", pod, overhead, resources)
	return nil
}

func (p *nriPlugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.tell("post-update", pod)
	return nil
}

func (p *nriPlugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.tell("stop", pod)
	return nil
}

func (p *nriPlugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.tell("remove", pod)
	return nil
}

func (p *nriPlugin) CreateContainer(_ context.Context, pod *api.PodSandbox, _ *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.tell("create container", pod)
	adjust := &api.ContainerAdjustment{}
	adjust.AddEnv("FROM_NRI", pod.GetName())
	return adjust, nil, nil
}

// since returns the calls after the first n.
func (p *nriPlugin) since(start int) []nriCall {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.told[start:])
}

// The differences in NRI, as in docs/reference/parity.md: pause is cloned with the user namespace,
// and has no device rules.
var (
	isNRIDevice = regexp.MustCompile(`\.linux\.resources\.devices\[0\]\.`)
	isNRIUserNS = regexp.MustCompile(`\.linux\.namespaces\[\d\]\.path$`)
)

// A plugin gets the same calls about a podfsm pod as about a stock pod, at the same time.
func TestNRILikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: nriConfig})
	plugin := connectNRI(t, n)
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	tellOf := func(t *testing.T, handler string, config *runtime.PodSandboxConfig) facts {
		a := &answers{facts: facts{}, t: t}
		start := len(plugin.since(0))
		pod, err := n.RunPod(t.Context(), handler, config)
		require.NoError(t, err)
		pause, err := pod.Pid(t.Context())
		require.NoError(t, err)
		ip, err := pod.IP(t.Context())
		require.NoError(t, err)
		main, err := pod.StartContainer(t.Context(), "main")
		require.NoError(t, err)
		require.Equal(t, "pod\n", exec(t, main, "sh", "-c", "echo $FROM_NRI"))
		_, err = n.Runtime.UpdatePodSandboxResources(t.Context(), &runtime.UpdatePodSandboxResourcesRequest{
			PodSandboxId: pod.ID, Resources: &runtime.LinuxContainerResources{CpuShares: 512},
		})
		require.NoError(t, err)
		pinned := plugin.since(start)[0]
		if !onNodeNetwork(config) {
			i := slices.IndexFunc(pinned.pod.GetLinux().GetNamespaces(), func(n *api.LinuxNamespace) bool { return n.GetType() == "network" })
			require.GreaterOrEqual(t, i, 0)
			theirs, err := os.Stat(pinned.pod.GetLinux().GetNamespaces()[i].GetPath())
			require.NoError(t, err)
			pauses, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pause))
			require.NoError(t, err)
			require.True(t, os.SameFile(theirs, pauses), "the namespace is pause's")
		}
		require.NoError(t, pod.StopAndRemove(t.Context()))

		a.own(n.Dir(), "NODE")
		a.own(pod.ID, "POD")
		a.own(ip, "IP")
		for i, call := range plugin.since(start) {
			path := fmt.Sprintf("call %d %s", i, call.event)
			a.note(path, call.pod, nil)
			a.facts[path+" links"] = call.links
			for _, resources := range call.more {
				a.note(path+" more", resources, nil)
			}
			// containerd's service forgets the pid when it hears of pause's end, which may be before or after NRI's stop.
			delete(a.facts, path+".pid")
			if call.event != "stop" && call.event != "remove" {
				require.Equal(t, uint32(pause), call.pod.GetPid(), call.event)
			}
		}
		return a.normal()
	}
	for _, tc := range plainShapes {
		t.Run(tc.name, func(t *testing.T) {
			config := n.PodConfig("pod", tc.option)
			stock, ours := tellOf(t, harness.StockHandler, config), tellOf(t, harness.PodfsmHandler, config)
			for path, values := range stock.diff(ours) {
				if values[1] == "" && (isNRIUserNS.MatchString(path) || isNRIDevice.MatchString(path)) {
					continue
				}
				t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
			}
		})
	}
	n.RequireClean(t, before)
}

// A plugin that connects after a restart gets podfsm pods like stock pods, except for the
// differences in docs/reference/parity.md.
func TestNRIAfterARestartLikeStock(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: nriConfig})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	t.Run("pods", func(t *testing.T) {
		pods := map[string]*harness.Pod{}
		for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
			pods[handler] = startPod(t, n, handler, n.PodConfig("pod-by-"+handler, harness.HostUsers()))
		}
		require.NoError(t, n.Restart(t.Context()))
		plugin := connectNRI(t, n)
		toldOf := func(handler string) facts {
			a := &answers{facts: facts{}, t: t}
			a.own(n.Dir(), "NODE")
			a.own(pods[handler].ID, "POD")
			a.own("pod-by-"+handler, "NAME")
			ip, err := pods[handler].IP(t.Context())
			require.NoError(t, err)
			a.own(ip, "IP")
			i := slices.IndexFunc(plugin.pods, func(p *api.PodSandbox) bool { return p.GetId() == pods[handler].ID })
			require.GreaterOrEqual(t, i, 0)
			a.note("pod", plugin.pods[i], nil)
			pause, err := pods[handler].Pid(t.Context())
			require.NoError(t, err)
			require.Equal(t, strconv.Itoa(pause), a.facts["pod.pid"])
			delete(a.facts, "pod.pid")
			return a.normal()
		}
		stock, ours := toldOf(harness.StockHandler), toldOf(harness.PodfsmHandler)
		for path, values := range stock.diff(ours) {
			if values[1] == "" && isNRIDevice.MatchString(path) {
				continue
			}
			t.Errorf("%s\n\tstock: %q\n\tours:  %q", path, values[0], values[1])
		}
	})
	n.RequireClean(t, before)
}

// If a plugin refuses a pod, the pod is rolled back completely, in the trace of the request.
func TestNRIRefusesAPod(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: nriConfig, Traces: true})
	plugin := connectNRI(t, n)
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	plugin.run = func(*api.PodSandbox) error { return errors.New("not this one") }
	ctx, id := traces.NewContext(t.Context())
	_, err = n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
	require.ErrorContains(t, err, "not this one")
	n.RequireClean(t, before)

	spans, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
	require.NoError(t, err)
	require.True(t, traces.Finished("podfsm.sandbox.attach_network.undo", "podfsm.sandbox.start_pause.undo")(spans), traces.Render(spans, nil))
	requireGolden(t, "nri-refusal", spans)
}
