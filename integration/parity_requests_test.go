package integration

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// outcome is the answer to a caller, or the class and text of an error.
type outcome struct{ class, text string }

// client has what odd calls use.
type client struct {
	ctx   context.Context
	t     *testing.T
	n     *harness.Node
	pod   *harness.Pod       // runs
	main  *harness.Container // runs in it
	ended *harness.Container // has run in it
	other *harness.Container // runs in another pod
}

// create creates a container in the pod, and starts it.
func (c *client) create(change func(*runtime.CreateContainerRequest)) (proto.Message, error) {
	r := &runtime.CreateContainerRequest{
		PodSandboxId: c.pod.ID,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "odd"},
			Image:    &runtime.ImageSpec{Image: harness.BusyboxImage},
			Command:  []string{"true"},
			LogPath:  "odd.log",
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: proto.CloneOf(nsOptions(c.pod.Config)),
			}},
		},
		SandboxConfig: proto.CloneOf(c.pod.Config),
	}
	change(r)
	created, err := c.n.Runtime.CreateContainer(c.ctx, r)
	if err != nil {
		return nil, err
	}
	_, err = c.n.Runtime.StartContainer(c.ctx, &runtime.StartContainerRequest{ContainerId: created.GetContainerId()})
	// While containerd records the end of a container, it may refuse to remove it, with any handler.
	require.EventuallyWithT(c.t, func(t *assert.CollectT) {
		_, err := c.n.Runtime.RemoveContainer(c.ctx, &runtime.RemoveContainerRequest{ContainerId: created.GetContainerId()})
		require.NoError(t, err)
	}, waitFor, tick)
	return &runtime.StartContainerResponse{}, err
}

