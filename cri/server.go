package cri

import (
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// inner is what containerd's CRI plugin instance can do, besides registering itself.
type inner interface {
	runtime.RuntimeServiceServer
	runtime.ImageServiceServer
	io.Closer
	IsInitialized() bool
}

// tcpRegistrar is the interface of containerd's server for plugins that also serve TCP.
type tcpRegistrar interface {
	RegisterTCP(*grpc.Server) error
}

// server is the front as a plugin instance.
type server struct {
	inner
	runtime runtime.RuntimeServiceServer
}

// serverWithTCP is the front where containerd's instance serves TCP, too.
type serverWithTCP struct {
	*server
}

// New puts the front on instance, which is containerd's CRI plugin. What it returns registers the CRI on containerd's
// servers in its place.
func New(instance any, sandboxes Sandboxes) (any, error) {
	in, ok := instance.(inner)
	if !ok {
		return nil, fmt.Errorf("this containerd's CRI plugin is a %T, which podfsm doesn't know how to stand in front of: %w", instance, errdefs.ErrNotImplemented)
	}
	s := &server{inner: in, runtime: &service{RuntimeServiceServer: in, sandboxes: sandboxes}}
	if _, ok := instance.(tcpRegistrar); ok {
		return serverWithTCP{s}, nil
	}
	return s, nil
}

// Register puts the CRI on containerd's socket.
func (s *server) Register(g *grpc.Server) error {
	g.RegisterService(instrumented(runtime.RuntimeService_ServiceDesc, s.IsInitialized), s.runtime)
	g.RegisterService(instrumented(runtime.ImageService_ServiceDesc, s.IsInitialized), s.inner)
	return nil
}

// RegisterTCP puts the CRI on containerd's TCP server.
func (s serverWithTCP) RegisterTCP(g *grpc.Server) error { return s.Register(g) }
