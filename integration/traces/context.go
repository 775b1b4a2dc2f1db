package traces

import (
	"context"
	"crypto/rand"
	"fmt"

	"google.golang.org/grpc/metadata"
)

// NewContext makes the gRPC calls under ctx part of a new sampled trace, as a
// kubelet with tracing would, and returns its id. The caller's own span is
// never exported, so the server's spans are the roots.
func NewContext(ctx context.Context) (_ context.Context, traceID string) {
	return newContext(ctx, 1)
}

// NewUnsampledContext is NewContext for a trace that isn't sampled: nothing of
// it may be recorded.
func NewUnsampledContext(ctx context.Context) (_ context.Context, traceID string) {
	return newContext(ctx, 0)
}

func newContext(ctx context.Context, flags byte) (_ context.Context, traceID string) {
	var id [24]byte
	_, _ = rand.Read(id[:]) // never fails, says crypto/rand
	traceID = fmt.Sprintf("%x", id[:16])
	parent := fmt.Sprintf("00-%s-%x-%02x", traceID, id[16:], flags) // W3C Trace Context, section 3.2
	return metadata.AppendToOutgoingContext(ctx, "traceparent", parent), traceID
}
