package plugin

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
)

// runner is a CRI service that runs pods by do.
type runner struct {
	runtime.UnimplementedRuntimeServiceServer
	runtime.UnimplementedImageServiceServer
	do func(ctx context.Context) error
}

func (r *runner) RunPodSandbox(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, r.do(ctx)
}

func (*runner) ImageStatus(context.Context, *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	return &runtime.ImageStatusResponse{Image: &runtime.Image{}}, nil
}

func (*runner) Close() error        { return nil }
func (*runner) IsInitialized() bool { return true }

// serveCRI registers services on a server and returns a connection to it.
func serveCRI(t *testing.T, register func(*grpc.Server) error) *grpc.ClientConn {
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	require.NoError(t, register(server))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	connection, err := grpc.NewClient("passthrough:///cri",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, connection.Close())
		server.Stop()
		require.NoError(t, <-served)
	})
	return connection
}

// through passes do a context as the front gives it to containerd's service for RunPodSandbox, and returns the front's answer.
func through(t *testing.T, c *Controller, config *runtime.PodSandboxConfig, do func(ctx context.Context) error) error {
	instance, err := cri.New(&runner{do: do}, c, time.Minute, cri.Streaming{})
	require.NoError(t, err)
	connection := serveCRI(t, instance.(interface{ Register(*grpc.Server) error }).Register)
	_, err = runtime.NewRuntimeServiceClient(connection).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: "podfsm"})
	return err
}
