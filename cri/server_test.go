package cri

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/records"
)

// stockWithTCP stands for a CRI service whose TCP service isn't disabled.
type stockWithTCP struct{ *stock }

func (stockWithTCP) RegisterTCP(*grpc.Server) error { panic("the front registers itself") }

// registrar is containerd's interface of plugins that serve gRPC.
type registrar interface {
	Register(*grpc.Server) error
}

type initializer interface{ IsInitialized() bool }

// serve registers the CRI on a server and returns a connection to it.
func serve(t *testing.T, register func(*grpc.Server) error) *grpc.ClientConn {
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

func TestNewRefusesWhatItDoesNotKnow(t *testing.T) {
	for name, instance := range map[string]any{
		"nothing":           nil,
		"another type":      "cri",
		"the runtime alone": struct{ runtime.RuntimeServiceServer }{&stock{}},
		"without Close": struct {
			runtime.RuntimeServiceServer
			runtime.ImageServiceServer
			initializer
		}{&stock{}, &stock{}, &stock{}},
	} {
		t.Run(name, func(t *testing.T) {
			front, err := New(instance, &controller{}, time.Hour, Streaming{})
			require.True(t, errdefs.IsNotImplemented(err), "%v", err)
			require.Nil(t, front)
		})
	}
}

func TestFrontCanWhatContainerdsServiceCan(t *testing.T) {
	s := &stock{}
	front, err := New(s, &controller{}, time.Hour, Streaming{})
	require.NoError(t, err)
	require.Implements(t, (*registrar)(nil), front)
	_, tcp := front.(tcpRegistrar)
	require.False(t, tcp, "containerd would serve TCP though it is disabled")

	require.True(t, front.(initializer).IsInitialized())
	require.NoError(t, front.(io.Closer).Close())
	require.Equal(t, 1, s.closed)

	front, err = New(stockWithTCP{s}, &controller{}, time.Hour, Streaming{})
	require.NoError(t, err)
	require.Implements(t, (*registrar)(nil), front)
	require.Implements(t, (*tcpRegistrar)(nil), front)
	require.NoError(t, front.(io.Closer).Close())
	require.Equal(t, 2, s.closed)
}

// Who takes the plugin's instance to call it, as another plugin in the same daemon may, must come to the front, too.
func TestInstanceItselfIsTheFront(t *testing.T) {
	s := &stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		return nil, errors.New("past the front")
	}}
	front, err := New(s, &controller{}, time.Hour, Streaming{})
	require.NoError(t, err)
	_, err = front.(runtime.RuntimeServiceServer).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{RuntimeHandler: "nobody's"})
	require.ErrorIs(t, err, errUnknownHandler)
}

func TestServe(t *testing.T) {
	s := &stock{listed: []string{"s1"}}
	s.run = func(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		namespace, err := namespaces.NamespaceRequired(ctx)
		require.NoError(t, err)
		require.Equal(t, Namespace, namespace)
		require.True(t, records.OnNodeNetwork(r.GetConfig()))
		FromContext(ctx).SandboxID = "s1"
		return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
	}
	s.pull = func(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
		namespace, err := namespaces.NamespaceRequired(ctx)
		require.NoError(t, err)
		require.Equal(t, Namespace, namespace)
		return &runtime.PullImageResponse{ImageRef: r.GetImage().GetImage()}, nil
	}
	s.status = func(context.Context, *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
		return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Id: "s1"}}, nil
	}
	s.events = func(_ *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
		namespace, err := namespaces.NamespaceRequired(stream.Context())
		require.NoError(t, err)
		require.Equal(t, Namespace, namespace)
		return stream.Send(&runtime.ContainerEventResponse{PodSandboxStatus: &runtime.PodSandboxStatus{Id: "s1"}})
	}
	pod := Pod{Config: podConfig(), IP: "10.0.0.2"}
	front, err := New(stockWithTCP{s}, &controller{pods: map[string]Pod{"s1": pod}}, time.Hour, Streaming{})
	require.NoError(t, err)

	for name, register := range map[string]func(*grpc.Server) error{
		"socket": front.(registrar).Register,
		"TCP":    front.(tcpRegistrar).RegisterTCP,
	} {
		t.Run(name, func(t *testing.T) {
			connection := serve(t, register)
			pods, images := runtime.NewRuntimeServiceClient(connection), runtime.NewImageServiceClient(connection)

			s.uninitialized = true
			_, err := pods.Version(t.Context(), &runtime.VersionRequest{})
			require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
			s.uninitialized = false
			_, err = pods.Version(t.Context(), &runtime.VersionRequest{})
			require.Equal(t, codes.Unimplemented, status.Code(err), "%v", err)

			ran, err := pods.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "podfsm"})
			require.NoError(t, err)
			require.Equal(t, "s1", ran.GetPodSandboxId())
			_, err = pods.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "nobody's"})
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
			_, err = pods.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: "s1"})
			require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
			require.Contains(t, status.Convert(err).Message(), "default/web")

			got, err := pods.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: "s1"})
			require.NoError(t, err)
			require.Equal(t, pod.IP, got.GetStatus().GetNetwork().GetIp())

			stream, err := pods.GetContainerEvents(t.Context(), &runtime.GetEventsRequest{})
			require.NoError(t, err)
			event, err := stream.Recv()
			require.NoError(t, err)
			require.Equal(t, pod.IP, event.GetPodSandboxStatus().GetNetwork().GetIp())
			_, err = stream.Recv()
			require.ErrorIs(t, err, io.EOF)

			pulled, err := images.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "busybox"}})
			require.NoError(t, err)
			require.Equal(t, "busybox", pulled.GetImageRef())
		})
	}
}
