package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pipe is a server stream that carries nothing but its context.
type pipe struct {
	grpc.ServerStream
	ctx context.Context
}

func (p *pipe) Context() context.Context { return p.ctx }
func (*pipe) RecvMsg(any) error          { return nil }
func (*pipe) SendMsg(any) error          { return nil }

func decodeNothing(any) error { return nil }

// callAll calls every method of the CRI by its handler and returns the gRPC code of each.
func callAll(ctx context.Context, initialized func() bool, srv any) map[string]codes.Code {
	answers := map[string]codes.Code{}
	for _, desc := range []grpc.ServiceDesc{runtime.RuntimeService_ServiceDesc, runtime.ImageService_ServiceDesc} {
		wrapped := instrumented(desc, initialized)
		for _, method := range wrapped.Methods {
			_, err := method.Handler(srv, ctx, decodeNothing, nil)
			answers[method.MethodName] = status.Code(err)
		}
		for _, stream := range wrapped.Streams {
			answers[stream.StreamName] = status.Code(stream.Handler(srv, &pipe{ctx: ctx}))
		}
	}
	return answers
}

// unimplemented is a CRI of which every method is reached, and nothing else.
type unimplemented struct {
	runtime.UnimplementedRuntimeServiceServer
	runtime.UnimplementedImageServiceServer
}

func TestEveryMethodIsInstrumented(t *testing.T) {
	all := len(runtime.RuntimeService_ServiceDesc.Methods) + len(runtime.RuntimeService_ServiceDesc.Streams) +
		len(runtime.ImageService_ServiceDesc.Methods) + len(runtime.ImageService_ServiceDesc.Streams)
	require.Greater(t, all, 40)
	for code, initialized := range map[codes.Code]bool{codes.Unavailable: false, codes.Unimplemented: true} {
		answers := callAll(t.Context(), func() bool { return initialized }, unimplemented{})
		require.Len(t, answers, all)
		for method, got := range answers {
			require.Equal(t, code, got, method)
		}
	}
}

// The descriptors are cri-api's own: they belong to all servers of the process.
func TestDescriptorsAreNotChanged(t *testing.T) {
	before := slices.Clone(runtime.RuntimeService_ServiceDesc.Methods)
	wrapped := instrumented(runtime.RuntimeService_ServiceDesc, func() bool { return false })
	require.Equal(t, runtime.RuntimeService_ServiceDesc.ServiceName, wrapped.ServiceName)
	require.Equal(t, runtime.RuntimeService_ServiceDesc.HandlerType, wrapped.HandlerType)
	require.NotSame(t, &runtime.RuntimeService_ServiceDesc, wrapped)
	for i, method := range runtime.RuntimeService_ServiceDesc.Methods {
		require.Equal(t, before[i].MethodName, method.MethodName)
		_, err := method.Handler(unimplemented{}, t.Context(), decodeNothing, nil)
		require.Equal(t, codes.Unimplemented, status.Code(err))
	}
}

// one is the description of a service with one method and one stream.
func one(call func(ctx context.Context) error) grpc.ServiceDesc {
	return grpc.ServiceDesc{
		ServiceName: "test",
		Methods: []grpc.MethodDesc{{
			MethodName: "Call",
			Handler: func(srv any, ctx context.Context, _ func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
				info := &grpc.UnaryServerInfo{Server: srv, FullMethod: "/test/Call"}
				return interceptor(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: "s1"}, info, func(ctx context.Context, _ any) (any, error) {
					return "answer", call(ctx)
				})
			},
		}},
		Streams: []grpc.StreamDesc{{
			StreamName: "Stream",
			Handler:    func(_ any, stream grpc.ServerStream) error { return call(stream.Context()) },
		}},
	}
}

func yes() bool { return true }

func TestErrorsBecomeGRPCCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{errors.New("plain"), codes.Unknown},
		{errdefs.ErrInvalidArgument, codes.InvalidArgument},
		{errdefs.ErrNotFound, codes.NotFound},
		{errdefs.ErrAlreadyExists, codes.AlreadyExists},
		{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
		{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
		{errdefs.ErrUnavailable, codes.Unavailable},
		{errdefs.ErrNotImplemented, codes.Unimplemented},
		{errdefs.ErrAborted, codes.Aborted},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{status.Error(codes.DataLoss, "already gRPC's"), codes.DataLoss},
	} {
		t.Run(tc.want.String(), func(t *testing.T) {
			err := tc.err
			if err != nil && status.Code(err) == codes.Unknown {
				err = fmt.Errorf("failed to stop: %w", err)
			}
			desc := instrumented(one(func(context.Context) error { return err }), yes)

			answer, got := desc.Methods[0].Handler(nil, t.Context(), decodeNothing, nil)
			require.Equal(t, tc.want, status.Code(got))
			require.Equal(t, "answer", answer)
			require.Equal(t, tc.want, status.Code(desc.Streams[0].Handler(nil, &pipe{ctx: t.Context()})))
			if err != nil {
				require.Contains(t, got.Error(), status.Convert(err).Message())
			}
		})
	}
}

