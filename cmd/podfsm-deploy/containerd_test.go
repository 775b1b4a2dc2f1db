package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sandboxes is a CRI with the sandboxes of a node, by id.
type sandboxes struct {
	runtime.RuntimeServiceClient
	all map[string]*runtime.PodSandboxConfig
}

func (s *sandboxes) RunPodSandbox(_ context.Context, r *runtime.RunPodSandboxRequest, _ ...grpc.CallOption) (*runtime.RunPodSandboxResponse, error) {
	id := fmt.Sprint(r.GetConfig().GetMetadata())
	s.all[id] = r.GetConfig()
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *sandboxes) ListPodSandbox(_ context.Context, _ *runtime.ListPodSandboxRequest, _ ...grpc.CallOption) (*runtime.ListPodSandboxResponse, error) {
	response := &runtime.ListPodSandboxResponse{}
	for id, config := range s.all {
		response.Items = append(response.Items, &runtime.PodSandbox{Id: id, Metadata: config.GetMetadata(), Labels: config.GetLabels()})
	}
	return response, nil
}

func (s *sandboxes) StopPodSandbox(context.Context, *runtime.StopPodSandboxRequest, ...grpc.CallOption) (*runtime.StopPodSandboxResponse, error) {
	return &runtime.StopPodSandboxResponse{}, nil
}

func (s *sandboxes) RemovePodSandbox(_ context.Context, r *runtime.RemovePodSandboxRequest, _ ...grpc.CallOption) (*runtime.RemovePodSandboxResponse, error) {
	delete(s.all, r.GetPodSandboxId())
	return &runtime.RemovePodSandboxResponse{}, nil
}

// The verification removes its own pods, also those of a switch that was killed. A pod of a user stays, whatever its name, namespace and
// labels are.
func TestVerificationRemovesItsOwnPods(t *testing.T) {
	node := &sandboxes{all: map[string]*runtime.PodSandboxConfig{}}
	ctx := t.Context()
	require.NoError(t, runPod(ctx, node, "/", 0))
	require.Empty(t, node.all)

	users := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: "verify", Namespace: "podfsm-deploy", Uid: "0c4b2d34-9d0a-4c5b-8f3e-6a2f6d1b7e11"},
		Labels:   map[string]string{"podfsm.io/verification": "true"},
	}
	killed := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: "verify", Namespace: "podfsm-deploy", Uid: "podfsm-deploy-verify", Attempt: 3},
	}
	node.all["users"], node.all["killed"] = users, killed
	require.NoError(t, runPod(ctx, node, "/", 0))
	require.Equal(t, []string{"users"}, slices.Collect(maps.Keys(node.all)))
}
