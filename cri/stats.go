package cri

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// defaultInterface is the interface that metrics describe and that stats name first.
	defaultInterface = "eth0"
	// maxLinks is how many interfaces per pod an answer has. A pod that may make interfaces can make any number.
	maxLinks = 100
)

// PodSandboxStats restores the pod's network usage.
func (s *service) PodSandboxStats(ctx context.Context, r *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	resp, err := s.RuntimeServiceServer.PodSandboxStats(ctx, r)
	if err != nil {
		return nil, err
	}
	s.restoreUsage(ctx, resp.GetStats())
	return resp, nil
}

// ListPodSandboxStats restores the pods' network usage. If the stats of one pod can't be read, the list leaves that
// pod out, as containerd's service does for metrics; for stats, that service fails the whole list. Without any
// stats, the error is the answer.
func (s *service) ListPodSandboxStats(ctx context.Context, r *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	resp, err := s.RuntimeServiceServer.ListPodSandboxStats(ctx, r)
	if err != nil && (ctx.Err() != nil || len(resp.GetStats()) == 0) {
		return nil, err
	}
	s.logUnread(ctx, err, r.GetFilter() == nil)
	for _, one := range resp.GetStats() { // on one thread: each takes a fraction of a millisecond
		s.restoreUsage(ctx, one)
	}
	return resp, nil
}

// unreadStats are the errors of the last list, by text. The kubelet lists every ten seconds, and each error is a
// warning once.
type unreadStats struct {
	mu   sync.Mutex
	said map[string]bool
}

// unreadOf finds the sandbox in an error of containerd's service.
var unreadOf = regexp.MustCompile(`for sandbox "([^"]+)"`)

// logUnread logs each pod that a list leaves out because of err, which has a line per pod. A list of all pods shows
// which pods can be read again.
func (s *service) logUnread(ctx context.Context, err error, all bool) {
	s.unread.mu.Lock()
	defer s.unread.mu.Unlock()
	now := map[string]bool{}
	if !all {
		maps.Copy(now, s.unread.said)
	}
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			line = strings.TrimSuffix(line, "\n")
			level := log.WarnLevel
			if s.unread.said[line] {
				level = log.DebugLevel
			}
			s.logOfUnread(ctx, line).Log(level, "failed to read pod stats, pod left out of the list")
			now[line] = true
		}
	}
	s.unread.said = now
}

// logOfUnread returns a log entry with the pod that a line is about.
func (s *service) logOfUnread(ctx context.Context, line string) *log.Entry {
	entry := log.G(ctx).WithError(errors.New(line))
	id := unreadOf.FindStringSubmatch(line)
	if id == nil {
		return entry
	}
	entry = entry.WithField(tracing.LogSandbox, id[1])
	if pod, ok := s.sandboxes.Sandbox(id[1]); ok {
		entry = entry.WithField(tracing.LogPod, records.PodName(pod.Config))
	}
	return entry
}

// statsPerMessage is how many pods' stats one message of a stream has. It is containerd's own figure.
const statsPerMessage = 5000

