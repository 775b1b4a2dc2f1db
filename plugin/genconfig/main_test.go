package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReferenceIsUpToDate(t *testing.T) {
	docs := filepath.Join("..", "..", "docs", "reference")
	want, err := reference("..", docs)
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(docs, "configuration.md"))
	require.NoError(t, err)
	require.Equal(t, want, string(got), "docs/reference/configuration.md is stale: run go generate ./plugin")
	for _, part := range []string{"| `cni_add_timeout` | string | `\"3m\"` |", "| `userns.NAME.mode` | string |", "| `userns_pool.ranges.host_id` | integer |"} {
		require.Contains(t, want, part)
	}
}
