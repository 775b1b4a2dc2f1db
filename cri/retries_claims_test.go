package cri

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
)

// showing is a CRI service that shows the sandboxes "goes" and "stays" by every method that shows any.
func showing() *stock {
	ids := []string{"goes", "stays"}
	s := &stock{listed: ids}
	for _, id := range ids {
		s.stats = append(s.stats, statsOf(id))
		s.metrics = append(s.metrics, &runtime.PodSandboxMetrics{PodSandboxId: id})
	}
	s.status = func(_ context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
		return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Id: r.GetPodSandboxId()}}, nil
	}
	s.events = func(_ *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
		for _, id := range ids {
			if err := stream.Send(&runtime.ContainerEventResponse{PodSandboxStatus: &runtime.PodSandboxStatus{Id: id}}); err != nil {
				return err
			}
		}
		return stream.Send(&runtime.ContainerEventResponse{ContainerId: "of no sandbox"})
	}
	return s
}

// shows are the methods that show all sandboxes. Each returns the ids that it shows.
var shows = map[string]func(ctx context.Context, s runtime.RuntimeServiceServer) ([]string, error){
	"ListPodSandbox": func(ctx context.Context, s runtime.RuntimeServiceServer) ([]string, error) {
		list, err := s.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
		return idsIn(list.GetItems(), (*runtime.PodSandbox).GetId), err
	},
	"ListPodSandboxStats": func(ctx context.Context, s runtime.RuntimeServiceServer) ([]string, error) {
		list, err := s.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
		return idsIn(list.GetStats(), statsID), err
	},
	"ListPodSandboxMetrics": func(ctx context.Context, s runtime.RuntimeServiceServer) ([]string, error) {
		list, err := s.ListPodSandboxMetrics(ctx, &runtime.ListPodSandboxMetricsRequest{})
		return idsIn(list.GetPodMetrics(), (*runtime.PodSandboxMetrics).GetPodSandboxId), err
	},
	"StreamPodSandboxes": func(ctx context.Context, s runtime.RuntimeServiceServer) (ids []string, err error) {
		stream := &recorded[runtime.StreamPodSandboxesResponse]{ctx: ctx}
		err = s.StreamPodSandboxes(&runtime.StreamPodSandboxesRequest{}, stream)
		for _, resp := range stream.sent {
			ids = append(ids, idsIn(resp.GetPodSandboxes(), (*runtime.PodSandbox).GetId)...)
		}
		return ids, err
	},
	"StreamPodSandboxStats": func(ctx context.Context, s runtime.RuntimeServiceServer) (ids []string, err error) {
		stream := &recorded[runtime.StreamPodSandboxStatsResponse]{ctx: ctx}
		err = s.StreamPodSandboxStats(&runtime.StreamPodSandboxStatsRequest{}, stream)
		for _, resp := range stream.sent {
			ids = append(ids, idsIn(resp.GetPodSandboxStats(), statsID)...)
		}
		return ids, err
	},
	"StreamPodSandboxMetrics": func(ctx context.Context, s runtime.RuntimeServiceServer) (ids []string, err error) {
		stream := &recorded[runtime.StreamPodSandboxMetricsResponse]{ctx: ctx}
		err = s.StreamPodSandboxMetrics(&runtime.StreamPodSandboxMetricsRequest{}, stream)
		for _, resp := range stream.sent {
			ids = append(ids, idsIn(resp.GetPodSandboxMetrics(), (*runtime.PodSandboxMetrics).GetPodSandboxId)...)
		}
		return ids, err
	},
	"GetContainerEvents": func(ctx context.Context, s runtime.RuntimeServiceServer) ([]string, error) {
		stream := &recorded[runtime.ContainerEventResponse]{ctx: ctx}
		err := s.GetContainerEvents(&runtime.GetEventsRequest{}, stream)
		return idsIn(stream.sent, func(event *runtime.ContainerEventResponse) string { return event.GetPodSandboxStatus().GetId() }), err
	},
}

func idsIn[T any](items []T, id func(T) string) (ids []string) {
	for _, item := range items {
		ids = append(ids, id(item))
	}
	return ids
}

