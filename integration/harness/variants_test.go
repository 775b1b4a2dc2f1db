package harness_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// A shallow clone lacks old commits. The error has the remedy.
func TestMissingCommit(t *testing.T) {
	_, err := harness.NewNode(t.Context(), harness.Config{Daemon: harness.At(strings.Repeat("0", 40))})
	require.ErrorContains(t, err, `failed to find commit "0000000000`)
	require.ErrorContains(t, err, "run git fetch --unshallow")
}
