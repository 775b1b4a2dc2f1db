package integration

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/traces"
)

var update = flag.Bool("update", false, "write the golden files anew")

// ours returns podfsm's spans. Those of containerd's own service may change with its releases.
func ours(spans []traces.Span) []traces.Span {
	return slices.DeleteFunc(slices.Clone(spans), func(s traces.Span) bool { return s.Scope != "github.com/podfsm/podfsm" })
}

var (
	sandboxID = regexp.MustCompile(`[0-9a-f]{64}`)
	network   = regexp.MustCompile(`podfsm-node-[0-9]+`)
	directory = regexp.MustCompile(`/[^ "']*/`)
)

// normalise removes what differs from run to run, and what containerd's service and its log add to
// the spans.
func normalise(key, value string) (string, bool) {
	switch key {
	case "sandbox.id", "exception.stacktrace":
		return "", false
	case "event":
		return value, value == "exception"
	}
	for _, tc := range []struct {
		pattern *regexp.Regexp
		name    string
	}{
		{sandboxID, "ID"}, {network, "NETWORK"}, {directory, "…/"},
	} {
		value = tc.pattern.ReplaceAllString(value, tc.name)
	}
	return value, true
}

// requireGolden compares a tree of spans with the one on file.
func requireGolden(t *testing.T, name string, spans []traces.Span) {
	t.Helper()
	requireTree(t, name, traces.Render(ours(spans), normalise))
}

func requireTree(t *testing.T, name, tree string) {
	t.Helper()
	file := filepath.Join("testdata", name+".trace")
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(file, []byte(tree), 0o644))
	}
	golden, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(golden), tree)
}
