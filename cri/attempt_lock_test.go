package cri

import (
	"context"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Requests that end one sandbox run one after the other. Requests for another sandbox don't wait, nor do callers that give up.
func TestOneRequestEndsASandboxAtATime(t *testing.T) {
	reached, release := make(chan string, 4), make(chan struct{})
	s := &stock{remove: func(_ context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
		reached <- r.GetPodSandboxId()
		<-release
		return &runtime.RemovePodSandboxResponse{}, nil
	}}
	another := podConfig()
	another.Metadata.Attempt++
	c := &controller{pods: map[string]Sandbox{"s1": {Config: podConfig()}, "s2": {Config: another}}}
	service := retriesBefore(t, s, c)
	remove := func(ctx context.Context, id string) error {
		_, err := service.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	}
	var calls sync.WaitGroup
	call := func(id string) { calls.Go(func() { require.NoError(t, remove(t.Context(), id)) }) }

	call("s1")
	require.Equal(t, "s1", <-reached)
	call("s2")
	require.Equal(t, "s2", <-reached)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, remove(gone, "s1"), context.Canceled)
	call("s1")
	require.Empty(t, reached)
	close(release)
	calls.Wait()
	require.Equal(t, "s1", <-reached)
	require.Empty(t, service.ending.held)
}
