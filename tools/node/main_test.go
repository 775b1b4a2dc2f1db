package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// Main fails if a node has left anything.
func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

const commands = `set -e
crictl run container.json pod.json >/dev/null
crictl pods -o json | grep -m1 runtimeHandler
podfsm timeline default/web | grep -c declare_ready
ctr version >/dev/null
ip -o -4 address show cni0 | grep -o 10.88.0.1
sleep 1000 >/dev/null 2>&1 &
`

// The node has crictl, podfsm and ctr, and podfsm runs its pods. It ends with the commands, and so
// does everything that they have started.
func TestCommands(t *testing.T) {
	var stdout, stderr bytes.Buffer
	require.NoError(t, run(t.Context(), false, strings.NewReader(commands), &stdout, &stderr), "%s", &stderr)
	t.Logf("%s%s", &stderr, &stdout)
	require.Regexp(t, `^ *"runtimeHandler": "(podfsm)?",?\n[1-9]\d*\n10\.88\.0\.1\n$`, stdout.String())

	require.ErrorContains(t, run(t.Context(), false, strings.NewReader("exit 3"), &stdout, &stderr), "exit status 3")
}
