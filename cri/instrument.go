package cri

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/tracing"
)

// Namespace is the containerd namespace of everything that comes by CRI.
const Namespace = records.Namespace

// instrumented is desc with what containerd puts around its own CRI service when it registers itself: the containerd
// namespace, the refusal before the service is initialized, the translation of errors to gRPC codes, the request log.
func instrumented(desc grpc.ServiceDesc, initialized func() bool) *grpc.ServiceDesc {
	desc.Methods = slices.Clone(desc.Methods)
	for i, method := range desc.Methods {
		desc.Methods[i].Handler = func(srv any, ctx context.Context, dec func(any) error, outer grpc.UnaryServerInterceptor) (any, error) {
			return method.Handler(srv, ctx, dec, func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
				around := func(ctx context.Context, req any) (any, error) {
					if !initialized() {
						return nil, errUninitialized
					}
					return answer(namespaces.WithNamespace(ctx, Namespace), method.MethodName, req, next)
				}
				if outer == nil {
					return around(ctx, req)
				}
				return outer(ctx, req, info, around)
			})
		}
	}
	desc.Streams = slices.Clone(desc.Streams)
	for i, stream := range desc.Streams {
		desc.Streams[i].Handler = func(srv any, s grpc.ServerStream) error {
			if !initialized() {
				return errUninitialized
			}
			ctx := namespaces.WithNamespace(s.Context(), Namespace)
			_, err := answer(ctx, stream.StreamName, nil, func(ctx context.Context, _ any) (any, error) {
				return nil, stream.Handler(srv, &namespacedStream{s, ctx})
			})
			return err
		}
	}
	return &desc
}

var errUninitialized = errgrpc.ToGRPCf(errdefs.ErrUnavailable, "server is not initialized yet")

type namespacedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *namespacedStream) Context() context.Context { return s.ctx }

// answer calls next and logs and translates how it went.
func answer(ctx context.Context, method string, req any, next grpc.UnaryHandler) (any, error) {
	entry := tracing.Log(ctx).WithField("request", subject(req))
	level := levelOf(method)
	entry.Logf(level, "%s", method)
	resp, err := next(ctx, req)
	if err != nil {
		err = withoutQueries(err)
		trace.SpanFromContext(ctx).RecordError(err)
		entry.WithError(err).Errorf("%s failed", method)
		return resp, errgrpc.ToGRPC(err)
	}
	if id, ok := resp.(interface{ GetPodSandboxId() string }); ok {
		entry = entry.WithField(tracing.LogSandbox, id.GetPodSandboxId())
	}
	if id, ok := resp.(interface{ GetContainerId() string }); ok {
		entry = entry.WithField("container", id.GetContainerId())
	}
	entry.Logf(level, "%s succeeded", method)
	return resp, nil
}

// withoutQueries takes the queries out of the URLs in an error: registries put tokens there when they redirect. The class of
// the error stays.
func withoutQueries(err error) error {
	var failed *url.Error
	if !errors.As(err, &failed) {
		return err
	}
	_, query, _ := strings.Cut(failed.URL, "?")
	if query == "" {
		return err
	}
	return &redacted{err, strings.ReplaceAll(err.Error(), "?"+query, "")}
}

// redacted is an error with another text.
type redacted struct {
	error
	text string
}

func (r *redacted) Error() string { return r.text }

func (r *redacted) Unwrap() error { return r.error }

// acting are the methods that change something an operator follows in the log; the kubelet's polling would drown them.
var acting = []string{
	"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "UpdatePodSandboxResources", "PortForward",
	"CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "UpdateContainerResources", "CheckpointContainer",
	"PullImage", "RemoveImage",
}

// seldom are those that are worth a debug line.
var seldom = []string{"Exec", "ExecSync", "Attach", "ReopenContainerLog", "UpdateRuntimeConfig", "GetContainerEvents"}

func levelOf(method string) log.Level {
	switch {
	case slices.Contains(acting, method):
		return log.InfoLevel
	case slices.Contains(seldom, method):
		return log.DebugLevel
	default:
		return log.TraceLevel
	}
}

// subject is what a request is about. Whole requests are not logged: they may carry credentials and environments.
func subject(req any) string {
	switch r := req.(type) {
	case interface {
		GetConfig() *runtime.PodSandboxConfig
	}:
		return r.GetConfig().GetMetadata().String()
	case interface {
		GetPodSandboxId() string
		GetConfig() *runtime.ContainerConfig
	}:
		return r.GetPodSandboxId() + " " + r.GetConfig().GetMetadata().String()
	case interface{ GetPodSandboxId() string }:
		return r.GetPodSandboxId()
	case interface{ GetContainerId() string }:
		return r.GetContainerId()
	case interface{ GetImage() *runtime.ImageSpec }:
		return r.GetImage().GetImage()
	default:
		return ""
	}
}