// A caller that sees a sandbox may use it from then on. No caller sees a discarded sandbox.
func TestShownIsClaimed(t *testing.T) {
	for method, show := range shows {
		t.Run(method, func(t *testing.T) {
			c := &controller{claims: map[string]lifecycle.Claim{"goes": lifecycle.Discarded}}
			ids, err := show(t.Context(), newCRI(t, showing(), c))
			require.NoError(t, err)
			want := []string{"stays"}
			if method == "GetContainerEvents" {
				want = append(want, "") // an event of no sandbox
			}
			require.Equal(t, want, ids)
			require.Equal(t, map[string]lifecycle.Claim{"goes": lifecycle.Discarded, "stays": lifecycle.Shown}, c.claims)
		})
	}
	for method, show := range map[string]func(s runtime.RuntimeServiceServer, id string) error{
		"PodSandboxStatus": func(s runtime.RuntimeServiceServer, id string) error {
			_, err := s.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: id})
			return err
		},
		"PodSandboxStats": func(s runtime.RuntimeServiceServer, id string) error {
			_, err := s.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{PodSandboxId: id})
			return err
		},
	} {
		t.Run(method, func(t *testing.T) {
			c := &controller{claims: map[string]lifecycle.Claim{"goes": lifecycle.Discarded}}
			service := newCRI(t, showing(), c)
			require.True(t, errdefs.IsNotFound(show(service, "goes")))
			require.NoError(t, show(service, "stays"))
			require.Equal(t, lifecycle.Shown, c.claims["stays"])
		})
	}
}

// containerd's service may not notice that the caller of a stream is gone. What that caller would see stays unclaimed.
func TestNothingIsShownToACallerThatIsGone(t *testing.T) {
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for method, show := range shows {
		if strings.HasPrefix(method, "List") {
			continue
		}
		t.Run(method, func(t *testing.T) {
			c := &controller{}
			ids, err := show(gone, newCRI(t, showing(), c))
			require.ErrorIs(t, err, context.Canceled)
			require.Empty(t, ids)
			require.Empty(t, c.claims)
		})
	}
}

// A caller that names a sandbox has it, also by a shortened id. A sandbox of another handler isn't claimed.
func TestNamedIsTaken(t *testing.T) {
	for method, name := range map[string]func(s runtime.RuntimeServiceServer, id string) error{
		"StopPodSandbox": func(s runtime.RuntimeServiceServer, id string) error {
			_, err := s.StopPodSandbox(t.Context(), &runtime.StopPodSandboxRequest{PodSandboxId: id})
			return err
		},
		"RemovePodSandbox": func(s runtime.RuntimeServiceServer, id string) error {
			_, err := s.RemovePodSandbox(t.Context(), &runtime.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		},
		"CreateContainer": func(s runtime.RuntimeServiceServer, id string) error {
			_, err := s.CreateContainer(t.Context(), &runtime.CreateContainerRequest{PodSandboxId: id})
			return err
		},
		"PortForward": func(s runtime.RuntimeServiceServer, id string) error {
			_, err := s.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: id})
			return err
		},
	} {
		for id, want := range map[string]map[string]lifecycle.Claim{
			"s1-long": {"s1-long": lifecycle.Taken},
			"s1":      {"s1-long": lifecycle.Taken},
			"s2-long": nil,
			"s":       nil,
		} {
			t.Run(method+"/"+id, func(t *testing.T) {
				c := &controller{pods: map[string]Sandbox{"s1-long": {Config: podConfig()}}}
				s := endable(&stock{listed: []string{"s1-long", "s2-long"}}, c)
				passed := false
				s.create = func(context.Context, *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
					passed = true
					return &runtime.CreateContainerResponse{}, nil
				}
				s.forward = func(context.Context, *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
					passed = true
					return &runtime.PortForwardResponse{}, nil
				}
				require.NoError(t, name(retriesBefore(t, s, c), id))
				require.True(t, passed || len(c.calls) > 0, "the request is passed on")
				require.Equal(t, want, c.claims)
			})
		}
	}
}
