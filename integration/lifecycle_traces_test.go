package integration

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/traces"
)

// brief also removes the attributes of the pod, which every span has.
func brief(key, value string) (string, bool) {
	switch key {
	case "k8s.namespace.name", "k8s.pod.name", "k8s.pod.uid", "podfsm.pod.attempt", "podfsm.runtime.handler", "podfsm.sandbox.id",
		"podfsm.cni.command", "podfsm.cni.interface", "podfsm.cni.network", "podfsm.snapshot.strategy":
		return "", false
	}
	return normalise(key, value)
}

// requireBriefly compares what happened in a tree of spans with the one on file.
func requireBriefly(t *testing.T, name string, spans []traces.Span) {
	t.Helper()
	requireTree(t, name, traces.Render(ours(spans), brief))
}

func TestTraces(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Traces: true})

	t.Run("success", func(t *testing.T) {
		ctx, id := traces.NewContext(t.Context())
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		require.Equal(t, id, inspect(t, n, pod.ID).GetSandbox().GetTraceId())
		spans, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "run", spans)

		ctx, id = traces.NewContext(t.Context())
		require.NoError(t, pod.StopAndRemove(ctx))
		spans, err = n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.stop", "podfsm.sandbox.remove", "runtime.v1.RuntimeService/RemovePodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "stop-and-remove", spans)
	})

	t.Run("retries", func(t *testing.T) {
		config := n.PodConfig("pod")
		ctx, creation := traces.NewContext(t.Context())
		leaveBehind(ctx, t, n, "bridge.ADD", config)
		leads := func(spans []traces.Span) string {
			require.Len(t, ours(spans), 1)
			require.Len(t, ours(spans)[0].Links, 1)
			return ours(spans)[0].Links[0].SpanID
		}

		ctx, cancel := context.WithCancel(t.Context()) // a deadline may end at the daemon or at the client first
		defer time.AfterFunc(impatient, cancel).Stop()
		ctx, id := traces.NewContext(ctx)
		_, err := n.RunPod(ctx, harness.PodfsmHandler, config)
		require.Equal(t, codes.Canceled, status.Code(err), "%v", err)
		joined, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "retry-that-goes", joined)

		require.NoError(t, n.Faults.Release("bridge.ADD"))
		spans, err := n.Traces.WaitFor(t.Context(), creation, traces.Finished("podfsm.sandbox.run"))
		require.NoError(t, err)
		requireGolden(t, "run", spans) // the caller has gone before
		run := slices.IndexFunc(spans, func(s traces.Span) bool { return s.Name == "podfsm.sandbox.run" })
		require.Equal(t, spans[run].SpanID, leads(joined))

		ctx, id = traces.NewContext(t.Context())
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, config)
		require.NoError(t, err)
		taken, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "retry-that-takes", taken)
		require.Equal(t, spans[run].SpanID, leads(taken))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
	})

	t.Run("CNI failure", func(t *testing.T) {
		// The chain is bridge and then a missing plugin.
		require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
		ctx, id := traces.NewContext(t.Context())
		_, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
		require.ErrorContains(t, err, "missing")
		spans, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "cni-failure", spans)

		rollback := slices.IndexFunc(spans, func(s traces.Span) bool { return s.Name == "podfsm.sandbox.rollback" })
		require.NotEqual(t, -1, rollback, "the rollback is in the same trace")
		require.True(t, slices.ContainsFunc(spans, func(s traces.Span) bool {
			return s.Name == "podfsm.sandbox.attach_network.undo" && s.ParentID == spans[rollback].SpanID
		}))
		require.False(t, strings.Contains(traces.Render(spans, nil), "elsewhere"))
	})
}