func TestNamespace(t *testing.T) {
	called := 0
	desc := instrumented(one(func(ctx context.Context) error {
		called++
		namespace, err := namespaces.NamespaceRequired(ctx)
		require.NoError(t, err)
		require.Equal(t, "k8s.io", namespace)
		require.Equal(t, "caller", ctx.Value(valueKey{}))
		return nil
	}), yes)
	ctx := namespaces.WithNamespace(context.WithValue(t.Context(), valueKey{}, "caller"), "another")
	_, err := desc.Methods[0].Handler(nil, ctx, decodeNothing, nil)
	require.NoError(t, err)
	require.NoError(t, desc.Streams[0].Handler(nil, &pipe{ctx: ctx}))
	require.Equal(t, 2, called)
}

// The server's own interceptors stay outermost: they see the error as the client does.
func TestOuterInterceptor(t *testing.T) {
	failed := fmt.Errorf("failed: %w", errdefs.ErrNotFound)
	desc := instrumented(one(func(ctx context.Context) error {
		require.Equal(t, "outer", ctx.Value(valueKey{}))
		return failed
	}), yes)
	seen := codes.OK
	outer := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		require.Equal(t, "s1", req.(*runtime.StopPodSandboxRequest).GetPodSandboxId())
		require.Equal(t, "/test/Call", info.FullMethod)
		answer, err := next(context.WithValue(ctx, valueKey{}, "outer"), req)
		seen = status.Code(err)
		return answer, err
	}
	_, err := desc.Methods[0].Handler(nil, t.Context(), decodeNothing, outer)
	require.Equal(t, codes.NotFound, seen)
	require.Equal(t, codes.NotFound, status.Code(err))
}

// logged collects what is logged with the context.
func logged(ctx context.Context) (context.Context, *bytes.Buffer) {
	var out bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&out)
	logger.SetLevel(logrus.TraceLevel)
	return log.WithLogger(ctx, logrus.NewEntry(logger)), &out
}

// Who reads the log can't use the URLs of streams.
func TestTicketsStayOutOfTheLog(t *testing.T) {
	const ticket = "http://127.0.0.1:1/portforward/hunter2"
	for method, response := range map[string]any{
		"PortForward": &runtime.PortForwardResponse{Url: ticket},
		"Exec":        &runtime.ExecResponse{Url: ticket},
		"Attach":      &runtime.AttachResponse{Url: ticket},
	} {
		ctx, out := logged(t.Context())
		_, err := answer(ctx, method, &runtime.PortForwardRequest{PodSandboxId: "s1"}, func(context.Context, any) (any, error) { return response, nil })
		require.NoError(t, err)
		require.Contains(t, out.String(), method+" succeeded")
		require.NotContains(t, out.String(), "hunter2")
	}
}

func TestRequestLog(t *testing.T) {
	for name, tc := range map[string]struct {
		method   string
		request  any
		response any
		err      error
		want     []string
		never    []string
	}{
		"run": {
			method: "RunPodSandbox", request: &runtime.RunPodSandboxRequest{Config: podConfig()},
			response: &runtime.RunPodSandboxResponse{PodSandboxId: "s1"},
			want:     []string{"level=info", "RunPodSandbox succeeded", "sandbox=s1", "web"},
			never:    []string{"note"},
		},
		"failure": {
			method: "StopPodSandbox", request: &runtime.StopPodSandboxRequest{PodSandboxId: "s1"}, response: (*runtime.StopPodSandboxResponse)(nil),
			err: errors.New("no luck"), want: []string{"level=error", "StopPodSandbox failed", "no luck", "request=s1"},
		},
		"polling": {
			method: "PodSandboxStatus", request: &runtime.PodSandboxStatusRequest{PodSandboxId: "s1"},
			response: &runtime.PodSandboxStatusResponse{}, want: []string{"level=trace"}, never: []string{"level=info", "level=debug"},
		},
		"credentials": {
			method: "PullImage", request: &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "busybox"}, Auth: &runtime.AuthConfig{Password: "hunter2"}},
			response: &runtime.PullImageResponse{}, want: []string{"busybox"}, never: []string{"hunter2"},
		},
		"environment": {
			method: "CreateContainer",
			request: &runtime.CreateContainerRequest{PodSandboxId: "s1", Config: &runtime.ContainerConfig{
				Metadata: &runtime.ContainerMetadata{Name: "app"}, Envs: []*runtime.KeyValue{{Key: "TOKEN", Value: []byte("hunter2")}},
			}},
			response: &runtime.CreateContainerResponse{ContainerId: "c1"},
			want:     []string{"s1", "app", "container=c1"}, never: []string{"hunter2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, out := logged(t.Context())
			response, err := answer(ctx, tc.method, tc.request, func(context.Context, any) (any, error) { return tc.response, tc.err })
			require.Equal(t, tc.err == nil, err == nil)
			require.Equal(t, tc.response, response)
			for _, want := range tc.want {
				require.Contains(t, out.String(), want)
			}
			for _, never := range tc.never {
				require.NotContains(t, out.String(), never)
			}
		})
	}
}

