package cri

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestStockPodsAreHeardOf(t *testing.T) {
	failed := errors.New("no")
	s, c := &stock{}, &controller{}
	front := newFront(t, s, c)
	run := func(handler string, err error) {
		s.run = func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
			c.heard = append(c.heard, "inner")
			if err != nil {
				return nil, err
			}
			return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
		}
		_, got := front.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{RuntimeHandler: handler, Config: &runtime.PodSandboxConfig{}})
		require.Equal(t, err, got)
	}
	run("runc", nil)
	run("runc", failed)
	run("podfsm", nil)
	s.remove = func(_ context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
		return &runtime.RemovePodSandboxResponse{}, map[string]error{"stuck": failed}[r.GetPodSandboxId()]
	}
	for _, id := range []string{"s1", "stuck"} {
		_, _ = front.RemovePodSandbox(t.Context(), &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	}
	require.Equal(t, []string{
		"stock runs", "inner", "stock ran s1",
		"stock runs", "inner", "stock ran ",
		"inner",
		"stock removed s1",
	}, c.heard)
}
