package plugin

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger"
)

func TestDrain(t *testing.T) {
	w := newWorld(t)
	dir := filepath.Join(t.TempDir(), "podfsm")
	require.NoError(t, w.drain.open(dir))
	service := &api{controller: w.Controller}
	reopened := func() bool {
		var d drain
		require.NoError(t, d.open(dir))
		_, draining := d.draining()
		return draining
	}
	w.run(t, "s1", named("before"))
	require.False(t, reopened())

	for range 2 {
		_, err := service.Drain(t.Context(), &podfsmv1.DrainRequest{})
		require.NoError(t, err)
	}
	require.True(t, reopened(), "a restart doesn't end it")
	err := w.Admit(t.Context(), "podfsm", podConfig(named("after")))
	require.True(t, errdefs.IsUnavailable(err))
	require.ErrorContains(t, err, "podfsm drain --cancel")
	require.True(t, errdefs.IsUnavailable(w.create(t, "s2", named("admitted before"))), "also what was admitted before")
	_, err = service.Drain(t.Context(), &podfsmv1.DrainRequest{Cancel: true})
	require.NoError(t, err)
	err = through(t, w.Controller, podConfig(named("in between"), onNode), func(ctx context.Context) error {
		_, err := service.Drain(t.Context(), &podfsmv1.DrainRequest{})
		require.NoError(t, err)
		return fmt.Errorf("failed to create sandbox %q: %w", "s3", w.Create(ctx, sandbox.Sandbox{ID: "s3"}))
	})
	require.True(t, errdefs.IsUnavailable(err))
	require.NotContains(t, err.Error(), "s3", "the kubelet is to count one event")
	list, err := service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetSandboxes(), 1)
	require.WithinDuration(t, w.drain.since, list.GetDrainingSince().AsTime(), 0)
	require.NoError(t, w.Shutdown(inCRI(t), "s1"), "sandboxes end as ever")

	for range 2 {
		_, err = service.Drain(t.Context(), &podfsmv1.DrainRequest{Cancel: true})
		require.NoError(t, err)
	}
	require.False(t, reopened())
	require.NoError(t, w.create(t, "s3", named("after")))
	list, err = service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Nil(t, list.GetDrainingSince())
}

// A pod that was let in just before is on record before the drain says that it has begun.
func TestDrainWaitsForWhoWasLetIn(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.drain.open(t.TempDir()))
	service := &api{controller: w.Controller}
	reached, release := w.book.waitAt(ledger.Begun)
	created := make(chan error, 1)
	go func() { created <- w.create(t, "s1", named("late")) }()
	<-reached

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := service.Drain(ctx, &podfsmv1.DrainRequest{})
	require.Equal(t, codes.Canceled, grpcstatus.Code(err))
	require.True(t, errdefs.IsUnavailable(w.create(t, "s2", named("later"))), "no other pod is admitted")
	list, err := service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Nil(t, list.GetDrainingSince(), "the list is not complete yet")

	drained := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := service.Drain(t.Context(), &podfsmv1.DrainRequest{})
			drained <- err
		}()
	}
	close(release)
	require.NoError(t, <-created)
	for range 2 {
		require.NoError(t, <-drained)
	}
	list, err = service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.NotNil(t, list.GetDrainingSince())
	require.Len(t, list.GetSandboxes(), 1)
}

// What can't be written isn't claimed.
func TestDrainThatCannotBeKept(t *testing.T) {
	service := &api{controller: &Controller{}}
	_, err := service.Drain(t.Context(), &podfsmv1.DrainRequest{})
	require.Equal(t, codes.Unavailable, grpcstatus.Code(err))

	file := filepath.Join(t.TempDir(), "file")
	var d drain
	require.NoError(t, d.open(file))
	require.NoError(t, os.WriteFile(file, nil, 0o600)) // where the directory should be
	require.ErrorContains(t, d.begin(t.Context()), "failed to start the drain")
	_, draining := d.draining()
	require.False(t, draining)
}