// The consequences of a fault are in the trace of its cause, or in a linked trace.
func TestTracesOfFaults(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, Traces: true})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	config := n.PodConfig("pod")
	whole := func(t *testing.T, id string) []traces.Span {
		spans, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("podfsm.sandbox.run"))
		require.NoError(t, err)
		return spans
	}
	linked := func(t *testing.T, id, name string) []traces.Span {
		ctx, cancel := context.WithTimeout(t.Context(), waitFor)
		defer cancel()
		spans, err := n.Traces.WaitForLinked(ctx, id, name)
		require.NoError(t, err)
		return spans
	}

	for _, step := range steps {
		t.Run("failure of "+step, func(t *testing.T) {
			fail := step + ".do.after"
			if step == "start_pause" {
				fail = step + ".do.before" // in later steps, the network is being attached
			}
			require.NoError(t, n.Fault(fail, "1*error(injected)"))
			ctx, id := traces.NewContext(t.Context())
			_, err := n.RunPod(ctx, harness.PodfsmHandler, config)
			require.ErrorContains(t, err, "injected")
			requireBriefly(t, "failure-of-"+step, whole(t, id))
			require.NoError(t, n.Heal())
		})
	}

	t.Run("failed undo", func(t *testing.T) {
		require.NoError(t, n.Fault("declare_ready.do.before", "1*error(injected)"))
		require.NoError(t, n.Fault("capture_netns.undo.before", "2*error(injected into the undo)"))
		ctx, id := traces.NewContext(t.Context())
		_, err := n.RunPod(ctx, harness.PodfsmHandler, config)
		require.ErrorContains(t, err, "the cleanup is pending")
		requireBriefly(t, "failed-undo", whole(t, id))
		first := linked(t, id, "podfsm.sandbox.cleanup")
		requireBriefly(t, "failed-cleanup", first)
		n.RequireClean(t, before) // the second try succeeds
		require.Eventually(t, func() bool {
			return slices.ContainsFunc(n.Traces.All(), func(s traces.Span) bool {
				return s.Name == "podfsm.sandbox.cleanup" && !s.Failed && s.TraceID != first[0].TraceID
			})
		}, waitFor, tick)
		require.NoError(t, n.Heal())
	})

	unsampledCtx, unsampled := traces.NewUnsampledContext(t.Context())

	t.Run("an unsampled failure and its pending cleanup", func(t *testing.T) {
		require.NoError(t, n.Fault("declare_ready.do.before", "1*error(injected)"))
		require.NoError(t, n.Fault("capture_netns.undo.before", "1*error(injected)"))
		_, err := n.RunPod(unsampledCtx, harness.PodfsmHandler, config)
		require.ErrorContains(t, err, "the cleanup is pending")
		n.RequireClean(t, before) // the cleanup has completed
		require.NoError(t, n.Heal())
	})

	t.Run("SIGTERM", func(t *testing.T) {
		ctx, id := traces.NewContext(t.Context())
		leaveBehind(ctx, t, n, "bridge.ADD", config)
		require.NoError(t, n.Stop(t.Context()))
		// The daemon has ended, so that no further spans arrive.
		require.True(t, traces.Finished("podfsm.sandbox.run")(n.Traces.Trace(id)), "%s", traces.Render(n.Traces.Trace(id), nil))
		requireBriefly(t, "sigterm", n.Traces.Trace(id))
		require.NoError(t, n.Heal())
		require.NoError(t, n.Start(t.Context()))
		n.RequireClean(t, before)
	})

	t.Run("recovery and adoption after SIGKILL", func(t *testing.T) {
		ctx, kept := traces.NewContext(t.Context())
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("kept"))
		require.NoError(t, err)
		silent, err := n.RunPod(unsampledCtx, harness.PodfsmHandler, n.PodConfig("silent"))
		require.NoError(t, err)
		ctx, interrupted := traces.NewContext(t.Context())
		leaveBehind(ctx, t, n, "bridge.ADD", config)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Heal())
		require.NoError(t, n.Start(t.Context()))
		requireBriefly(t, "recovery", linked(t, interrupted, "podfsm.sandbox.recover"))
		requireBriefly(t, "adoption", linked(t, kept, "podfsm.sandbox.recover"))
		requireBriefly(t, "check", linked(t, kept, "podfsm.sandbox.check"))
		require.Equal(t, unsampled, inspect(t, n, silent.ID).GetSandbox().GetTraceId(), "CLI and log name it all the same")
		require.NoError(t, silent.StopAndRemove(unsampledCtx))
		ctx, last := traces.NewContext(t.Context())
		require.NoError(t, pod.StopAndRemove(ctx))
		n.RequireClean(t, before)

		// Spans arrive in the order in which they end.
		_, err = n.Traces.WaitFor(t.Context(), last, traces.Finished("podfsm.sandbox.remove"))
		require.NoError(t, err)
	})

	t.Run("nothing of what the kubelet doesn't sample is recorded", func(t *testing.T) {
		for _, span := range ours(n.Traces.All()) {
			require.NotEqual(t, unsampled, span.TraceID, span.Name)
			require.False(t, slices.ContainsFunc(span.Links, func(l traces.Link) bool { return l.TraceID == unsampled }), span.Name)
		}
	})
}