// Registries put tokens into the URLs that they redirect to. containerd's own instrumentation takes them out of the errors of
// the image service, in the log and in the answer, which the kubelet makes an event of.
func TestTokensInURLsStayInside(t *testing.T) {
	failed := fmt.Errorf("failed to pull: %w", &url.Error{
		Op: "Get", URL: "https://blobs.example/layer?sig=hunter2&se=tomorrow", Err: errors.New("connection reset"),
	})
	for _, method := range []string{"PullImage", "ListImages", "ImageStatus", "RemoveImage", "StreamImages"} {
		t.Run(method, func(t *testing.T) {
			ctx, out := logged(t.Context())
			_, err := answer(ctx, method, &runtime.PullImageRequest{}, func(context.Context, any) (any, error) { return nil, failed })
			require.ErrorContains(t, err, "connection reset")
			require.NotContains(t, err.Error(), "hunter2", "the answer")
			require.NotContains(t, out.String(), "hunter2", "the log")
		})
	}
}

// The rest of the message stays readable, whatever stands in the query.
func TestOnlyTheQueryIsTakenOut(t *testing.T) {
	for query, want := range map[string]string{
		"":   `failed to pull "a": Get "https://blobs.example/layer": a reset`,
		"?":  `failed to pull "a": Get "https://blobs.example/layer": a reset`,
		"?a": `failed to pull "a": Get "https://blobs.example/layer": a reset`,
		"?e": `failed to pull "a": Get "https://blobs.example/layer": a reset`,
	} {
		failed := fmt.Errorf("failed to pull %q: %w", "a", &url.Error{
			Op: "Get", URL: "https://blobs.example/layer" + query, Err: fmt.Errorf("a reset%w", errQuiet),
		})
		_, err := answer(t.Context(), "PullImage", nil, func(context.Context, any) (any, error) { return nil, failed })
		require.Equal(t, codes.Unavailable, status.Code(err), "the class of the error stays")
		message := status.Convert(err).Message()
		if query != "" {
			message = strings.ReplaceAll(message, `?"`, `"`) // what is left of the query is no matter
		}
		require.Equal(t, want, message, "%q", query)
	}
}

// errQuiet has a class and no text.
var errQuiet = quiet{}

type quiet struct{}

func (quiet) Error() string { return "" }
func (quiet) Unavailable()  {}

// containerd records the error of a CRI call on the span of its server, also for pods that aren't podfsm's.
func TestErrorsAreOnTheServersSpan(t *testing.T) {
	spans := recordSpans(t)
	ctx, span := otel.Tracer("grpc").Start(t.Context(), "runtime.v1.RuntimeService/StopContainer")
	_, err := answer(ctx, "StopContainer", &runtime.StopContainerRequest{}, func(context.Context, any) (any, error) { return nil, errors.New("no luck") })
	require.Error(t, err)
	span.End()
	require.Len(t, spans.Ended(), 1)
	require.Len(t, spans.Ended()[0].Events(), 1)
}

func TestSubject(t *testing.T) {
	for _, tc := range []struct {
		request any
		want    string
	}{
		{&runtime.StopPodSandboxRequest{PodSandboxId: "s1"}, "s1"},
		{&runtime.StartContainerRequest{ContainerId: "c1"}, "c1"},
		{&runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: "busybox"}}, "busybox"},
		{&runtime.RemoveImageRequest{}, ""},
		{&runtime.VersionRequest{}, ""},
		{(*runtime.StopPodSandboxRequest)(nil), ""},
		{nil, ""},
	} {
		require.Equal(t, tc.want, subject(tc.request), "%T", tc.request)
	}
	require.NotPanics(t, func() { subject(&runtime.RunPodSandboxRequest{}) })
	require.NotPanics(t, func() { subject(&runtime.CreateContainerRequest{}) })
}

func TestLevels(t *testing.T) {
	known := map[string]bool{}
	for _, desc := range []grpc.ServiceDesc{runtime.RuntimeService_ServiceDesc, runtime.ImageService_ServiceDesc} {
		for _, method := range desc.Methods {
			known[method.MethodName] = true
		}
		for _, stream := range desc.Streams {
			known[stream.StreamName] = true
		}
	}
	for _, method := range slices.Concat(acting, seldom) {
		require.True(t, known[method], "%s is a method of the CRI", method)
	}
	require.Equal(t, log.InfoLevel, levelOf("RunPodSandbox"))
	require.Equal(t, log.DebugLevel, levelOf("Exec"))
	require.Equal(t, log.TraceLevel, levelOf("ListContainers"))
}
