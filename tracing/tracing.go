// Package tracing is the one home of podfsm's span names, attribute keys and of the way a span ends.
//
// Spans are made with the tracer of the global OpenTelemetry provider, which containerd's own tracing plugin sets up; with no
// collector configured they cost next to nothing.
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

// Name is the instrumentation scope of every tracer and meter of podfsm: the module path, as OpenTelemetry asks for.
const Name = "github.com/podfsm/podfsm"

// Span names. The spans of a step are named by [Step] and [Undo].
const (
	SpanRun       = "sandbox.run"
	SpanRollback  = "sandbox.rollback"
	SpanStop      = "sandbox.stop"
	SpanRemove    = "sandbox.remove"
	SpanDiscard   = "sandbox.discard" // the end of a sandbox that nobody has claimed
	SpanRecover   = "sandbox.recover" // what a restart found unfinished
	SpanCleanup   = "sandbox.cleanup" // a later try at an owed cleanup
	SpanCNIAdd    = "cni.add"
	SpanCNIDel    = "cni.del"
	SpanCNICheck  = "cni.check"
	SpanCNIStatus = "cni.status"
	SpanCNIGC     = "cni.gc"
	SpanCheck     = "sandbox.check"  // the look at an adopted sandbox
	SpanRemap     = "snapshot.remap" // the making of a layer of owners
)

// Attribute keys. Where OpenTelemetry has a semantic convention, it is used.
const (
	PodName      = semconv.K8SPodNameKey
	PodNamespace = semconv.K8SNamespaceNameKey
	PodUID       = semconv.K8SPodUIDKey
	ErrorType    = semconv.ErrorTypeKey

	PodAttempt     = attribute.Key("podfsm.pod.attempt")
	SandboxID      = attribute.Key("podfsm.sandbox.id")
	RuntimeHandler = attribute.Key("podfsm.runtime.handler")
	StepSkipped    = attribute.Key("podfsm.step.skipped")
	Recovery       = attribute.Key("podfsm.recovery") // what became of a sandbox that a restart has found
	Joined         = attribute.Key("podfsm.joined")   // the span is of a retry; its link leads to the creation
	CNIPlugin      = attribute.Key("podfsm.cni.plugin")
	CNINetwork     = attribute.Key("podfsm.cni.network")
	CNIIfName      = attribute.Key("podfsm.cni.interface")
	CNICommand     = attribute.Key("podfsm.cni.command")

	SnapshotStrategy = attribute.Key("podfsm.snapshot.strategy")
	SnapshotInodes   = attribute.Key("podfsm.snapshot.inodes") // that have got other owners
	SnapshotBytes    = attribute.Key("podfsm.snapshot.bytes")  // of these

)

// Step is the name of the span of a step's work.
func Step(step string) string { return "sandbox." + step }

// Undo is the name of the span of a step's undo.
func Undo(step string) string { return "sandbox." + step + ".undo" }

// Stop is the name of the span of ending a step's process.
func Stop(step string) string { return "sandbox." + step + ".stop" }

// Start starts a span as a child of the one in ctx.
func Start(ctx context.Context, name string, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
	return otel.Tracer(Name).Start(ctx, name, trace.WithAttributes(attrs...))
}

// End ends span; with an error, the span records it, carries its class as error.type and has the status Error.
func End(span trace.Span, err error) {
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, err.Error())
		span.SetAttributes(ErrorType.String(Class(err)))
	}
	span.End()
}

// classes are the low-cardinality error types, asked in this order.
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

// KnownClass is [Class] where no more values may come than these: "other" for an error without an errdefs class.
func KnownClass(err error) string {
	for _, c := range classes {
		if c.is(err) {
			return c.name
		}
	}
	return "other"
}

// Class names the class of err for error.type, which must be of low cardinality: its errdefs class, else the Go type of its
// innermost error, the first of joined ones.
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

// Parent is the W3C traceparent of the span in ctx, "" when there is none.
func Parent(ctx context.Context) string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

// FromParent is the span context that a W3C traceparent names; it is invalid when the text is.
func FromParent(traceparent string) trace.SpanContext {
	ctx := propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": traceparent})
	return trace.SpanContextFromContext(ctx)
}

// TraceID is the id of the trace that ctx is in, "" when it is in none.
func TraceID(ctx context.Context) string {
	if sc := trace.SpanContextFromContext(ctx); sc.HasTraceID() {
		return sc.TraceID().String()
	}
	return ""
}

// Link leads to the span that a W3C traceparent names; there is none when the text is invalid.
func Link(traceparent string) []trace.Link {
	if origin := FromParent(traceparent); origin.IsValid() {
		return []trace.Link{{SpanContext: origin}}
	}
	return nil
}

// StartLinked starts a trace of its own for work that a traced request of an earlier time led to, linked to it by its W3C
// traceparent. Where that request wasn't sampled, the work isn't either: its span is a child, which follows that decision.
func StartLinked(ctx context.Context, name, traceparent string, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
	if origin := FromParent(traceparent); origin.IsValid() && !origin.IsSampled() {
		return otel.Tracer(Name).Start(trace.ContextWithRemoteSpanContext(ctx, origin), name)
	}
	return otel.Tracer(Name).Start(ctx, name, trace.WithNewRoot(), trace.WithAttributes(attrs...), trace.WithLinks(Link(traceparent)...))
}
