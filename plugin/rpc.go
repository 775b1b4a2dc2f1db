package plugin

import (
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
)

// api is the gRPC service for the CLI, on containerd's socket.
type api struct {
	podfsmv1.UnimplementedSandboxesServer
	controller *Controller
}

// Register adds the service to containerd's gRPC server. containerd calls it after all plugins are
// loaded.
func (a *api) Register(server *grpc.Server) error {
	podfsmv1.RegisterSandboxesServer(server, a)
	a.controller.background.loaded()
	return nil
}

func (a *api) engine() (*lifecycle.Engine, error) {
	if a.controller.engine == nil {
		return nil, errgrpc.ToGRPC(a.controller.degradedError())
	}
	return a.controller.engine, nil
}