// StreamPodSandboxStats is the list in pieces. containerd's service would stream nothing if it can't read the stats
// of one pod.
func (s *service) StreamPodSandboxStats(r *runtime.StreamPodSandboxStatsRequest, stream runtime.RuntimeService_StreamPodSandboxStatsServer) error {
	list, err := s.ListPodSandboxStats(stream.Context(), &runtime.ListPodSandboxStatsRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	for some := range slices.Chunk(list.GetStats(), statsPerMessage) {
		if err := stream.Send(&runtime.StreamPodSandboxStatsResponse{PodSandboxStats: some}); err != nil {
			return err
		}
	}
	return nil
}

// ListPodSandboxMetrics restores the pods' network metrics.
func (s *service) ListPodSandboxMetrics(ctx context.Context, r *runtime.ListPodSandboxMetricsRequest) (*runtime.ListPodSandboxMetricsResponse, error) {
	resp, err := s.RuntimeServiceServer.ListPodSandboxMetrics(ctx, r)
	s.restoreMetrics(ctx, resp.GetPodMetrics())
	return resp, err
}

// StreamPodSandboxMetrics is the list in pieces.
func (s *service) StreamPodSandboxMetrics(r *runtime.StreamPodSandboxMetricsRequest, stream runtime.RuntimeService_StreamPodSandboxMetricsServer) error {
	return s.RuntimeServiceServer.StreamPodSandboxMetrics(r, &metricsStream{stream, s})
}

type metricsStream struct {
	runtime.RuntimeService_StreamPodSandboxMetricsServer
	service *service
}

func (m *metricsStream) Send(resp *runtime.StreamPodSandboxMetricsResponse) error {
	m.service.restoreMetrics(m.Context(), resp.GetPodSandboxMetrics())
	return m.RuntimeService_StreamPodSandboxMetricsServer.Send(resp)
}

// restoreUsage fills in the network usage of a podfsm pod.
func (s *service) restoreUsage(ctx context.Context, stats *runtime.PodSandboxStats) {
	_, links, ok := s.linksOf(ctx, stats.GetAttributes().GetId())
	if !ok {
		return
	}
	usage := &runtime.NetworkUsage{Timestamp: time.Now().UnixNano()}
	for _, link := range links {
		moved := &runtime.NetworkInterfaceUsage{
			Name:     link.Name,
			RxBytes:  value(link.Statistics.RxBytes),
			RxErrors: value(link.Statistics.RxErrors),
			TxBytes:  value(link.Statistics.TxBytes),
			TxErrors: value(link.Statistics.TxErrors),
		}
		usage.Interfaces = append(usage.Interfaces, moved)
		if usage.DefaultInterface == nil || link.Name == defaultInterface {
			usage.DefaultInterface = moved
		}
	}
	ensure(&stats.Linux).Network = usage
}

// restoreMetrics puts the metrics of the network before what containerd's service has of each podfsm pod.
func (s *service) restoreMetrics(ctx context.Context, metrics []*runtime.PodSandboxMetrics) {
	for _, one := range metrics {
		pod, links, ok := s.linksOf(ctx, one.GetPodSandboxId())
		if !ok {
			continue
		}
		for _, link := range links {
			if link.Name == defaultInterface {
				one.Metrics = append(networkMetrics(one.GetPodSandboxId(), pod.Config, link), one.Metrics...)
			}
		}
	}
}

// networkMetrics are cAdvisor's network metrics of a pod, as in containerd's ListMetricDescriptors.
func networkMetrics(id string, config *runtime.PodSandboxConfig, link *netlink.LinkAttrs) []*runtime.Metric {
	now := time.Now().UnixNano()
	// The pod, its namespace, container, id, image and interface. A pod is neither container nor image.
	labels := []string{config.GetMetadata().GetName(), config.GetMetadata().GetNamespace(), "", id, "", link.Name}
	var metrics []*runtime.Metric
	for _, counter := range []struct {
		name  string
		count uint64
	}{
		{"receive_bytes", link.Statistics.RxBytes},
		{"receive_packets", link.Statistics.RxPackets},
		{"receive_packets_dropped", link.Statistics.RxDropped},
		{"receive_errors", link.Statistics.RxErrors},
		{"transmit_bytes", link.Statistics.TxBytes},
		{"transmit_packets", link.Statistics.TxPackets},
		{"transmit_packets_dropped", link.Statistics.TxDropped},
		{"transmit_errors", link.Statistics.TxErrors},
	} {
		metrics = append(metrics, &runtime.Metric{
			Name:        "container_network_" + counter.name + "_total",
			Timestamp:   now,
			MetricType:  runtime.MetricType_COUNTER,
			LabelValues: labels,
			Value:       value(counter.count),
		})
	}
	return metrics
}

func value(v uint64) *runtime.UInt64Value { return &runtime.UInt64Value{Value: v} }

// linksOf returns the interfaces of a podfsm pod with a network of its own. It returns none if the network can't be
// read: the pod may be stopping.
func (s *service) linksOf(ctx context.Context, id string) (Sandbox, []*netlink.LinkAttrs, bool) {
	pod, ok := s.sandboxes.Sandbox(id)
	if !ok || pod.NetNSPath == "" {
		return Sandbox{}, nil, false
	}
	links, err := linksIn(pod.NetNSPath)
	if err != nil {
		log.G(ctx).WithField(tracing.LogSandbox, id).WithError(err).Debug("failed to read pod network stats, left out")
		return Sandbox{}, nil, false
	}
	return pod, links, true
}

// linksIn reads the interfaces in a network namespace except the loopback, in the kernel's order, at most maxLinks.
// All of them have statistics, and a name that is valid in a protobuf message, whatever name the pod chose.
func linksIn(netNS string) ([]*netlink.LinkAttrs, error) {
	var links []*netlink.LinkAttrs
	err := ns.WithNetNSPath(netNS, func(ns.NetNS) (err error) {
		links, err = firstLinks()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("failed to list the interfaces in network namespace %q: %w", netNS, err)
	}
	return links, nil
}

// firstLinks is linksIn for the thread's network namespace. The kernel describes the interfaces as they are read, so
// closing the socket keeps it from describing the rest.
func firstLinks() (links []*netlink.LinkAttrs, err error) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE) // to no group: it only opens the socket
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}
	var broken error
	err = request.ExecuteIter(unix.NETLINK_ROUTE, unix.RTM_NEWLINK, func(message []byte) bool {
		var link netlink.Link
		if link, broken = netlink.LinkDeserialize(nil, message); broken != nil {
			return false
		}
		if attrs := link.Attrs(); attrs.Name != "lo" && attrs.Statistics != nil {
			attrs.Name = strings.ToValidUTF8(attrs.Name, "\uFFFD")
			links = append(links, attrs)
		}
		if len(links) == maxLinks {
			socket.Close()
			return false
		}
		return true
	})
	if len(links) == maxLinks || errors.Is(err, netlink.ErrDumpInterrupted) { // an interface appeared or vanished meanwhile
		err = nil
	}
	return links, errors.Join(broken, err)
}
