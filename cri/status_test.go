package cri

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestStatusIsRestored(t *testing.T) {
	namespaces := podConfig().GetLinux().GetSecurityContext().GetNamespaceOptions()
	stockNamespaces := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE}
	for name, tc := range map[string]struct {
		pod       *Sandbox
		got, want *runtime.PodSandboxStatus
	}{
		"ours": {
			pod: &Sandbox{Config: podConfig(), IP: "10.0.0.2", AdditionalIPs: []string{"fd00::2", "10.1.0.2"}},
			got: &runtime.PodSandboxStatus{
				Id:      "s1",
				State:   runtime.PodSandboxState_SANDBOX_READY,
				Network: &runtime.PodSandboxNetworkStatus{},
				Linux:   &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: stockNamespaces}},
			},
			want: &runtime.PodSandboxStatus{
				Id:    "s1",
				State: runtime.PodSandboxState_SANDBOX_READY,
				Network: &runtime.PodSandboxNetworkStatus{
					Ip: "10.0.0.2", AdditionalIps: []*runtime.PodIP{{Ip: "fd00::2"}, {Ip: "10.1.0.2"}},
				},
				Linux: &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: namespaces}},
			},
		},
		"ours, a bare status": {
			pod: &Sandbox{Config: podConfig(), IP: "10.0.0.2"},
			got: &runtime.PodSandboxStatus{Id: "s1"},
			want: &runtime.PodSandboxStatus{
				Id:      "s1",
				Network: &runtime.PodSandboxNetworkStatus{Ip: "10.0.0.2"},
				Linux:   &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: namespaces}},
			},
		},
		"ours, that the controller doesn't know any more": {
			pod: &Sandbox{Config: podConfig(), CreatedAt: time.Unix(7, 8)},
			got: &runtime.PodSandboxStatus{Id: "s1", CreatedAt: time.Time{}.UnixNano()},
			want: &runtime.PodSandboxStatus{
				Id:        "s1",
				CreatedAt: time.Unix(7, 8).UnixNano(),
				Network:   &runtime.PodSandboxNetworkStatus{},
				Linux:     &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: namespaces}},
			},
		},
		"ours, off its network": {
			pod: &Sandbox{Config: podConfig()},
			got: &runtime.PodSandboxStatus{Id: "s1", Network: &runtime.PodSandboxNetworkStatus{}},
			want: &runtime.PodSandboxStatus{
				Id:      "s1",
				Network: &runtime.PodSandboxNetworkStatus{},
				Linux:   &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: namespaces}},
			},
		},
		"ours, without namespace options": {
			pod: &Sandbox{Config: &runtime.PodSandboxConfig{}},
			got: &runtime.PodSandboxStatus{Id: "s1"},
			want: &runtime.PodSandboxStatus{
				Id:      "s1",
				Network: &runtime.PodSandboxNetworkStatus{},
				Linux:   &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{}},
			},
		},
		"ours, on a network that containerd's service made": {
			pod: &Sandbox{Config: podConfig()},
			got: &runtime.PodSandboxStatus{
				Id: "s1", Network: &runtime.PodSandboxNetworkStatus{Ip: "10.9.0.2", AdditionalIps: []*runtime.PodIP{{Ip: "fd09::2"}}},
			},
			want: &runtime.PodSandboxStatus{
				Id:      "s1",
				Network: &runtime.PodSandboxNetworkStatus{Ip: "10.9.0.2", AdditionalIps: []*runtime.PodIP{{Ip: "fd09::2"}}},
				Linux:   &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: namespaces}},
			},
		},
		"another's": {
			got: &runtime.PodSandboxStatus{
				Id: "s1", Network: &runtime.PodSandboxNetworkStatus{Ip: "10.0.0.3", AdditionalIps: []*runtime.PodIP{{Ip: "fd00::3"}}},
			},
			want: &runtime.PodSandboxStatus{
				Id: "s1", Network: &runtime.PodSandboxNetworkStatus{Ip: "10.0.0.3", AdditionalIps: []*runtime.PodIP{{Ip: "fd00::3"}}},
			},
		},
		"none": {},
	} {
		t.Run(name, func(t *testing.T) {
			c := &controller{pods: map[string]Sandbox{}}
			if tc.pod != nil {
				c.pods["s1"] = *tc.pod
			}
			s := &stock{status: func(_ context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
				require.Equal(t, "s", r.GetPodSandboxId())
				return &runtime.PodSandboxStatusResponse{Status: tc.got, Info: map[string]string{"podfsm": "x"}}, nil
			}}
			response, err := newFront(t, s, c).PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: "s"})
			require.NoError(t, err)
			requireEqual(t, tc.want, response.GetStatus())
			require.Equal(t, map[string]string{"podfsm": "x"}, response.GetInfo())
			if tc.pod != nil {
				restored := response.GetStatus().GetLinux().GetNamespaces().GetOptions()
				kept := tc.pod.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
				require.False(t, kept != nil && restored == kept, "the kept configuration isn't given away")
			}
		})
	}

	t.Run("failure", func(t *testing.T) {
		failed := errors.New("no luck")
		s := &stock{status: func(context.Context, *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
			return nil, failed
		}}
		_, err := newFront(t, s, &controller{}).PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{})
		require.Equal(t, failed, err)
	})
}

