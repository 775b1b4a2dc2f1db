package tracing

import (
	"context"

	"github.com/containerd/log"
	"go.opentelemetry.io/otel/trace"
)

// Fields of log lines. trace_id and span_id are those of OpenTelemetry's "Trace Context in non-OTLP Log Formats".
const (
	LogPod       = "pod"        // "namespace/name"
	LogSandbox   = "sandbox"    // the sandbox's id
	LogStep      = "step"       // as in the ledger and in span names
	LogOperation = "operation"  // do, undo, stop or check
	LogOutcome   = "outcome"    // of the try or the recovery
	LogSeconds   = "seconds"    // the duration
	LogErrorType = "error_type" // the class of the error, as in the span's error.type
	LogFrom      = "from"       // the state before
	LogTo        = "to"         // the state after
	LogState     = "state"      // the state now
	LogGoal      = "goal"       // the state to which a pending cleanup leads
	LogAttempt   = "attempt"    // failed tries of a cleanup so far
	LogRetryIn   = "retry_in"   // seconds until the next try
	LogReason    = "reason"     // why a cleanup was written off
	LogPlugin    = "plugin"     // a CNI plugin, as "network/type"
	LogTraceID   = "trace_id"   // in hexadecimal; absent outside of a trace
	LogSpanID    = "span_id"    // of the current span, likewise
)

// Log returns the logger of ctx, with the ids of its trace and span.
func Log(ctx context.Context) *log.Entry {
	entry := log.G(ctx)
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		entry = entry.WithFields(log.Fields{LogTraceID: sc.TraceID().String(), LogSpanID: sc.SpanID().String()})
	}
	return entry
}
