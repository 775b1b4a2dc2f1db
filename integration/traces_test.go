package integration

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"regexp"
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

var update = flag.Bool("update", false, "write the golden files anew")

// ours keeps the spans that podfsm makes. Those of containerd's own service between them are its business, and change with it.
func ours(spans []traces.Span) []traces.Span {
	return slices.DeleteFunc(slices.Clone(spans), func(s traces.Span) bool { return s.Scope != "github.com/podfsm/podfsm" })
}

var (
	sandboxID = regexp.MustCompile(`[0-9a-f]{64}`)
	network   = regexp.MustCompile(`podfsm-node-[0-9]+`)
	directory = regexp.MustCompile(`/[^ "']*/`)
)

// normalise takes out what differs from run to run, and what containerd's service and its log add to our spans.
func normalise(key, value string) (string, bool) {
	switch key {
	case "sandbox.id", "exception.stacktrace":
		return "", false
	case "event":
		return value, value == "exception"
	}
	for pattern, name := range map[*regexp.Regexp]string{sandboxID: "ID", network: "NETWORK", directory: "…/"} {
		value = pattern.ReplaceAllString(value, name)
	}
	return value, true
}

// requireGolden compares a tree of spans with the one on file.
func requireGolden(t *testing.T, name string, spans []traces.Span) {
	t.Helper()
	tree := traces.Render(ours(spans), normalise)
	file := filepath.Join("testdata", name+".trace")
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(file, []byte(tree), 0o644))
	}
	golden, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(golden), tree)
}

func TestTraces(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Traces: true})

	t.Run("success", func(t *testing.T) {
		ctx, id := traces.NewContext(t.Context())
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
		require.NoError(t, err)
		require.Equal(t, id, inspect(t, n, pod.ID).GetSandbox().GetTraceId())
		spans, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "run", spans)

		ctx, id = traces.NewContext(t.Context())
		require.NoError(t, pod.StopAndRemove(ctx))
		spans, err = n.Traces.WaitFor(t.Context(), id, traces.Finished("sandbox.stop", "sandbox.remove", "runtime.v1.RuntimeService/RemovePodSandbox"))
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
		joined, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "retry-that-goes", joined)

		require.NoError(t, n.Faults.Release("bridge.ADD"))
		spans, err := n.Traces.WaitFor(t.Context(), creation, traces.Finished("sandbox.run"))
		require.NoError(t, err)
		requireGolden(t, "run", spans) // its caller has gone long since
		run := slices.IndexFunc(spans, func(s traces.Span) bool { return s.Name == "sandbox.run" })
		require.Equal(t, spans[run].SpanID, leads(joined))

		ctx, id = traces.NewContext(t.Context())
		pod, err := n.RunPod(ctx, harness.PodfsmHandler, config)
		require.NoError(t, err)
		taken, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "retry-that-takes", taken)
		require.Equal(t, spans[run].SpanID, leads(taken))
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, n.Heal())
	})

	t.Run("CNI failure", func(t *testing.T) {
		// The chain is bridge and then a plugin that isn't there.
		require.NoError(t, n.SetChain(t.Context(), append(n.DefaultChain(), harness.Plugin{"type": "missing"})...))
		ctx, id := traces.NewContext(t.Context())
		_, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig("pod"))
		require.ErrorContains(t, err, "missing")
		spans, err := n.Traces.WaitFor(t.Context(), id, traces.Finished("sandbox.run", "runtime.v1.RuntimeService/RunPodSandbox"))
		require.NoError(t, err)
		requireGolden(t, "cni-failure", spans)

		rollback := slices.IndexFunc(spans, func(s traces.Span) bool { return s.Name == "sandbox.rollback" })
		require.NotEqual(t, -1, rollback, "the rollback is in the same trace")
		require.True(t, slices.ContainsFunc(spans, func(s traces.Span) bool {
			return s.Name == "sandbox.attach_network.undo" && s.ParentID == spans[rollback].SpanID
		}))
		require.False(t, strings.Contains(traces.Render(spans, nil), "elsewhere"))
	})
}
