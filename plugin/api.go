package plugin

import (
	"cmp"
	"context"
	"slices"

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

// Register puts the service on containerd's gRPC server, which is about to serve: all plugins have been loaded.
func (a *api) Register(server *grpc.Server) error {
	podfsmv1.RegisterSandboxesServer(server, a)
	a.controller.checkAdopted()
	a.controller.examineAtStart()
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

// Leaks answers with what belongs to nobody, and removes it when asked to. What is gone afterwards is found out by looking.
func (a *api) Leaks(ctx context.Context, r *podfsmv1.LeaksRequest) (*podfsmv1.LeaksResponse, error) {
	if _, err := a.engine(); err != nil {
		return nil, err
	}
	response, err := a.leaks(ctx, r.GetFix())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}

func (a *api) leaks(ctx context.Context, fix bool) (*podfsmv1.LeaksResponse, error) {
	found, err := a.controller.leaks(ctx)
	if err != nil {
		return nil, err
	}
	left, failed := found, map[string]error{}
	if fix && len(found) > 0 {
		failed = a.controller.fix(ctx, found)
		if left, err = a.controller.leaks(ctx); err != nil {
			return nil, err
		}
	}
	response := &podfsmv1.LeaksResponse{}
	for _, thing := range found {
		leak := records.Leak(thing)
		leak.Removed = !slices.Contains(left, thing)
		if fix && !leak.Removed {
			leak.Error = cmp.Or(records.Text(failed[thing.ID]), "it is still there")
		}
		response.Leaks = append(response.Leaks, leak)
	}
	response.DamagedLedgerFiles, err = a.controller.ledger.Aside()
	return response, err
}

func (a *api) engine() (*lifecycle.Engine, error) {
	if a.controller.engine == nil {
		return nil, errgrpc.ToGRPC(a.controller.well())
	}
	return a.controller.engine, nil
}
