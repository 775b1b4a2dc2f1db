package tracing

import (
	"context"

	"github.com/containerd/log"
)

// Fields of log lines. The trace's name is that of OpenTelemetry's "Trace Context in non-OTLP Log Formats".
const (
	LogPod       = "pod"        // "namespace/name"
	LogSandbox   = "sandbox"    // the sandbox's id
	LogStep      = "step"       // as in the ledger and in span names
	LogAct       = "act"        // what is done with the step: do, undo, stop, check
	LogOutcome   = "outcome"    // how it went
	LogSeconds   = "seconds"    // how long it took
	LogErrorType = "error_type" // the class of the error, as error.type of the span
	LogFrom      = "from"       // the state before
	LogTo        = "to"         // the state after
	LogState     = "state"      // the state now
	LogGoal      = "goal"       // the state that an owed cleanup leads to
	LogAttempts  = "attempts"   // failed tries at it
	LogRetryIn   = "retry_in"   // seconds until the next one
	LogReason    = "reason"     // why a cleanup was written off
	LogPlugin    = "plugin"     // a CNI plugin, as "network/type"
	LogTraceID   = "trace_id"   // in hexadecimal; there is none outside of a trace
)

// Log is the logger of ctx, with the id of the trace that ctx is in.
func Log(ctx context.Context) *log.Entry {
	entry := log.G(ctx)
	if id := TraceID(ctx); id != "" {
		entry = entry.WithField(LogTraceID, id)
	}
	return entry
}
