package plugin

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// gone is a sandbox that ended some time ago.
func gone(id string, ago time.Duration) lifecycle.View {
	return lifecycle.View{
		Key: ledger.Key{Namespace: "k8s.io", ID: id}, Spec: &Spec{Config: &runtime.PodSandboxConfig{}},
		State: states.Removed, Since: time.Now().Add(-ago),
	}
}

// slowDisk takes nothing until it is ready.
type slowDisk struct {
	ready <-chan struct{}

	mu   sync.Mutex
	kept []*podfsmv1.InspectResponse
}

// closed makes a disk that is ready.
var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

func (d *slowDisk) Add(ended *podfsmv1.InspectResponse) error {
	<-d.ready
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kept = append(d.kept, ended)
	return nil
}

func (d *slowDisk) Read() ([]*podfsmv1.InspectResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.kept), nil
}

// No event of a sandbox waits for the disk, and operators see what waits for it.
func TestSlowHistoryHoldsUpNothing(t *testing.T) {
	w := newWorld(t)
	ready := make(chan struct{})
	disk := &slowDisk{ready: ready}
	w.ended = newEnded(disk)
	for _, id := range []string{"s1", "s2"} {
		w.run(t, id)
		require.NoError(t, w.Shutdown(inCRI(t), id))
	}
	service := &api{controller: w.Controller}
	shown := func() (ids []string) {
		response, err := service.List(t.Context(), &podfsmv1.ListRequest{Ended: true})
		require.NoError(t, err)
		for _, s := range response.GetSandboxes() {
			ids = append(ids, s.GetId()+" "+s.GetState())
		}
		return ids
	}
	require.Empty(t, disk.kept)
	require.Equal(t, []string{"s1 Removed", "s2 Removed"}, shown())

	close(ready)
	require.NoError(t, w.Close())
	kept, err := disk.Read()
	require.NoError(t, err)
	require.Len(t, kept, 2, "a stop waits for the disk")
	require.Equal(t, []string{"s1 Removed", "s2 Removed"}, shown(), "each once")
}

// A disk that hangs costs no more than a bounded number of sandboxes, and a stop of the daemon does not wait for it forever.
func TestHistoryOnADiskThatHangs(t *testing.T) {
	ready := make(chan struct{})
	disk := &slowDisk{ready: ready}
	e := newEnded(disk)
	for i := range 3 * maxEnded {
		e.add(gone(fmt.Sprint("s", i), 0))
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	e.writing.flush(ctx)
	require.Error(t, ctx.Err())
	shown, err := e.read()
	require.NoError(t, err)
	require.Len(t, shown, maxEnded)
	close(ready)
	e.writing.flush(t.Context())
	require.InDelta(t, maxEnded, len(disk.kept), 1, "what waits, and the one that was being written")
}

func TestEndedSandboxesAreKeptUpToABound(t *testing.T) {
	e := newEnded(&slowDisk{ready: closed})
	for i := range maxEnded + 1 {
		e.add(gone(fmt.Sprint("s", i), time.Duration(maxEnded-i)*time.Minute))
	}
	_, ok := e.find(gone("s0", 0).Key)
	require.False(t, ok)
	view, ok := e.find(gone("s1", 0).Key)
	require.True(t, ok)
	require.Equal(t, "s1", view.Key.ID)
	require.Len(t, e.within(time.Hour*24), maxEnded)
	require.Equal(t, []ledger.Key{gone(fmt.Sprint("s", maxEnded), 0).Key}, e.within(30*time.Second))
}
