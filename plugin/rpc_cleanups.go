package plugin

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/show"
)

// finder finds a sandbox by a reference.
type finder func(ref string, views []lifecycle.View) (lifecycle.View, error)

// RetryCleanup retries a pending cleanup now.
func (a *api) RetryCleanup(ctx context.Context, r *podfsmv1.RetryCleanupRequest) (*podfsmv1.CleanupResponse, error) {
	return a.cleanup(r.GetRef(), show.FindPending, func(engine *lifecycle.Engine, key ledger.Key) error { return engine.Retry(ctx, key) })
}

// WriteOffCleanup writes off a pending cleanup, or the DEL of one CNI plugin.
func (a *api) WriteOffCleanup(ctx context.Context, r *podfsmv1.WriteOffCleanupRequest) (*podfsmv1.CleanupResponse, error) {
	if r.GetAll() == (r.GetPlugin() != "") {
		return nil, errgrpc.ToGRPC(fmt.Errorf("name the CNI plugin whose DEL is written off, or write off all that fails: %w", errdefs.ErrInvalidArgument))
	}
	return a.cleanup(r.GetRef(), show.FindPendingExactly, func(engine *lifecycle.Engine, key ledger.Key) error {
		return engine.WriteOff(ctx, key, r.GetPlugin(), r.GetReason())
	})
}

// cleanup calls a function for the one sandbox with a pending cleanup that find returns for a
// reference.
func (a *api) cleanup(ref string, find finder, do func(*lifecycle.Engine, ledger.Key) error) (*podfsmv1.CleanupResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	pending, err := find(ref, engine.List())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	err = do(engine, pending.Key)
	if err != nil && !errors.As(err, new(*lifecycle.PendingError)) {
		return nil, errgrpc.ToGRPC(err)
	}
	after, ok := a.controller.find(pending.Key)
	if !ok {
		return nil, errgrpc.ToGRPC(fmt.Errorf("sandbox %q has ended: %w", pending.Key.ID, errdefs.ErrNotFound))
	}
	return &podfsmv1.CleanupResponse{Sandbox: show.Sandbox(after), Error: show.Text(err)}, nil
}
