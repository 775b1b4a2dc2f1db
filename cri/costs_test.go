package cri

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// counting is containerd's service that keeps which of its methods were called.
type counting struct {
	*stock
	calls []string
}

func (c *counting) called(method string) { c.calls = append(c.calls, method) }

func (c *counting) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	c.called("RunPodSandbox")
	if call := FromContext(ctx); call != nil {
		call.SandboxID = idOf("made")
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: idOf("made")}, nil
}

func (c *counting) StopPodSandbox(context.Context, *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	c.called("StopPodSandbox")
	return &runtime.StopPodSandboxResponse{}, nil
}

func (c *counting) RemovePodSandbox(context.Context, *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	c.called("RemovePodSandbox")
	return &runtime.RemovePodSandboxResponse{}, nil
}

func (c *counting) PodSandboxStatus(_ context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	c.called("PodSandboxStatus")
	return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Id: r.GetPodSandboxId()}}, nil
}

func (c *counting) PodSandboxStats(_ context.Context, r *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	c.called("PodSandboxStats")
	return &runtime.PodSandboxStatsResponse{Stats: statsOf(r.GetPodSandboxId())}, nil
}

func (c *counting) CreateContainer(context.Context, *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	c.called("CreateContainer")
	return &runtime.CreateContainerResponse{ContainerId: "c1"}, nil
}

func (c *counting) ContainerStatus(context.Context, *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	c.called("ContainerStatus")
	return c.containerStatus, nil
}

func (c *counting) PortForward(context.Context, *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	c.called("PortForward")
	return &runtime.PortForwardResponse{}, nil
}

func (c *counting) ImageStatus(ctx context.Context, r *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	c.called("ImageStatus")
	return c.stock.ImageStatus(ctx, r)
}

// A list costs more with each pod and container of the node.
func (c *counting) ListPodSandbox(context.Context, *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	c.called("ListPodSandbox")
	return &runtime.ListPodSandboxResponse{}, nil
}

func (c *counting) ListContainers(context.Context, *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	c.called("ListContainers")
	return &runtime.ListContainersResponse{}, nil
}

// idOf is an id of the length of containerd's.
func idOf(name string) string { return name + strings.Repeat("0", fullID-len(name)) }

// What the kubelet asks of one pod costs the same however many others there are: no list of containerd's service is taken for it. A pod of
// another handler costs what it costs without podfsm: the one call.
func TestCostsArePerPod(t *testing.T) {
	mapped := &runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: "c1", Mounts: []*runtime.Mount{{UidMappings: chosen().Uids}}}}
	for _, tc := range []struct {
		call string
		do   func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error
		// The calls that a podfsm pod costs, where they are not the same one.
		ours []string
	}{
		{call: "RunPodSandbox", ours: []string{"ImageStatus", "RunPodSandbox"}, do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			handler := "runc"
			if pod == idOf("ours") {
				handler = "podfsm"
			}
			_, err := s.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: handler})
			return err
		}},
		{call: "StopPodSandbox", do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			_, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		}},
		{call: "RemovePodSandbox", do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		}},
		{call: "PodSandboxStatus", do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			_, err := s.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod})
			return err
		}},
		{call: "PodSandboxStats", do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			_, err := s.PodSandboxStats(ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: pod})
			return err
		}},
		{call: "CreateContainer", do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			request := containerRequest(podConfig(hostUsers))
			request.PodSandboxId = pod
			_, err := s.CreateContainer(ctx, request)
			return err
		}},
		{call: "ContainerStatus", do: func(ctx context.Context, s runtime.RuntimeServiceServer, _ string) error {
			_, err := s.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: "c1", Verbose: true})
			return err
		}},
		{call: "PortForward", ours: []string{}, do: func(ctx context.Context, s runtime.RuntimeServiceServer, pod string) error {
			_, err := s.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: pod, Port: []int32{80}})
			return err
		}},
	} {
		for _, whose := range []string{"ours", "another's"} {
			t.Run(fmt.Sprintf("%s of %s", tc.call, whose), func(t *testing.T) {
				ours := Sandbox{ID: idOf("ours"), Config: podConfig(), Ready: true, NetNSPath: "/run/netns/none", UserNS: chosen()}
				c := &controller{pods: map[string]Sandbox{ours.ID: ours}, containers: map[string]string{"c1": idOf(whose)}}
				counted := &counting{stock: &stock{containerStatus: mapped}}
				front := newService(inner{counted, counted}, c, Streaming{Address: "127.0.0.1"})
				t.Cleanup(func() { require.NoError(t, front.Close()) })
				require.NoError(t, tc.do(t.Context(), retriesBefore(t, front, c), idOf(whose)))
				want := []string{tc.call}
				if whose == "ours" && tc.ours != nil {
					want = tc.ours
				}
				require.Equal(t, want, append([]string{}, counted.calls...))
			})
		}
	}
}

// The pod of a container is looked for only where its status has what podfsm may have put there.
func TestPlainContainersCostNoLook(t *testing.T) {
	for name, tc := range map[string]struct {
		status *runtime.ContainerStatusResponse
		looks  int
	}{
		"no mounts":      {&runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: "c1"}}, 0},
		"plain mounts":   {&runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: "c1", Mounts: []*runtime.Mount{{}, nil}}}, 0},
		"a mapped mount": {&runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: "c1", Mounts: []*runtime.Mount{{}, {GidMappings: chosen().Gids}}}}, 1},
		"verbose info":   {&runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: "c1"}, Info: map[string]string{"info": "{}"}}, 1},
		"empty":          {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := &controller{}
			got, err := newFront(t, &stock{containerStatus: tc.status}, c).ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: "c1"})
			require.NoError(t, err)
			require.Same(t, tc.status, got)
			require.Len(t, c.calls, tc.looks)
		})
	}
}
