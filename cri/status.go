package cri

import (
	"context"
	"maps"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodSandboxStatus restores the network, the namespace modes and the time of creation.
func (s *service) PodSandboxStatus(ctx context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	resp, err := s.RuntimeServiceServer.PodSandboxStatus(ctx, r)
	if err != nil {
		return nil, err
	}
	if pod, ok := s.sandboxes.Sandbox(resp.GetStatus().GetId()); ok {
		restore(resp.Status, pod)
	}
	return resp, nil
}

// restore puts back into a pod's status what containerd's service doesn't know.
func restore(status *runtime.PodSandboxStatus, pod Sandbox) {
	if network := ensure(&status.Network); pod.IP != "" {
		network.Ip, network.AdditionalIps = pod.IP, nil
		for _, ip := range pod.AdditionalIPs {
			network.AdditionalIps = append(network.AdditionalIps, &runtime.PodIP{Ip: ip})
		}
	}
	if !pod.CreatedAt.IsZero() {
		status.CreatedAt = pod.CreatedAt.UnixNano() // containerd's service asks the controller, which may have forgotten the sandbox
	}
	options := pod.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	ensure(&ensure(&status.Linux).Namespaces).Options = proto.CloneOf(options)
}

// ListPodSandbox restores the times of creation.
func (s *service) ListPodSandbox(ctx context.Context, r *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	resp, err := s.RuntimeServiceServer.ListPodSandbox(ctx, r)
	if err != nil {
		return nil, err
	}
	s.restoreTimes(resp.GetItems())
	return resp, nil
}

// StreamPodSandboxes is the list in pieces.
func (s *service) StreamPodSandboxes(r *runtime.StreamPodSandboxesRequest, stream runtime.RuntimeService_StreamPodSandboxesServer) error {
	return s.RuntimeServiceServer.StreamPodSandboxes(r, &listStream{stream, s})
}

type listStream struct {
	runtime.RuntimeService_StreamPodSandboxesServer
	service *service
}

func (l *listStream) Send(resp *runtime.StreamPodSandboxesResponse) error {
	l.service.restoreTimes(resp.GetPodSandboxes())
	return l.RuntimeService_StreamPodSandboxesServer.Send(resp)
}

// restoreTimes restores when podfsm sandboxes were created. containerd's service makes the items for one answer.
func (s *service) restoreTimes(items []*runtime.PodSandbox) {
	for _, item := range items {
		if created := s.sandboxes.CreatedAt(item.GetId()); !created.IsZero() {
			item.CreatedAt = created.UnixNano()
		}
	}
}

// GetContainerEvents restores the sandbox status in every event. Subscribers share the events, so it sends a copy.
func (s *service) GetContainerEvents(r *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
	return s.RuntimeServiceServer.GetContainerEvents(r, &eventStream{stream, s})
}

type eventStream struct {
	runtime.RuntimeService_GetContainerEventsServer
	service *service
}

func (e *eventStream) Send(event *runtime.ContainerEventResponse) error {
	if pod, ok := e.service.sandboxes.Sandbox(event.GetPodSandboxStatus().GetId()); ok {
		event = restoredEvent(event, pod)
	}
	return e.RuntimeService_GetContainerEventsServer.Send(event)
}

func restoredEvent(event *runtime.ContainerEventResponse, pod Sandbox) *runtime.ContainerEventResponse {
	event = proto.CloneOf(event)
	if event.PodSandboxStatus.GetState() == runtime.PodSandboxState_SANDBOX_READY && len(pod.HadIPs) > 0 {
		pod.IP, pod.AdditionalIPs = pod.HadIPs[0], pod.HadIPs[1:] // the pod was on its network then, whatever it is now
	}
	restore(event.PodSandboxStatus, pod)
	if pod.UserNS != nil {
		for _, status := range event.ContainersStatuses {
			restoreMounts(status)
		}
	}
	return event
}

// Status adds podfsm's status to a verbose answer.
func (s *service) Status(ctx context.Context, r *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	resp, err := s.RuntimeServiceServer.Status(ctx, r)
	if err != nil || !r.GetVerbose() {
		return resp, err
	}
	info, err := s.sandboxes.StatusInfo()
	if err != nil {
		return nil, err
	}
	if resp.Info == nil {
		resp.Info = map[string]string{}
	}
	maps.Copy(resp.Info, info)
	return resp, nil
}
