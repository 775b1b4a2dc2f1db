package states

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// in returns a machine in a state, which may be another release's.
func in(t testing.TB, state State) *Machine {
	m := table.NewMachine()
	if state != New {
		require.NoError(t, m.Take(Transition{"Elsewhere", "move", state}, false))
	}
	return m
}

func TestMachineFollowsTheTable(t *testing.T) {
	for _, state := range table.States() {
		for _, event := range append(table.Events(), "vanish") {
			t.Run(fmt.Sprintf("%s/%s", state, event), func(t *testing.T) {
				m := in(t, state)
				require.Equal(t, state, m.Current())
				require.True(t, m.table.knows(m.Current()))
				require.Equal(t, slices.Contains(table.PathStates(), state) && state != Ready, m.Creating())

				want, legal := expected[state][event]
				require.Equal(t, legal, m.Can(event))
				next, ok := m.Next(event)
				require.Equal(t, legal, ok)
				require.Equal(t, want, next)
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

// With a cancelled context, looplab/fsm v1.0.3 stays "in transition" forever: every later event
// fails, and Can is always false.
func TestCancelledContextDoesNotWedge(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m := table.NewMachine()
	for _, event := range table.Path() {
		_, err := m.Fire(ctx, event)
		require.NoError(t, err)
	}
	require.Equal(t, Ready, m.Current())
}

func TestRefusedEventDoesNotWedge(t *testing.T) {
	m := table.NewMachine()
	_, err := m.Fire(t.Context(), "declare_ready")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	got, err := m.Fire(t.Context(), "allocate_ids")
	require.NoError(t, err)
	require.Equal(t, idsAllocated, got)
}

func TestOneOfManyConcurrentFiresWins(t *testing.T) {
	m := in(t, Ready)
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

// Take makes a recorded transition between known names if the table has it, or if a release with
// another order of the steps could have made it. Any other transition is damage.
func TestMachineTakesWhatTheTableAllows(t *testing.T) {
	path := table.PathStates()
	for _, from := range table.States() {
		for _, event := range table.Events() {
			for _, to := range table.States() {
				for _, step := range []bool{true, false} {
					next, ok := expected[from][event]
					legal := ok && next == to
					if step && slices.Contains(table.Path(), event) {
						legal = legal || from != Ready && from != to && to != New && slices.Contains(path, from) && slices.Contains(path, to)
					}
					m := table.NewMachine()
					err := m.Take(Transition{from, event, to}, step)
					if !legal {
						require.ErrorIs(t, err, errdefs.ErrDataLoss, "%s %s %s", from, event, to)
						require.Equal(t, New, m.Current())
						continue
					}
					require.NoError(t, err, "%s %s %s", from, event, to)
					require.Equal(t, to, m.Current())
				}
			}
		}
	}
}

// Take makes a transition with names of another release as recorded, and there is a way out of the
// state to which it leads.
func TestMachineTakesWhatItDoesntKnow(t *testing.T) {
	for _, tc := range []struct {
		made     Transition
		step     bool
		creating bool
		ways     []Transition
	}{
		{Transition{idsAllocated, "label_pod", "Labelled"}, true, true, []Transition{{"Labelled", RollBack, RollingBack}, {"Labelled", Quarantine, Quarantined}}},
		{Transition{"Labelled", "start_pause", pauseStarted}, true, true, []Transition{{pauseStarted, RollBack, RollingBack}, {pauseStarted, "attach_network", networkReady}, {pauseStarted, Quarantine, Quarantined}}},
		{Transition{"Labelled", "open_gate", Ready}, true, false, []Transition{{Ready, LosePause, NotReady}, {Ready, Stop, Stopping}, {Ready, Quarantine, Quarantined}}},
		{Transition{Ready, "freeze", "Frozen"}, false, false, []Transition{{"Frozen", Stop, Stopping}, {"Frozen", Quarantine, Quarantined}}},
		{Transition{Ready, "wind_up", Stopped}, false, false, []Transition{{Stopped, Remove, Removing}, {Stopped, Quarantine, Quarantined}}},
	} {
		t.Run(string(tc.made.Event), func(t *testing.T) {
			m := table.NewMachine()
			require.NoError(t, m.Take(tc.made, tc.step))
			require.Equal(t, tc.made.To, m.Current())
			require.Equal(t, tc.creating, m.Creating())
			var ways []Transition
			for _, event := range append(table.Events(), "vanish") {
				if to, ok := m.Next(event); ok {
					require.True(t, m.Can(event))
					ways = append(ways, Transition{m.Current(), event, to})
				} else {
					require.False(t, m.Can(event))
				}
			}
			require.ElementsMatch(t, tc.ways, ways)
			to, err := m.Fire(t.Context(), tc.ways[0].Event)
			require.NoError(t, err)
			require.Equal(t, tc.ways[0].To, to)
			require.True(t, m.table.knows(m.Current()))
		})
	}
}

func TestMachineTakesNoHalfTransition(t *testing.T) {
	for _, half := range []Transition{{}, {New, "", idsAllocated}, {"", "allocate_ids", idsAllocated}, {New, "allocate_ids", ""}} {
		require.ErrorIs(t, table.NewMachine().Take(half, true), errdefs.ErrDataLoss)
	}
}
