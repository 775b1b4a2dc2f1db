package traces

import (
	"context"
	"crypto/rand"
	"fmt"

	"google.golang.org/grpc/metadata"
)

// NewContext returns a context whose gRPC calls belong to a new sampled trace, as those of a
// kubelet with tracing, and the id of the trace. The caller's own span is never exported, so that
// the spans of the server are roots.
func NewContext(ctx context.Context) (_ context.Context, traceID string) {
	return newContext(ctx, 1)
}

// NewUnsampledContext is NewContext for a trace that is not sampled: no span of it may be exported.
func NewUnsampledContext(ctx context.Context) (_ context.Context, traceID string) {
	return newContext(ctx, 0)
}

func newContext(ctx context.Context, flags byte) (_ context.Context, traceID string) {
	var id [24]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails
	traceID = fmt.Sprintf("%x", id[:16])
	parent := fmt.Sprintf("00-%s-%x-%02x", traceID, id[16:], flags) // W3C Trace Context, section 3.2
	return metadata.AppendToOutgoingContext(ctx, "traceparent", parent), traceID
}
