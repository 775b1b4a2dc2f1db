package cri

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/lifecycle"
)

func TestUnclaimedIsDiscarded(t *testing.T) {
	spans := recordSpans(t)
	removed := make(chan string, 10)
	tries := 0
	c := &controller{
		pods:      map[string]Sandbox{"s0": {Config: podConfig()}, "s1": {Config: podConfig()}},
		claims:    map[string]lifecycle.Claim{"s1": lifecycle.Shown},
		unclaimed: []string{"s0", "s1", "forgotten"},
		remove: func(_ context.Context, id string) error {
			switch tries++; tries {
			case 1:
				return errors.New("DEL failed")
			case 2:
				panic("a bug")
			}
			removed <- id
			return nil
		},
	}
	s := &stock{}
	stopAndRemove["stop"].serve(s, nothing)
	stopAndRemove["remove"].serve(s, nothing)
	in := &instance{s, s, s, s}
	require.NoError(t, Install(in, c, time.Millisecond, Streaming{}))
	service := in.RuntimeServiceServer.(*retries)
	select {
	case id := <-removed:
		require.Equal(t, "s0", id, "at the third try")
	case <-time.After(soon):
		t.Fatal("nothing is discarded")
	}
	require.NoError(t, service.Close())
	require.Empty(t, removed)
	require.False(t, service.show(t.Context(), "s0"))
	require.True(t, service.show(t.Context(), "s1"))
	var names []string
	for _, span := range spans.Ended() {
		names = append(names, span.Name())
	}
	try := []string{"podfsm.sandbox.stop", "podfsm.sandbox.remove", "podfsm.sandbox.discard"}
	require.Equal(t, slices.Repeat(try, 3), names)
	require.Equal(t, []RetryEvent{PodUnclaimed}, c.events(), "once, when it is gone")
}

// containerd's service can't stop a sandbox before it serves, which is after the front was installed.
func TestDiscardWaitsForContainerdsService(t *testing.T) {
	c := &controller{pods: map[string]Sandbox{"s0": {Config: podConfig()}}}
	s := endable(&stock{uninitialized: true}, c)
	service := newRetries(s, c, s.IsInitialized, time.Hour)
	service.discardUnclaimed("s0")
	require.Empty(t, c.calls)
	require.Contains(t, service.timers, "s0")
	require.NoError(t, service.Close())
}
