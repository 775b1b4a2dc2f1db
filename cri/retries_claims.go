package cri

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
)

// This file has the requests that claim sandboxes. A request that names a sandbox takes the sandbox. An answer
// that shows a sandbox claims it as shown: the kubelet uses a ready sandbox that it sees without asking again.
// No answer shows a discarded sandbox.

// StopPodSandbox takes the sandbox and stops it, one request per attempt at a time.
func (r *retries) StopPodSandbox(ctx context.Context, req *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	pod, ok := r.take(ctx, req.GetPodSandboxId())
	if !ok {
		return r.RuntimeServiceServer.StopPodSandbox(ctx, req)
	}
	unlock, err := r.ending.lock(ctx, attemptOf(pod.Config))
	if err != nil {
		return nil, err
	}
	defer unlock()
	return r.RuntimeServiceServer.StopPodSandbox(ctx, req)
}

// RemovePodSandbox takes the sandbox and removes it, one request per attempt at a time.
func (r *retries) RemovePodSandbox(ctx context.Context, req *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	pod, ok := r.take(ctx, req.GetPodSandboxId())
	if !ok {
		return r.RuntimeServiceServer.RemovePodSandbox(ctx, req)
	}
	unlock, err := r.ending.lock(ctx, attemptOf(pod.Config))
	if err != nil {
		return nil, err
	}
	defer unlock()
	return r.RuntimeServiceServer.RemovePodSandbox(ctx, req)
}

// CreateContainer takes the sandbox.
func (r *retries) CreateContainer(ctx context.Context, req *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	r.take(ctx, req.GetPodSandboxId())
	return r.RuntimeServiceServer.CreateContainer(ctx, req)
}

// PortForward takes the sandbox.
func (r *retries) PortForward(ctx context.Context, req *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	r.take(ctx, req.GetPodSandboxId())
	return r.RuntimeServiceServer.PortForward(ctx, req)
}

// take claims the podfsm sandbox that a request names.
func (r *retries) take(ctx context.Context, id string) (Sandbox, bool) {
	id, pod, ok := find(ctx, r.RuntimeServiceServer, r.sandboxes.Sandbox, id)
	if ok {
		r.sandboxes.Claim(ctx, id, lifecycle.Taken)
	}
	return pod, ok
}

// show claims a sandbox as shown. It says whether a caller may see the sandbox.
func (r *retries) show(ctx context.Context, id string) bool {
	return r.sandboxes.Claim(ctx, id, lifecycle.Shown)
}

// shown returns the items of a list whose sandboxes callers may see. id returns an item's sandbox.
func shown[T any](ctx context.Context, r *retries, items []T, id func(T) string) []T {
	return slices.DeleteFunc(items, func(item T) bool { return !r.show(ctx, id(item)) })
}

// errDiscarded is the answer to a request for a discarded sandbox.
func errDiscarded(id string) error {
	return fmt.Errorf("sandbox %q is being discarded, no caller claimed it in time: %w", id, errdefs.ErrNotFound)
}

// PodSandboxStatus shows one sandbox.
func (r *retries) PodSandboxStatus(ctx context.Context, req *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	resp, err := r.RuntimeServiceServer.PodSandboxStatus(ctx, req)
	if err != nil {
		return nil, err
	}
	if id := resp.GetStatus().GetId(); !r.show(ctx, id) {
		return nil, errDiscarded(id)
	}
	return resp, nil
}

// ListPodSandbox shows all sandboxes.
func (r *retries) ListPodSandbox(ctx context.Context, req *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	resp, err := r.RuntimeServiceServer.ListPodSandbox(ctx, req)
	if err != nil {
		return nil, err
	}
	resp.Items = shown(ctx, r, resp.GetItems(), (*runtime.PodSandbox).GetId)
	return resp, nil
}

// PodSandboxStats shows one sandbox.
func (r *retries) PodSandboxStats(ctx context.Context, req *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	resp, err := r.RuntimeServiceServer.PodSandboxStats(ctx, req)
	if err != nil {
		return nil, err
	}
	if id := statsID(resp.GetStats()); !r.show(ctx, id) {
		return nil, errDiscarded(id)
	}
	return resp, nil
}

