package tracing

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

func record(t *testing.T) *tracetest.SpanRecorder {
	recorder := tracetest.NewSpanRecorder()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)))
	t.Cleanup(func() { otel.SetTracerProvider(before) })
	return recorder
}

func TestEndRecordsTheError(t *testing.T) {
	spans := record(t)
	_, span := Start(context.Background(), Step("start_pause"), StepSkipped.Bool(true))
	End(span, fmt.Errorf("failed to start: %w", errdefs.ErrUnavailable))
	_, span = Start(context.Background(), SpanRun)
	End(span, nil)

	ended := spans.Ended()
	require.Len(t, ended, 2)
	require.Equal(t, "podfsm.sandbox.start_pause", ended[0].Name())
	require.Equal(t, codes.Error, ended[0].Status().Code)
	require.Contains(t, ended[0].Attributes(), ErrorType.String("unavailable"))
	require.Len(t, ended[0].Events(), 1)
	require.Equal(t, codes.Unset, ended[1].Status().Code)
}

// Later work for a request that wasn't sampled isn't sampled either.
func TestStartLinkedFollowsTheSampling(t *testing.T) {
	const origin = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
	spans := record(t)
	for traceparent, want := range map[string]bool{origin + "01": true, origin + "00": false, "": true} {
		ctx, span := StartLinked(context.Background(), SpanCleanup, traceparent)
		_, child := Start(ctx, Undo("start_pause"))
		require.Equal(t, want, child.IsRecording(), traceparent)
		child.End()
		span.End()
	}
	for _, span := range spans.Ended() {
		require.NotEqual(t, "0af7651916cd43dd8448eb211c80319c", span.SpanContext().TraceID().String(), "the trace is new, with a link to the request")
	}
	require.Len(t, spans.Ended(), 4)
}

// The reference documents every span and every field of the log.
func TestSpansAndFieldsAreInTheDocs(t *testing.T) {
	spans, err := os.ReadFile("../docs/reference/traces.md")
	require.NoError(t, err)
	for _, name := range []string{
		SpanRun, SpanRollback, SpanStop, SpanRemove, SpanDiscard, SpanRecover, SpanCleanup, SpanCheck,
		SpanCNIAdd, SpanCNIDel, SpanCNICheck, SpanCNIStatus, SpanCNIGC, SpanRemap, Step("<step>"), Undo("<step>"), Stop("start_pause"),
		string(PodName), string(PodNamespace), string(PodUID), string(ErrorType), string(PodAttempt), string(SandboxID), string(RuntimeHandler),
		string(StepSkipped), string(Recovery), string(Joined), string(CNIPlugin),
	} {
		require.Contains(t, string(spans), "`"+name+"`")
	}
	logs, err := os.ReadFile("../docs/reference/logs.md")
	require.NoError(t, err)
	for _, name := range []string{
		LogPod, LogSandbox, LogStep, LogOperation, LogOutcome, LogSeconds, LogErrorType, LogFrom, LogTo, LogState, LogGoal, LogAttempt, LogRetryIn,
		LogReason, LogPlugin, LogTraceID, LogSpanID,
	} {
		require.Contains(t, string(logs), "`"+name+"`")
	}
}

func TestClass(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("a: %w", context.DeadlineExceeded), "deadline_exceeded"},
		{fmt.Errorf("a: %w", errdefs.ErrInvalidArgument), "invalid_argument"},
		{errors.Join(errdefs.ErrNotFound, errors.New("b")), "not_found"},
		{fmt.Errorf("a: %w", errors.Join(&fs.PathError{Op: "open", Path: "/x", Err: syscall.EIO}, errors.New("b"))), "syscall.Errno"},
		{&fs.PathError{Op: "open", Path: "/x", Err: errors.New("plain")}, "*errors.errorString"},
	} {
		require.Equal(t, tc.want, Class(tc.err), "%v", tc.err)
	}
}

func TestLogNamesTraceAndSpan(t *testing.T) {
	record(t)
	ctx, span := Start(context.Background(), SpanRun)
	defer span.End()
	require.Equal(t, span.SpanContext().TraceID().String(), Log(ctx).Data[LogTraceID])
	require.Equal(t, span.SpanContext().SpanID().String(), Log(ctx).Data[LogSpanID])
	require.Empty(t, Log(context.Background()).Data)
}

func TestParentRoundTrip(t *testing.T) {
	record(t)
	ctx, span := Start(context.Background(), SpanRun)
	defer span.End()
	require.Equal(t, span.SpanContext().TraceID(), FromParent(Parent(ctx)).TraceID())
	require.Equal(t, span.SpanContext().TraceID().String(), TraceID(ctx))
	require.Empty(t, Parent(context.Background()))
	require.Empty(t, TraceID(context.Background()))
	require.False(t, FromParent("nonsense").IsValid())
}
