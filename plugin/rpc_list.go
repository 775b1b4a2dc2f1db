package plugin

import (
	"context"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

// List returns all sandboxes that have not ended, and on request the ended ones.
func (a *api) List(_ context.Context, r *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	var ended []*podfsmv1.InspectResponse
	if r.GetEnded() {
		if ended, err = a.controller.ended.read(); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	since, draining := a.controller.drain.settledSince() // before the list, or a pod admitted in between would be missing
	response := show.List(engine.List(), ended...)
	if draining {
		response.DrainingSince = timestamppb.New(since)
	}
	return response, nil
}

// Inspect returns all details of one sandbox, also of one that has recently ended.
func (a *api) Inspect(_ context.Context, r *podfsmv1.InspectRequest) (*podfsmv1.InspectResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	response, err := show.Inspect(r.GetRef(), engine.List(), a.controller.ended.read)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}
