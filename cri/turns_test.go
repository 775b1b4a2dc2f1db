package cri

import (
	"context"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Requests that end one sandbox come one after the other; those for another sandbox don't wait, and who gives up doesn't either.
func TestSandboxesAreEndedInTurns(t *testing.T) {
	reached, release := make(chan string, 4), make(chan struct{})
	s := &stock{remove: func(_ context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
		reached <- r.GetPodSandboxId()
		<-release
		return &runtime.RemovePodSandboxResponse{}, nil
	}}
	another := podConfig()
	another.Metadata.Attempt++
	c := &controller{pods: map[string]Pod{"s1": {Config: podConfig()}, "s2": {Config: another}}}
	front := newFront(t, s, c)
	remove := func(ctx context.Context, id string) error {
		_, err := front.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
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
	require.Empty(t, front.turns.taken)
}
