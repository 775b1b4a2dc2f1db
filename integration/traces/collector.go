// Package traces receives OpenTelemetry spans in the test process and renders
// them as trees that can be compared with a golden file.
package traces

import (
	"context"
	"fmt"
	"net"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"

	"github.com/podfsm/podfsm/integration/programs/feed"
)

// Span is one finished span. Ids are lower-case hex.
type Span struct {
	TraceID, SpanID, ParentID string
	Name                      string
	Scope                     string // the instrumentation scope, the tracer's name
	Start, End                time.Time
	Failed                    bool   // the status is Error
	Message                   string // of the status
	Attributes                map[string]string
	Events                    []Event
	Links                     []Link
}

// Event is an event of a span, such as a recorded error.
type Event struct {
	Name       string
	Attributes map[string]string
}

// Link points from a span to another span, usually of another trace.
type Link struct {
	TraceID, SpanID string
	Attributes      map[string]string
}

// Collector is an OTLP/gRPC receiver. Its methods are safe for concurrent use.
type Collector struct {
	collector.UnimplementedTraceServiceServer

	server *grpc.Server
	served chan struct{}
	spans  feed.Feed[Span]
}

// Serve starts a collector on l, which the collector closes.
func Serve(l net.Listener) *Collector {
	c := &Collector{server: grpc.NewServer(), served: make(chan struct{})}
	collector.RegisterTraceServiceServer(c.server, c)
	go func() {
		defer close(c.served)
		_ = c.server.Serve(l)
	}()
	return c
}

// Close ends the collector and waits for its goroutine. The received spans stay available.
func (c *Collector) Close() {
	c.server.Stop()
	<-c.served
}

// Export takes spans from an exporter.
func (c *Collector) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, resource := range req.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.spans.Add(newSpan(scope.GetScope().GetName(), s))
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// Trace returns the spans of one trace that have arrived so far.
func (c *Collector) Trace(traceID string) []Span {
	return ofTrace(c.spans.Items(), traceID)
}

// WaitFor waits until done is true of the spans of a trace, and returns them. If ctx ends first, it
// returns the spans so far and an error that wraps that of ctx.
func (c *Collector) WaitFor(ctx context.Context, traceID string, done func([]Span) bool) ([]Span, error) {
	spans, err := c.spans.WaitFor(ctx, func(all []Span) bool { return done(ofTrace(all, traceID)) })
	spans = ofTrace(spans, traceID)
	if err != nil {
		return spans, fmt.Errorf("trace %s:\n%s%w", traceID, Render(spans, nil), err)
	}
	return spans, nil
}

// All returns all spans that have arrived so far.
func (c *Collector) All() []Span { return c.spans.Items() }

// WaitForLinked waits for the root of a trace that has a name and a link to another trace, and
// returns the spans of that trace. A root ends last.
func (c *Collector) WaitForLinked(ctx context.Context, traceID, name string) ([]Span, error) {
	var found string
	spans, err := c.spans.WaitFor(ctx, func(all []Span) bool {
		found = linked(all, traceID, name)
		return found != ""
	})
	if err != nil {
		return spans, fmt.Errorf("no %s linked to trace %s:\n%s%w", name, traceID, Render(spans, nil), err)
	}
	return ofTrace(spans, found), nil
}

func linked(spans []Span, traceID, name string) string {
	for _, s := range spans {
		for _, l := range s.Links {
			if s.Name == name && l.TraceID == traceID {
				return s.TraceID
			}
		}
	}
	return ""
}

// Finished reports whether spans have a span of each name.
func Finished(names ...string) func([]Span) bool {
	return func(spans []Span) bool {
		seen := map[string]bool{}
		for _, s := range spans {
			seen[s.Name] = true
		}
		for _, name := range names {
			if !seen[name] {
				return false
			}
		}
		return true
	}
}

func ofTrace(spans []Span, traceID string) []Span {
	var of []Span
	for _, s := range spans {
		if s.TraceID == traceID {
			of = append(of, s)
		}
	}
	return of
}

func newSpan(scope string, s *trace.Span) Span {
	span := Span{
		TraceID:    fmt.Sprintf("%x", s.GetTraceId()),
		SpanID:     fmt.Sprintf("%x", s.GetSpanId()),
		ParentID:   fmt.Sprintf("%x", s.GetParentSpanId()),
		Name:       s.GetName(),
		Scope:      scope,
		Start:      time.Unix(0, int64(s.GetStartTimeUnixNano())),
		End:        time.Unix(0, int64(s.GetEndTimeUnixNano())),
		Failed:     s.GetStatus().GetCode() == trace.Status_STATUS_CODE_ERROR,
		Message:    s.GetStatus().GetMessage(),
		Attributes: attributes(s.GetAttributes()),
	}
	for _, e := range s.GetEvents() {
		span.Events = append(span.Events, Event{Name: e.GetName(), Attributes: attributes(e.GetAttributes())})
	}
	for _, l := range s.GetLinks() {
		span.Links = append(span.Links, Link{
			TraceID:    fmt.Sprintf("%x", l.GetTraceId()),
			SpanID:     fmt.Sprintf("%x", l.GetSpanId()),
			Attributes: attributes(l.GetAttributes()),
		})
	}
	return span
}

func attributes(kvs []*common.KeyValue) map[string]string {
	m := make(map[string]string, len(kvs))
	for _, kv := range kvs {
		m[kv.GetKey()] = value(kv.GetValue())
	}
	return m
}

func value(v *common.AnyValue) string {
	switch v := v.GetValue().(type) {
	case *common.AnyValue_StringValue:
		return v.StringValue
	case *common.AnyValue_BoolValue:
		return fmt.Sprint(v.BoolValue)
	case *common.AnyValue_IntValue:
		return fmt.Sprint(v.IntValue)
	case *common.AnyValue_DoubleValue:
		return fmt.Sprint(v.DoubleValue)
	case *common.AnyValue_BytesValue:
		return fmt.Sprintf("%x", v.BytesValue)
	case *common.AnyValue_ArrayValue:
		values := make([]string, len(v.ArrayValue.GetValues()))
		for i, e := range v.ArrayValue.GetValues() {
			values[i] = value(e)
		}
		return fmt.Sprint(values)
	}
	return fmt.Sprint(v)
}
