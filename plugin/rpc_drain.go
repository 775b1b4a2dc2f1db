package plugin

import (
	"context"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// Drain starts or cancels the drain, also while podfsm is degraded.
func (a *api) Drain(ctx context.Context, r *podfsmv1.DrainRequest) (*podfsmv1.DrainResponse, error) {
	if r.GetCancel() {
		if err := a.controller.drain.end(); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		log.G(ctx).Info("drain canceled")
		return &podfsmv1.DrainResponse{}, nil
	}
	if err := a.controller.drain.begin(ctx); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	log.G(ctx).Info("drain started")
	return &podfsmv1.DrainResponse{}, nil
}