// outcomesOf makes all odd calls on a separate node, one at a time, and requires that failed calls
// leave nothing behind.
func outcomesOf(t *testing.T, handler string) map[string]outcome {
	t.Helper()
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	// containerd keeps this directory once there was an image for a volume.
	require.NoError(t, os.MkdirAll(filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/image-volumes"), 0o755))
	before, err := n.WarmUp(t.Context(), handler)
	require.NoError(t, err)
	c := &client{ctx: t.Context(), t: t, n: n}
	run := func(name string, options ...harness.ContainerOption) (pod *harness.Pod, main *harness.Container) {
		pod, err := n.RunPod(c.ctx, handler, n.PodConfig(name))
		require.NoError(t, err)
		return pod, startContainer(t, pod, "main", options...)
	}
	// An image for a volume stays mounted until its pod stops, whatever becomes of the container.
	c.pod, c.main = run("base", func(c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{ContainerPath: "/image", Readonly: true, Image: &runtime.ImageSpec{Image: harness.BusyboxImage}}}
	})
	otherPod, other := run("other")
	c.other = other
	c.ended = startContainer(t, c.pod, "ended", harness.Run("true"))
	waitExit(t, c.ended)
	with, err := n.Rest(c.ctx)
	require.NoError(t, err)

	told := map[string]outcome{}
	note := func(name string, answer proto.Message, err error) {
		names := strings.NewReplacer(n.Dir(), "NODE", n.Name(), "NODE", c.main.ID, "MAIN", c.main.ID[:20], "MAIN", c.pod.ID, "POD", otherPod.ID, "OTHERPOD", c.ended.ID, "ENDED", other.ID, "OTHER")
		told[name] = outcomeOf(names, answer, err)
	}
	for name, change := range sorted(oddRuns()) {
		r := &runtime.RunPodSandboxRequest{Config: n.PodConfig("odd"), RuntimeHandler: handler}
		change(r)
		resp, err := n.Runtime.RunPodSandbox(c.ctx, r)
		note("run: "+name, &runtime.RunPodSandboxResponse{}, err)
		if err == nil {
			require.NoError(t, n.FindPod(resp.GetPodSandboxId(), r.Config).StopAndRemove(c.ctx))
		}
	}
	n.RequireClean(t, with)
	for _, calls := range []map[string]oddCall{oddContainers(), oddCalls()} {
		for name, call := range sorted(calls) {
			answer, err := call(c)
			note(name, answer, err)
		}
		n.RequireClean(t, with)
	}
	require.NoError(t, otherPod.StopAndRemove(c.ctx))
	require.NoError(t, c.pod.StopAndRemove(c.ctx))
	n.RequireClean(t, before)
	return told
}

// outcomeOf returns an outcome without what differs from call to call, and independent of which
// check of two came first.
func outcomeOf(names *strings.Replacer, answer proto.Message, err error) outcome {
	if err != nil {
		failed := status.Convert(err)
		return outcome{failed.Code().String(), failedTo.ReplaceAllString(chance.ReplaceAllString(names.Replace(failed.Message()), "…"), "")}
	}
	text, err := protojson.Marshal(answer)
	if err != nil {
		return outcome{"no message", err.Error()}
	}
	return outcome{"OK", chance.ReplaceAllString(names.Replace(strings.ReplaceAll(string(text), " ", "")), "…")}
}

// betterRefusals are the calls with another outcome: the class with stock, the class with podfsm,
// and podfsm's text.
var betterRefusals = map[string]struct{ stock, ours, text string }{
	"run: no configuration":                         {"Unknown", "InvalidArgument", "no metadata"},
	"run: no metadata":                              {"Unknown", "InvalidArgument", "no metadata"},
	"run: userns CONTAINER":                         {"Unknown", "InvalidArgument", "ask for POD or NODE"},
	"run: userns TARGET":                            {"Unknown", "InvalidArgument", "ask for POD or NODE"},
	"run: no mappings":                              {"Unknown", "InvalidArgument", "0 uid mappings"},
	"run: only uids":                                {"Unknown", "InvalidArgument", "0 gid mappings"},
	"run: two mappings":                             {"Unknown", "InvalidArgument", "2 uid mappings"},
	"run: length 0":                                 {"Unknown", "InvalidArgument", "map at least one id"},
	"run: node's users with a mapping":              {"Unknown", "InvalidArgument", "leave them out or ask for mode POD"},
	"run: seccomp of tomorrow":                      {"Unknown", "InvalidArgument", "seccomp profile type 77"},
	"run: old seccomp field":                        {"Unknown", "InvalidArgument", `"garbage" is none of`},
	"run: group without user":                       {"Unknown", "InvalidArgument", "without a user"},
	"run: negative user":                            {"Unknown", "InvalidArgument", "-7 is out of the range"},
	"run: cgroup parent with NUL":                   {"Unknown", "InvalidArgument", "has a line break or a NUL"},
	"run: bandwidth of no number":                   {"Unknown", "InvalidArgument", "to CNI plugins: annotation kubernetes.io/ingress-bandwidth"},
	"run: bandwidth too small":                      {"Unknown", "InvalidArgument", "to CNI plugins: annotation kubernetes.io/egress-bandwidth"},
	"run: untrusted workload":                       {"Unknown", "InvalidArgument", "name a handler instead"},
	"run: unknown handler":                          {"InvalidArgument", "InvalidArgument", "nobody"}, // an unknown handler belongs to neither side
	"run: a pod that is there already":              {"FailedPrecondition", "AlreadyExists", "a new sandbox needs a new attempt"},
	"container: missing volume under the pod's ids": {"Unknown", "FailedPrecondition", "can't have its volume"},
	"run: long hostname":                            {"Unknown", "InvalidArgument", "has 65 bytes; choose one of at most 64"},
	"run: user outside the mapping":                 {"Unknown", "InvalidArgument", "it runs as user 70000, beyond the 65536 ids of its user namespace"},
	"run: hostname on the node's network":           {"Unknown", "InvalidArgument", `"web" would be the node's`},
	"container: user outside the mapping":           {"Unknown", "InvalidArgument", "it runs as user 70000, beyond the 65536 ids of its user namespace"},
	"run: sysctl of the node":                       {"Unknown", "InvalidArgument", `sysctl "vm.swappiness" is not of a namespace`},
	"run: sysctl on the node's network":             {"Unknown", "InvalidArgument", `sysctl "net.ipv4.ip_forward" would change the node's`},
	"run: sysctl that is no value":                  {"Unknown", "InvalidArgument", `net.ipv4.ip_forward = "maybe"`},
	"run: unknown sysctl":                           {"Unknown", "InvalidArgument", "net.ipv4.nonsense"},
	// Stock gives the pod's profile to pause, too. Ours has its own filter, and the profile is for the pod's containers.
	"run: seccomp that is no JSON": {"Unknown", "OK", ""},
	"run: seccomp profile missing": {"Unknown", "OK", ""},
	"run: seccomp without a path":  {"Unknown", "OK", ""},
	// Stock runs these: a mode that it doesn't know counts as POD, and the name of a pod goes to plugins as it is.
	"run: network CONTAINER":  {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: network TARGET":     {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: a mode of tomorrow": {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: ipc CONTAINER":      {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: pid TARGET":         {"OK", "InvalidArgument", "a sandbox has POD, CONTAINER or NODE"},
	"run: odd name":           {"OK", "InvalidArgument", "to CNI plugins: invalid K8S_POD_NAME"},
}

// Invalid requests, and calls about missing objects, get the same answers as with stock, except for
// betterRefusals. Nothing is left of them.
func TestOddRequestsLikeStock(t *testing.T) {
	t.Parallel()
	stock, ours := outcomesOf(t, harness.StockHandler), outcomesOf(t, harness.PodfsmHandler)
	require.Len(t, ours, len(stock))
	require.Greater(t, len(stock), 150)
	for name, want := range stock {
		got := ours[name]
		better, deliberate := betterRefusals[name]
		switch {
		case !deliberate && got != want:
			t.Errorf("%s\n\tstock: %s\n\tours:  %s", name, want, got)
		case deliberate && (want.class != better.stock || got.class != better.ours || !strings.Contains(got.text, better.text)):
			t.Errorf("%s isn't as it is listed\n\tstock: %s\n\tours:  %s", name, want, got)
		}
	}
	for name := range betterRefusals {
		require.Contains(t, stock, name)
	}
}
