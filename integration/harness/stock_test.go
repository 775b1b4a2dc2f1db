package harness_test

import (
	"context"
	"io"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

func itoa(i int) string { return strconv.Itoa(i) }

// start makes a node of stock containerd and warms it up.
func start(t *testing.T, c harness.Config) (*harness.Node, harness.Census) {
	t.Helper()
	c.Daemon = harness.Stock
	n := harness.StartNode(t, c)
	before, err := n.WarmUp(t.Context(), harness.StockHandler)
	require.NoError(t, err)
	return n, before
}

// soon returns a context for something that must happen at once, even on a busy machine.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience(20*time.Second))
	t.Cleanup(cancel)
	return ctx
}

func get(t *testing.T, n *harness.Node, url string) string {
	t.Helper()
	resp, err := n.HTTP().Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}
