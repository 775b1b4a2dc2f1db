package plugin

import (
	"context"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
)

// api is the gRPC service for the CLI, on containerd's socket.
type api struct {
	podfsmv1.UnimplementedSandboxesServer
	controller *Controller
}

// Register puts the service on containerd's gRPC server.
func (a *api) Register(server *grpc.Server) error {
	podfsmv1.RegisterSandboxesServer(server, a)
	return nil
}

// List answers with every sandbox that hasn't ended.
func (a *api) List(context.Context, *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	return records.List(engine.List()), nil
}

// Inspect answers with all there is to know of one sandbox, also one that ended not long ago.
func (a *api) Inspect(_ context.Context, r *podfsmv1.InspectRequest) (*podfsmv1.InspectResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	view, err := records.Find(r.GetRef(), engine.List(), engine.Finished())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	response, err := records.Inspection(view)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}

func (a *api) engine() (*lifecycle.Engine, error) {
	if a.controller.engine == nil {
		return nil, errgrpc.ToGRPC(a.controller.well())
	}
	return a.controller.engine, nil
}
