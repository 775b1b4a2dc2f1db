package cri

import (
	"errors"
	"fmt"
	"io"
	"time"

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

// server is the front as a plugin instance. Who takes the instance to call the CRI in the same process comes to the front, too.
type server struct {
	*service
	runtime.ImageServiceServer
	stock io.Closer
}

// Close ends what the front serves itself and the creations that are under way, then containerd's service.
func (s *server) Close() error { return errors.Join(s.close(), s.stock.Close()) }

// IsInitialized says whether containerd's service serves yet.
func (s *server) IsInitialized() bool { return s.initialized() }

// serverWithTCP is the front where containerd's instance serves TCP, too.
type serverWithTCP struct {
	*server
}

// New puts the front on instance, which is containerd's CRI plugin. What it returns registers the CRI on containerd's
// servers in its place. unclaimed is how long a finished sandbox waits for somebody to claim it. Streams are served as streaming says,
// which is containerd's own configuration.
func New(instance any, sandboxes Sandboxes, unclaimed time.Duration, streaming Streaming) (any, error) {
	in, ok := instance.(inner)
	if !ok {
		return nil, fmt.Errorf("this containerd's CRI plugin is a %T, which podfsm doesn't know how to stand in front of: %w", instance, errdefs.ErrNotImplemented)
	}
	front := newService(in, sandboxes, unclaimed, streaming)
	for _, id := range sandboxes.Unclaimed() {
		front.expireAfter(unclaimed, id)
	}
	s := &server{service: front, ImageServiceServer: in, stock: in}
	if _, ok := instance.(tcpRegistrar); ok {
		return serverWithTCP{s}, nil
	}
	return s, nil
}

func newService(in inner, sandboxes Sandboxes, unclaimed time.Duration, streaming Streaming) *service {
	return &service{
		RuntimeServiceServer: in,
		images:               in,
		sandboxes:            sandboxes,
		creations:            newCreations(unclaimed),
		streams:              newStreams(streaming, sandboxes.Pod),
		initialized:          in.IsInitialized,
		turns:                turns{taken: map[attempt]chan struct{}{}},
	}
}

// close ends what the front serves itself, and waits for the creations that are under way to be rolled back.
func (s *service) close() error {
	err := s.streams.close()
	s.endCreations()
	return err
}

// Register puts the CRI on containerd's socket.
func (s *server) Register(g *grpc.Server) error {
	g.RegisterService(instrumented(runtime.RuntimeService_ServiceDesc, s.initialized), s.service)
	g.RegisterService(instrumented(runtime.ImageService_ServiceDesc, s.initialized), s.ImageServiceServer)
	return nil
}

// RegisterTCP puts the CRI on containerd's TCP server.
func (s serverWithTCP) RegisterTCP(g *grpc.Server) error { return s.Register(g) }