// pieces collects a streamed list.
type pieces struct {
	grpc.ServerStream
	items []*runtime.PodSandbox
	err   error
}

func (p *pieces) Context() context.Context { return context.Background() }

func (p *pieces) Send(response *runtime.StreamPodSandboxesResponse) error {
	p.items = append(p.items, response.GetPodSandboxes()...)
	return p.err
}

func TestListsRestoreTimes(t *testing.T) {
	s := &stock{listed: []string{"s1", "s2", "s3"}}
	c := &controller{pods: map[string]Sandbox{
		"s1": {Config: podConfig(), CreatedAt: time.Unix(7, 8)},
		"s2": {Config: podConfig()}, // pause wasn't created yet
	}}
	front := newFront(t, s, c)
	want := map[string]int64{"s1": time.Unix(7, 8).UnixNano(), "s2": time.Second.Nanoseconds(), "s3": time.Second.Nanoseconds()}
	times := func(items []*runtime.PodSandbox) map[string]int64 {
		got := map[string]int64{}
		for _, item := range items {
			got[item.GetId()] = item.GetCreatedAt()
		}
		return got
	}
	response, err := front.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Equal(t, want, times(response.GetItems()))

	out := &pieces{}
	require.NoError(t, front.StreamPodSandboxes(&runtime.StreamPodSandboxesRequest{}, out))
	require.Equal(t, want, times(out.items))
	out.err = errors.New("the caller has gone")
	require.Equal(t, out.err, front.StreamPodSandboxes(&runtime.StreamPodSandboxesRequest{}, out))
}

// sink is a subscriber of container events.
type sink struct {
	grpc.ServerStream
	sent []*runtime.ContainerEventResponse
	err  error
}

func (s *sink) Context() context.Context { return context.Background() }

func (s *sink) Send(event *runtime.ContainerEventResponse) error {
	s.sent = append(s.sent, event)
	return s.err
}

func TestEventsAreRestoredInACopy(t *testing.T) {
	ours := &runtime.ContainerEventResponse{
		ContainerId:        "s1",
		ContainerEventType: runtime.ContainerEventType_CONTAINER_STARTED_EVENT,
		PodSandboxStatus:   &runtime.PodSandboxStatus{Id: "s1", Network: &runtime.PodSandboxNetworkStatus{}},
		ContainersStatuses: []*runtime.ContainerStatus{{Id: "c1"}},
	}
	another := &runtime.ContainerEventResponse{PodSandboxStatus: &runtime.PodSandboxStatus{Id: "s2", Network: &runtime.PodSandboxNetworkStatus{Ip: "10.0.0.3"}}}
	bare := &runtime.ContainerEventResponse{ContainerId: "s1", ContainerEventType: runtime.ContainerEventType_CONTAINER_DELETED_EVENT}
	before := proto.CloneOf(ours)
	events := []*runtime.ContainerEventResponse{ours, another, bare}

	request := &runtime.GetEventsRequest{}
	s := &stock{events: func(r *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
		require.Same(t, request, r)
		for _, event := range events {
			if err := stream.Send(event); err != nil {
				return err
			}
		}
		return nil
	}}
	c := &controller{pods: map[string]Sandbox{"s1": {Config: podConfig(), IP: "10.0.0.2"}}}
	out := &sink{}
	require.NoError(t, newFront(t, s, c).GetContainerEvents(request, out))

	require.Len(t, out.sent, 3)
	require.Equal(t, "10.0.0.2", out.sent[0].GetPodSandboxStatus().GetNetwork().GetIp())
	require.Equal(t, runtime.NamespaceMode_POD, out.sent[0].GetPodSandboxStatus().GetLinux().GetNamespaces().GetOptions().GetNetwork())
	require.Equal(t, before.GetContainerEventType(), out.sent[0].GetContainerEventType())
	requireEqual(t, before.GetContainersStatuses()[0], out.sent[0].GetContainersStatuses()[0])
	requireEqual(t, before, ours, "the event is every subscriber's")
	require.Same(t, another, out.sent[1])
	require.Same(t, bare, out.sent[2])

	out.err = errors.New("the subscriber has gone")
	require.Equal(t, out.err, newFront(t, s, c).GetContainerEvents(request, out))
}

func TestStatusTellsOfPodfsm(t *testing.T) {
	s := &stock{runtimeStatus: &runtime.StatusResponse{Info: map[string]string{"golang": "go"}}}
	front := newFront(t, s, &controller{})
	got, err := front.Status(t.Context(), &runtime.StatusRequest{})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"golang": "go"}, got.GetInfo())
	got, err = front.Status(t.Context(), &runtime.StatusRequest{Verbose: true})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"golang": "go", "podfsm": "of podfsm"}, got.GetInfo())
}
