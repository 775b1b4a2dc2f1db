package cri

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// addLinks makes interfaces, bridges because every kernel for pods has them, in a network namespace, in this order.
func addLinks(t *testing.T, netNS string, names ...string) {
	t.Helper()
	inside(t, netNS, func() error {
		for _, name := range names {
			if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
				return fmt.Errorf("failed to add %q: %w", name, err)
			}
		}
		return nil
	})
}

func statsOf(id string) *runtime.PodSandboxStats {
	return &runtime.PodSandboxStats{Attributes: &runtime.PodSandboxAttributes{Id: id}}
}

// recorded is a stream that keeps what is sent.
type recorded[T any] struct {
	grpc.ServerStream
	ctx  context.Context // nil for one that never ends
	sent []*T
}

func (r *recorded[T]) Context() context.Context { return cmp.Or(r.ctx, context.Background()) }

func (r *recorded[T]) Send(one *T) error {
	r.sent = append(r.sent, one)
	return nil
}

func TestPodStatsHaveTheNetwork(t *testing.T) {
	own, other := podNetNS(t), podNetNS(t)
	addLinks(t, own, "net0", "eth0")
	addLinks(t, other, "wlan0")
	c := &controller{pods: map[string]Sandbox{
		"own":     {Config: podConfig(), NetNSPath: own},
		"no-eth0": {Config: podConfig(), NetNSPath: other},
		"on-node": {Config: podConfig(onNode)},
		"gone":    {Config: podConfig(), NetNSPath: "/run/netns/none"},
	}}
	fresh := func() *stock {
		s := &stock{}
		for _, id := range []string{"own", "no-eth0", "on-node", "gone", "another's"} {
			s.stats = append(s.stats, statsOf(id))
		}
		return s
	}
	check := func(t *testing.T, stats []*runtime.PodSandboxStats) {
		t.Helper()
		require.Len(t, stats, 5)
		names := func(one *runtime.PodSandboxStats) (all []string) {
			for _, link := range one.GetLinux().GetNetwork().GetInterfaces() {
				require.NotNil(t, link.GetRxBytes())
				require.NotNil(t, link.GetTxErrors())
				all = append(all, link.GetName())
			}
			return all
		}
		require.Equal(t, []string{"net0", "eth0"}, names(stats[0]))
		require.Equal(t, "eth0", stats[0].GetLinux().GetNetwork().GetDefaultInterface().GetName())
		require.NotZero(t, stats[0].GetLinux().GetNetwork().GetTimestamp())
		require.Equal(t, []string{"wlan0"}, names(stats[1]))
		require.Equal(t, "wlan0", stats[1].GetLinux().GetNetwork().GetDefaultInterface().GetName(), "the first one, without eth0")
		for _, untouched := range stats[2:] {
			require.Nil(t, untouched.GetLinux().GetNetwork(), untouched)
		}
	}

	list, err := newFront(t, fresh(), c).ListPodSandboxStats(t.Context(), &runtime.ListPodSandboxStatsRequest{})
	require.NoError(t, err)
	check(t, list.GetStats())

	one, err := newFront(t, fresh(), c).PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{})
	require.NoError(t, err)
	require.Len(t, one.GetStats().GetLinux().GetNetwork().GetInterfaces(), 2)

	stream := &recorded[runtime.StreamPodSandboxStatsResponse]{}
	require.NoError(t, newFront(t, fresh(), c).StreamPodSandboxStats(nil, stream))
	check(t, stream.sent[0].GetPodSandboxStats())
}

// One pod whose figures can't be read doesn't keep those of the others from being shown. A request about that pod alone fails.
func TestStatsLeaveOutWhatCantBeRead(t *testing.T) {
	cgroupGone := errors.New("one pod's cgroup is gone")
	some := []*runtime.PodSandboxStats{statsOf("s1"), statsOf("s2")}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		ctx   context.Context
		stats []*runtime.PodSandboxStats
		err   error
		fails bool
	}{
		"all can be read":     {ctx: t.Context(), stats: some},
		"there is no pod":     {ctx: t.Context()},
		"one can't be read":   {ctx: t.Context(), stats: some, err: cgroupGone},
		"none can be read":    {ctx: t.Context(), err: cgroupGone, fails: true},
		"the caller has gone": {ctx: ended, stats: some, err: context.Canceled, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			front := newFront(t, &stock{stats: tc.stats, statErr: tc.err}, &controller{})
			list, err := front.ListPodSandboxStats(tc.ctx, nil)
			stream := &recorded[runtime.StreamPodSandboxStatsResponse]{ctx: tc.ctx}
			streamErr := front.StreamPodSandboxStats(nil, stream)
			if tc.fails {
				require.ErrorIs(t, err, tc.err)
				require.ErrorIs(t, streamErr, tc.err)
				require.Empty(t, stream.sent)
				return
			}
			require.NoError(t, err)
			require.Len(t, list.GetStats(), len(tc.stats))
			require.NoError(t, streamErr)
			require.Len(t, stream.sent, min(1, len(tc.stats)))
		})
	}
	_, err := newFront(t, &stock{stats: some, statErr: cgroupGone}, &controller{}).PodSandboxStats(t.Context(), nil)
	require.ErrorIs(t, err, cgroupGone)
}

