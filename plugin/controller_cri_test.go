package plugin

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
)

// runner is a CRI service that runs pods by do.
type runner struct {
	runtime.UnimplementedRuntimeServiceServer
	runtime.UnimplementedImageServiceServer
	do func(ctx context.Context) error
}

func (r *runner) RunPodSandbox(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, r.do(ctx)
}

func (*runner) ImageStatus(context.Context, *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	return &runtime.ImageStatusResponse{Image: &runtime.Image{}}, nil
}

// through passes do a context as the front gives it to containerd's service for RunPodSandbox, and returns the front's answer.
func through(t *testing.T, c *Controller, config *runtime.PodSandboxConfig, do func(ctx context.Context) error) error {
	stock := &runner{do: do}
	instance := &criPlugin{RuntimeServiceServer: stock, ImageServiceServer: stock, Closer: &stockCRI{}}
	require.NoError(t, cri.Install(instance, c, time.Minute, cri.Streaming{}))
	_, err := instance.RunPodSandbox(inCRI(t), &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: "podfsm"})
	return err
}
