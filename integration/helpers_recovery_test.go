package integration

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

func warmNode(t *testing.T) (*harness.Node, harness.Census) {
	t.Helper()
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	return n, before
}

// interrupt kills containerd at a point during the creation of a pod.
func interrupt(t *testing.T, n *harness.Node, point string) {
	t.Helper()
	require.NoError(t, n.Fault(point, "1*block"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = n.RunPod(context.Background(), harness.PodfsmHandler, n.PodConfig("half-made"))
	}()
	require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
	require.NoError(t, n.Kill(t.Context()))
	<-done
}

// listed returns the pods that the kubelet sees.
func listed(t *testing.T, n *harness.Node) []*runtime.PodSandbox {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	return list.GetItems()
}

// settled waits until podfsm has completed its own cleanups, and returns the states of the
// remaining sandboxes by id.
func settled(t *testing.T, n *harness.Node) map[string]string {
	t.Helper()
	resting := []string{"Ready", "NotReady", "Stopped", "Quarantined"}
	var states map[string]string
	if !eventually(func() bool {
		list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
		require.NoError(t, err)
		states = map[string]string{}
		for _, s := range list.GetSandboxes() {
			states[s.GetId()] = s.GetState()
		}
		return !slices.ContainsFunc(slices.Collect(maps.Values(states)), func(state string) bool { return !slices.Contains(resting, state) })
	}) {
		t.Fatalf("podfsm is still busy: %v", states)
	}
	return states
}

// works requires that containers can be started in a pod, that they have its address, and that they
// reach its gateway.
func works(t *testing.T, pod *harness.Pod, container string) {
	t.Helper()
	ip, err := pod.IP(t.Context())
	require.NoError(t, err)
	c := startContainer(t, pod, container)
	require.Contains(t, exec(t, c, "ip", "-4", "addr", "show", "eth0"), "inet "+ip+"/")
	exec(t, c, "ping", "-c", "1", "-W", "5", harness.Gateway)
}

// sight returns everything that the kubelet can read of some pods, as text.
func sight(t *testing.T, n *harness.Node, pods ...*harness.Pod) string {
	t.Helper()
	return sightWithout(t, n, "", pods...)
}

// requireSame requires equal texts, and shows where long ones begin to differ.
func requireSame(t *testing.T, before, after string) {
	t.Helper()
	if before == after {
		return
	}
	at := 0
	for at < len(before) && at < len(after) && before[at] == after[at] {
		at++
	}
	around := func(text string) string { return text[max(0, at-200):min(len(text), at+200)] }
	t.Fatalf("before: …%s…\nafter: …%s…", around(before), around(after))
}

// attempt returns the configuration of a pod for a later attempt.
func attempt(number uint32) harness.PodOption {
	return func(c *runtime.PodSandboxConfig) { c.Metadata.Attempt = number }
}

// sightWithout is sight without a key of the verbose info.
func sightWithout(t *testing.T, n *harness.Node, key string, pods ...*harness.Pod) string {
	t.Helper()
	text := func(m proto.Message) string {
		out, err := protojson.MarshalOptions{Multiline: true}.Marshal(m)
		require.NoError(t, err)
		// protojson varies its white space on purpose.
		var value any
		require.NoError(t, json.Unmarshal(out, &value))
		out, err = json.MarshalIndent(value, "", "  ")
		require.NoError(t, err)
		return string(out) + "\n"
	}
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	list.Items = slices.DeleteFunc(list.Items, func(item *runtime.PodSandbox) bool {
		return !slices.ContainsFunc(pods, func(p *harness.Pod) bool { return p.ID == item.GetId() })
	})
	slices.SortFunc(list.Items, func(a, b *runtime.PodSandbox) int { return int(a.CreatedAt - b.CreatedAt) })
	seen := text(list)
	for _, pod := range pods {
		resp, err := n.Runtime.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: pod.ID, Verbose: true})
		require.NoError(t, err)
		resp.Timestamp, resp.ContainersStatuses = 0, nil
		delete(resp.Info, key)
		seen += text(resp)
		if resp.GetStatus().GetState() != runtime.PodSandboxState_SANDBOX_READY {
			continue // without stats
		}
		stats, err := n.Runtime.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{PodSandboxId: pod.ID})
		require.NoError(t, err)
		seen += text(stats.GetStats().GetAttributes())
	}
	return seen
}
