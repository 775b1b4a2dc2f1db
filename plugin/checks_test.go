package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/states"
)

// All adopted sandboxes are checked, few at a time and with rests between them, and what is wrong with one is seen.
func TestCheckAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		const pods = 20
		for i := range pods {
			w.run(t, fmt.Sprintf("pod%d", i), named(fmt.Sprintf("pod%d", i)))
		}
		require.NoError(t, w.Controller.Stop(inCRI(t), "pod0"))
		var now, most, all atomic.Int64
		w.host.check = func(_ context.Context, id string) error {
			all.Add(1)
			if running := now.Add(1); running > most.Load() {
				most.Store(running)
			}
			time.Sleep(time.Second)
			now.Add(-1)
			if id == "pod7" {
				return errors.New("its route is gone")
			}
			return nil
		}
		begun := time.Now()
		w.checkAdopted(t.Context())
		require.Equal(t, 20*time.Second, time.Since(begun), "half of the time they rest")
		require.EqualValues(t, pods-1, all.Load())
		require.EqualValues(t, checkParallel, most.Load())
		require.ErrorContains(t, w.view(t, "pod7").Err, "its route is gone")
		require.Equal(t, states.Ready, w.view(t, "pod7").State)
		require.NoError(t, w.view(t, "pod8").Err)
		require.NoError(t, w.Close())
	})
}

// containerd's stop ends them at once.
func TestCheckAdoptedEnds(t *testing.T) {
	w := newWorld(t)
	for _, id := range []string{"pod1", "pod2", "pod3"} {
		w.run(t, id, named(id))
	}
	reached := make(chan struct{}, 3)
	w.host.check = func(ctx context.Context, _ string) error {
		reached <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	w.background.release = func() {}
	w.startBackground()
	w.background.end()
	<-reached
	<-reached
	require.NoError(t, w.Close())
	require.Empty(t, reached)
}

// Pins are looked at every ten seconds until containerd stops. Where one can't be made again, the tries come less and less often.
func TestWatchPins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t) // whose pods have no pins
		w.run(t, "well", named("well"))
		w.run(t, "sick", named("sick"))
		w.run(t, "stopped", named("stopped"))
		require.NoError(t, w.Controller.Stop(inCRI(t), "stopped"))
		tries := map[string][]time.Time{}
		w.host.pin = func(id string) error {
			tries[id] = append(tries[id], time.Now())
			if id == "sick" {
				return errNoLuck
			}
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		begun := time.Now()
		go func() {
			defer close(ended)
			w.watchPins(ctx)
		}()
		time.Sleep(20*time.Minute + time.Second)
		cancel()
		<-ended
		require.Len(t, tries["well"], 120)
		require.Equal(t, pinInterval, tries["well"][0].Sub(begun))
		require.Empty(t, tries["stopped"])
		sick := tries["sick"]
		require.Greater(t, len(sick), 8)
		require.Less(t, len(sick), 16)
		require.GreaterOrEqual(t, sick[len(sick)-1].Sub(sick[len(sick)-2]), 4*time.Minute)
		require.NoError(t, w.Close())
	})
}
