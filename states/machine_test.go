package states

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMachineFollowsTheTable(t *testing.T) {
	for _, state := range All() {
		for _, event := range append(Events(), "vanish") {
			t.Run(fmt.Sprintf("%s/%s", state, event), func(t *testing.T) {
				m, err := NewMachine(state)
				require.NoError(t, err)
				require.Equal(t, state, m.Current())

				want, legal := expected[state][event]
				require.Equal(t, legal, m.Can(event))
				got, err := m.Fire(t.Context(), event)
				if !legal {
					want = state
					require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
					require.ErrorContains(t, err, fmt.Sprintf("%q", state))
					require.ErrorContains(t, err, fmt.Sprintf("%q", event))
				} else {
					require.NoError(t, err)
				}
				require.Equal(t, want, got)
				require.Equal(t, want, m.Current())
			})
		}
	}
}

func TestMachineRefusesUnknownState(t *testing.T) {
	for _, initial := range []State{"", "Nowhere", "ready", anyState} {
		_, err := NewMachine(initial)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, fmt.Sprintf("%q", initial))
	}
}

// looplab/fsm v1.0.3 given a cancelled context stays "in transition" for good:
// every later event fails, and Can is always false.
func TestCancelledContextDoesNotWedge(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m, err := NewMachine(New)
	require.NoError(t, err)
	for _, event := range CreationPath() {
		_, err := m.Fire(ctx, event)
		require.NoError(t, err)
	}
	require.Equal(t, Ready, m.Current())
}

func TestRefusedEventDoesNotWedge(t *testing.T) {
	m, err := NewMachine(New)
	require.NoError(t, err)
	_, err = m.Fire(t.Context(), DeclareReady)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	got, err := m.Fire(t.Context(), AllocateIDs)
	require.NoError(t, err)
	require.Equal(t, IDsAllocated, got)
}

func TestOneOfManyConcurrentFiresWins(t *testing.T) {
	m, err := NewMachine(Ready)
	require.NoError(t, err)
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			state, err := m.Fire(t.Context(), Stop)
			assert.Equal(t, Stopping, state)
			if err == nil {
				won.Add(1)
				return
			}
			assert.ErrorContains(t, err, `"Stopping"`, "the error names the state that refused the event")
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, won.Load())
	require.Equal(t, Stopping, m.Current())
}
