package traces

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCollector(t *testing.T) {
	c, exporter := serve(t)
	span := func(id, parent byte, name string) *trace.Span {
		return &trace.Span{TraceId: []byte{0xaa}, SpanId: []byte{id}, ParentSpanId: []byte{parent}, Name: name, StartTimeUnixNano: uint64(id)}
	}
	child := span(2, 1, "child")
	child.Status = &trace.Status{Code: trace.Status_STATUS_CODE_ERROR, Message: "no space"}
	child.Attributes = []*common.KeyValue{
		{Key: "pid", Value: &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: 7}}},
		{Key: "ips", Value: &common.AnyValue{Value: &common.AnyValue_ArrayValue{ArrayValue: &common.ArrayValue{Values: []*common.AnyValue{
			{Value: &common.AnyValue_StringValue{StringValue: "10.0.0.1"}},
		}}}}},
	}
	other := span(3, 0, "other")
	other.TraceId = []byte{0xbb}

	go func() {
		for _, s := range []*trace.Span{child, other, span(1, 9, "root")} {
			_, _ = exporter.Export(t.Context(), &collector.ExportTraceServiceRequest{ResourceSpans: []*trace.ResourceSpans{{
				ScopeSpans: []*trace.ScopeSpans{{Scope: &common.InstrumentationScope{Name: "test"}, Spans: []*trace.Span{s}}},
			}}})
		}
	}()

	spans, err := c.WaitFor(t.Context(), "aa", Finished("root", "child"))
	require.NoError(t, err)
	require.Len(t, spans, 2)
	require.Equal(t, Span{
		TraceID: "aa", SpanID: "02", ParentID: "01", Name: "child", Scope: "test",
		Start: time.Unix(0, 2), End: time.Unix(0, 0), Failed: true, Message: "no space",
		Attributes: map[string]string{"pid": "7", "ips": "[10.0.0.1]"},
	}, spans[0])
}

func TestWaitForShowsWhatArrived(t *testing.T) {
	c, _ := serve(t)
	c.spans.Add(Span{TraceID: "aa", SpanID: "01", Name: "only"})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()

	spans, err := c.WaitFor(ctx, "aa", Finished("missing"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "- only\n")
	require.Len(t, spans, 1)
}

func TestRender(t *testing.T) {
	at := func(n int64) time.Time { return time.Unix(0, n) }
	spans := []Span{
		{SpanID: "3", ParentID: "1", Name: "second", Start: at(3), Links: []Link{{SpanID: "1"}, {SpanID: "x"}}},
		{SpanID: "4", ParentID: "3", Name: "leaf", Start: at(4), Events: []Event{{Name: "noise"}, {Name: "exception", Attributes: map[string]string{"exception.message": "m"}}}},
		{SpanID: "1", ParentID: "kubelet", Name: "root", Start: at(1), Failed: true, Message: "took 5ms", Attributes: map[string]string{"b": "2", "a": "1", "pid": "77"}},
		{SpanID: "2", ParentID: "1", Name: "first", Start: at(2)},
	}
	normalise := func(key, value string) (string, bool) {
		return strings.ReplaceAll(value, "5ms", "<duration>"), key != "pid" && value != "noise"
	}
	require.Equal(t, `- root ERROR "took <duration>"
    a = 1
    b = 2
  - first
  - second
      link root
      link elsewhere
    - leaf
        event exception
          exception.message = m
`, Render(spans, normalise))
}

func TestNewContext(t *testing.T) {
	ctx, id := NewContext(t.Context())
	require.Regexp(t, "^[0-9a-f]{32}$", id)
	md, _ := metadata.FromOutgoingContext(ctx)
	require.Regexp(t, "^00-"+id+"-[0-9a-f]{16}-01$", md.Get("traceparent")[0])

	_, second := NewContext(t.Context())
	require.NotEqual(t, id, second)
}

func serve(t *testing.T) (*Collector, collector.TraceServiceClient) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := Serve(l)
	t.Cleanup(c.Close)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return c, collector.NewTraceServiceClient(conn)
}
