package plugin

import (
	"context"

	"github.com/containerd/errdefs/pkg/errgrpc"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

// Doctor examines the node.
func (a *api) Doctor(ctx context.Context, _ *podfsmv1.DoctorRequest) (*podfsmv1.DoctorResponse, error) {
	if a.controller.doctor == nil {
		return nil, errgrpc.ToGRPC(a.controller.degradedError())
	}
	return show.Examination(a.controller.doctor.Examine(ctx)), nil
}