// The kubelet asks every few seconds. What can't be read is a warning when it begins, with the pod, and no more until it has passed.
func TestStatsLeftOutAreAWarningOnce(t *testing.T) {
	s := &stock{stats: []*runtime.PodSandboxStats{statsOf("s1")}}
	front := newFront(t, s, &controller{pods: map[string]Sandbox{"s2": {Config: podConfig()}}})
	gone := func(id string) error {
		return fmt.Errorf("failed to decode sandbox container metrics for sandbox %q: the cgroup is gone", id)
	}
	warnings := func(filter *runtime.PodSandboxStatsFilter, errs ...error) []string {
		s.statErr = errors.Join(errs...)
		ctx, out := logged(t.Context())
		_, err := front.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{Filter: filter})
		require.NoError(t, err)
		require.Equal(t, len(errs), strings.Count(out.String(), "failed to read pod stats, pod left out of the list"))
		var of []string
		for line := range strings.Lines(out.String()) {
			if strings.Contains(line, "level=warning") {
				of = append(of, regexp.MustCompile(`(pod=\S+ )?sandbox=\S+`).FindString(line))
			}
		}
		return of
	}
	require.Equal(t, []string{"pod=default/web sandbox=s2"}, warnings(nil, gone("s2")))
	require.Empty(t, warnings(nil, gone("s2")))
	require.Equal(t, []string{"sandbox=s3"}, warnings(nil, gone("s2"), gone("s3")), "another pod")
	require.Empty(t, warnings(&runtime.PodSandboxStatsFilter{Id: "s1"}))
	require.Empty(t, warnings(nil, gone("s2"), gone("s3")), "a list of others says nothing of these")
	require.Empty(t, warnings(nil))
	require.Equal(t, []string{"pod=default/web sandbox=s2"}, warnings(nil, gone("s2")), "it had passed")
}

func TestPodMetricsHaveTheNetwork(t *testing.T) {
	own := podNetNS(t)
	addLinks(t, own, "net0", "eth0")
	c := &controller{pods: map[string]Sandbox{"own": {Config: podConfig(), NetNSPath: own}, "on-node": {Config: podConfig(onNode)}}}
	fresh := func() *stock {
		return &stock{metrics: []*runtime.PodSandboxMetrics{
			{PodSandboxId: "own", Metrics: []*runtime.Metric{{Name: "stock's"}}},
			{PodSandboxId: "on-node"},
		}}
	}
	check := func(t *testing.T, metrics []*runtime.PodSandboxMetrics) {
		t.Helper()
		require.Len(t, metrics[0].GetMetrics(), 9)
		require.Equal(t, "container_network_receive_bytes_total", metrics[0].GetMetrics()[0].GetName())
		require.Equal(t, []string{"web", "default", "", "own", "", "eth0"}, metrics[0].GetMetrics()[0].GetLabelValues())
		require.Equal(t, "stock's", metrics[0].GetMetrics()[8].GetName())
		require.Empty(t, metrics[1].GetMetrics())
	}
	list, err := newFront(t, fresh(), c).ListPodSandboxMetrics(t.Context(), &runtime.ListPodSandboxMetricsRequest{})
	require.NoError(t, err)
	check(t, list.GetPodMetrics())

	stream := &recorded[runtime.StreamPodSandboxMetricsResponse]{}
	require.NoError(t, newFront(t, fresh(), c).StreamPodSandboxMetrics(nil, stream))
	check(t, stream.sent[0].GetPodSandboxMetrics())
}

// A pod that may make interfaces must not keep the node's stats from being sent, nor make them huge.
func TestInterfacesOfAHostilePod(t *testing.T) {
	netNS := podNetNS(t)
	names := []string{"eth0", "\xff\xfe"}
	for i := range maxLinks {
		names = append(names, fmt.Sprintf("more%d", i))
	}
	addLinks(t, netNS, names...)
	c := &controller{pods: map[string]Sandbox{"own": {Config: podConfig(), NetNSPath: netNS}}}
	resp, err := newFront(t, &stock{stats: []*runtime.PodSandboxStats{statsOf("own")}}, c).PodSandboxStats(t.Context(), nil)
	require.NoError(t, err)
	_, err = proto.Marshal(resp)
	require.NoError(t, err)
	links := resp.GetStats().GetLinux().GetNetwork().GetInterfaces()
	require.Len(t, links, maxLinks)
	require.Equal(t, "eth0", links[0].GetName())
	require.True(t, utf8.ValidString(links[1].GetName()))

	// The kernel is asked for no more than these, however many there are.
	read := func() {
		all, err := linksIn(netNS)
		require.NoError(t, err)
		require.Len(t, all, maxLinks)
	}
	before := testing.AllocsPerRun(5, read)
	names = nil
	for i := range 4 * maxLinks {
		names = append(names, fmt.Sprintf("evenmore%d", i))
	}
	addLinks(t, netNS, names...)
	require.Less(t, testing.AllocsPerRun(5, read), 1.2*before)
}

// Each look enters the namespace on a thread, and leaves it again.
func TestLinksLeakNoThreads(t *testing.T) {
	netNS := podNetNS(t)
	addLinks(t, netNS, "eth0")
	threads := func() int {
		all, err := os.ReadDir("/proc/self/task")
		require.NoError(t, err)
		return len(all)
	}
	before := threads()
	for range 300 {
		_, err := linksIn(netNS)
		require.NoError(t, err)
	}
	require.Less(t, threads(), before+50)
}

func BenchmarkLinks(b *testing.B) {
	for b.Loop() {
		if _, err := linksIn(nodeNetNS); err != nil {
			b.Fatal(err)
		}
	}
}
