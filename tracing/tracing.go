// Package tracing has podfsm's span names, attribute keys and log fields, and the functions that
// start and end spans.
//
// The tracer is that of the global OpenTelemetry provider, which containerd's tracing plugin sets
// up. Without a collector, spans cost next to nothing.
package tracing

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// Name is the instrumentation scope of podfsm's tracers and meters. It is the module path, as
// OpenTelemetry recommends.
const Name = "github.com/podfsm/podfsm"

// Span names. [Step], [Undo] and [Stop] return those of a step. The prefix distinguishes podfsm's
// spans from containerd's.
const (
	SpanRun       = "podfsm.sandbox.run"
	SpanRollback  = "podfsm.sandbox.rollback"
	SpanStop      = "podfsm.sandbox.stop"
	SpanRemove    = "podfsm.sandbox.remove"
	SpanDiscard   = "podfsm.sandbox.discard" // the removal of a sandbox that no caller claimed
	SpanRecover   = "podfsm.sandbox.recover" // the recovery of a sandbox after a restart
	SpanCleanup   = "podfsm.sandbox.cleanup" // a retry of a pending cleanup
	SpanCheck     = "podfsm.sandbox.check"   // the CNI CHECK of an adopted sandbox
	SpanCNIAdd    = "podfsm.cni.add"
	SpanCNIDel    = "podfsm.cni.del"
	SpanCNICheck  = "podfsm.cni.check"
	SpanCNIStatus = "podfsm.cni.status"
	SpanCNIGC     = "podfsm.cni.gc"
	SpanRemap     = "podfsm.snapshot.remap" // the remap of the owners of an image
)

// Attribute keys: first those of OpenTelemetry's semantic conventions, then podfsm's own.
const (
	PodName      = semconv.K8SPodNameKey
	PodNamespace = semconv.K8SNamespaceNameKey
	PodUID       = semconv.K8SPodUIDKey
	ErrorType    = semconv.ErrorTypeKey

	PodAttempt     = attribute.Key("podfsm.pod.attempt")
	SandboxID      = attribute.Key("podfsm.sandbox.id")
	RuntimeHandler = attribute.Key("podfsm.runtime.handler")
	StepSkipped    = attribute.Key("podfsm.step.skipped")
	Recovery       = attribute.Key("podfsm.recovery.outcome")
	Joined         = attribute.Key("podfsm.retry.joined") // the span is of a retry, and links to the creation
	CNIPlugin      = attribute.Key("podfsm.cni.plugin")
	CNINetwork     = attribute.Key("podfsm.cni.network")
	CNIIfName      = attribute.Key("podfsm.cni.interface")
	CNICommand     = attribute.Key("podfsm.cni.command")

	SnapshotStrategy = attribute.Key("podfsm.snapshot.strategy")
	SnapshotInodes   = attribute.Key("podfsm.snapshot.inodes") // whose owners were remapped
	SnapshotBytes    = attribute.Key("podfsm.snapshot.bytes")  // size of these
)

// Step returns the name of the span of a step's Do.
func Step(step string) string { return "podfsm.sandbox." + step }

// Undo returns the name of the span of a step's undo.
func Undo(step string) string { return "podfsm.sandbox." + step + ".undo" }

// Stop returns the name of the span in which a step's process is ended.
func Stop(step string) string { return "podfsm.sandbox." + step + ".stop" }

// Start starts a span as a child of the span in ctx.
func Start(ctx context.Context, name string, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
	return otel.Tracer(Name).Start(ctx, name, trace.WithAttributes(attrs...))
}

// End ends span. With an error, the span has the status Error, the error as an event, and its class
// as error.type.
func End(span trace.Span, err error) {
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, err.Error())
		span.SetAttributes(ErrorType.String(Class(err)))
	}
	span.End()
}

// classes are the error types of low cardinality. The first that matches counts.
var classes = []struct {
	name string
	is   func(error) bool
}{
	{"deadline_exceeded", errdefs.IsDeadlineExceeded},
	{"canceled", errdefs.IsCanceled},
	{"invalid_argument", errdefs.IsInvalidArgument},
	{"not_found", errdefs.IsNotFound},
	{"already_exists", errdefs.IsAlreadyExists},
	{"permission_denied", errdefs.IsPermissionDenied},
	{"resource_exhausted", errdefs.IsResourceExhausted},
	{"failed_precondition", errdefs.IsFailedPrecondition},
	{"unavailable", errdefs.IsUnavailable},
	{"unimplemented", errdefs.IsNotImplemented},
	{"data_loss", errdefs.IsDataLoss},
	{"internal", errdefs.IsInternal},
}

// KnownClass returns the errdefs class of err; "other" without one. Use it if the set of values
// must be closed, as for metrics.
func KnownClass(err error) string {
	for _, c := range classes {
		if c.is(err) {
			return c.name
		}
	}
	return "other"
}

// Class returns the class of err for error.type, which must be of low cardinality: its errdefs
// class, or else the Go type of its innermost error. Of joined errors, the first counts.
func Class(err error) string {
	if known := KnownClass(err); known != "other" {
		return known
	}
	for {
		inner := errors.Unwrap(err)
		if joined, ok := err.(interface{ Unwrap() []error }); ok && len(joined.Unwrap()) > 0 {
			inner = joined.Unwrap()[0]
		}
		if inner == nil {
			return fmt.Sprintf("%T", err)
		}
		err = inner
	}
}

// Parent returns the W3C traceparent of the span in ctx; "" without a span.
func Parent(ctx context.Context) string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

// FromParent returns the span context of a W3C traceparent. It is invalid if the text is.
func FromParent(traceparent string) trace.SpanContext {
	ctx := propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": traceparent})
	return trace.SpanContextFromContext(ctx)
}

// TraceID returns the id of the trace of ctx; "" without a trace.
func TraceID(ctx context.Context) string {
	if sc := trace.SpanContextFromContext(ctx); sc.HasTraceID() {
		return sc.TraceID().String()
	}
	return ""
}

// Link returns a link to the span of a W3C traceparent; nil if the text is invalid.
func Link(traceparent string) []trace.Link {
	if origin := FromParent(traceparent); origin.IsValid() {
		return []trace.Link{{SpanContext: origin}}
	}
	return nil
}

// StartLinked starts a new trace for work that an earlier request caused. The trace links to the
// request by its W3C traceparent. If the request wasn't sampled, the work isn't either: its span is
// then a child of the request's.
func StartLinked(ctx context.Context, name, traceparent string, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
	if origin := FromParent(traceparent); origin.IsValid() && !origin.IsSampled() {
		return otel.Tracer(Name).Start(trace.ContextWithRemoteSpanContext(ctx, origin), name)
	}
	return otel.Tracer(Name).Start(ctx, name, trace.WithNewRoot(), trace.WithAttributes(attrs...), trace.WithLinks(Link(traceparent)...))
}
