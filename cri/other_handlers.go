package cri

import (
	"context"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// runStock lets containerd's service run a pod of another handler. It tells the controller, because the pod may
// hold host ids.
func (s *service) runStock(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	ended := s.sandboxes.StockRuns(r.GetConfig())
	resp, err := s.RuntimeServiceServer.RunPodSandbox(ctx, r)
	ended(resp.GetPodSandboxId())
	return resp, err
}

// removeStock lets containerd's service remove such a pod, and tells the controller.
func (s *service) removeStock(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	resp, err := s.RuntimeServiceServer.RemovePodSandbox(ctx, r)
	if err == nil {
		s.sandboxes.StockRemoved(r.GetPodSandboxId())
	}
	return resp, err
}