// ListPodSandboxStats shows all sandboxes.
func (r *retries) ListPodSandboxStats(ctx context.Context, req *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	resp, err := r.RuntimeServiceServer.ListPodSandboxStats(ctx, req)
	if err != nil {
		return nil, err
	}
	resp.Stats = shown(ctx, r, resp.GetStats(), statsID)
	return resp, nil
}

// ListPodSandboxMetrics shows all sandboxes. containerd's service may return metrics along with an error.
func (r *retries) ListPodSandboxMetrics(ctx context.Context, req *runtime.ListPodSandboxMetricsRequest) (*runtime.ListPodSandboxMetricsResponse, error) {
	resp, err := r.RuntimeServiceServer.ListPodSandboxMetrics(ctx, req)
	if resp != nil {
		resp.PodMetrics = shown(ctx, r, resp.GetPodMetrics(), (*runtime.PodSandboxMetrics).GetPodSandboxId)
	}
	return resp, err
}

func statsID(stats *runtime.PodSandboxStats) string { return stats.GetAttributes().GetId() }

// StreamPodSandboxes shows all sandboxes.
func (r *retries) StreamPodSandboxes(req *runtime.StreamPodSandboxesRequest, stream runtime.RuntimeService_StreamPodSandboxesServer) error {
	return r.RuntimeServiceServer.StreamPodSandboxes(req, onlyShown(stream, func(resp *runtime.StreamPodSandboxesResponse) bool {
		resp.PodSandboxes = shown(stream.Context(), r, resp.GetPodSandboxes(), (*runtime.PodSandbox).GetId)
		return true
	}))
}

// StreamPodSandboxStats shows all sandboxes.
func (r *retries) StreamPodSandboxStats(req *runtime.StreamPodSandboxStatsRequest, stream runtime.RuntimeService_StreamPodSandboxStatsServer) error {
	return r.RuntimeServiceServer.StreamPodSandboxStats(req, onlyShown(stream, func(resp *runtime.StreamPodSandboxStatsResponse) bool {
		resp.PodSandboxStats = shown(stream.Context(), r, resp.GetPodSandboxStats(), statsID)
		return true
	}))
}

// StreamPodSandboxMetrics shows all sandboxes.
func (r *retries) StreamPodSandboxMetrics(req *runtime.StreamPodSandboxMetricsRequest, stream runtime.RuntimeService_StreamPodSandboxMetricsServer) error {
	return r.RuntimeServiceServer.StreamPodSandboxMetrics(req, onlyShown(stream, func(resp *runtime.StreamPodSandboxMetricsResponse) bool {
		resp.PodSandboxMetrics = shown(stream.Context(), r, resp.GetPodSandboxMetrics(), (*runtime.PodSandboxMetrics).GetPodSandboxId)
		return true
	}))
}

// GetContainerEvents shows the sandbox of each event. It leaves out the events of discarded sandboxes.
func (r *retries) GetContainerEvents(req *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
	return r.RuntimeServiceServer.GetContainerEvents(req, onlyShown(stream, func(event *runtime.ContainerEventResponse) bool {
		id := event.GetPodSandboxStatus().GetId()
		return id == "" || r.show(stream.Context(), id)
	}))
}

// onlyShown is a stream that sends the part of each message that callers may see. show removes the rest from a message,
// and says whether to send it.
func onlyShown[T any](stream grpc.ServerStreamingServer[T], show func(*T) (send bool)) grpc.ServerStreamingServer[T] {
	return &shownStream[T]{stream, show}
}

type shownStream[T any] struct {
	grpc.ServerStreamingServer[T]
	show func(*T) (send bool)
}

func (s *shownStream[T]) Send(message *T) error {
	if err := s.Context().Err(); err != nil {
		return err // the caller is gone and sees nothing, which containerd's service may not notice
	}
	if !s.show(message) {
		return nil
	}
	return s.ServerStreamingServer.Send(message)
}
