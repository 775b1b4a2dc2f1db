package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

// counter is the body of [agent] that counts in a directory how many DELs run. If the gate is
// there, each DEL takes a byte out of it before it ends.
const counter = `cd %s || exit 0
mkdir -p running/$CNI_CONTAINERID
ls running | wc -l >> counts
[ ! -p gate ] || read -r _ < gate
rmdir running/$CNI_CONTAINERID
exit 0`

// TestStopsAtOnce stops more adopted pods at once than DELs of one plugin may run. All stops
// succeed.
func TestStopsAtOnce(t *testing.T) {
	const pods, atATime = 40, 32
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	dir := t.TempDir()
	installPlugin(t, n, "counter", fmt.Sprintf(agent, fmt.Sprintf(counter, dir)))
	require.NoError(t, n.SetChain(t.Context(), harness.Plugin{"type": "counter"}))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	all := make([]*harness.Pod, pods)
	atOnce(t, pods, 8, func(ctx context.Context, i int) (err error) {
		all[i], err = n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig(fmt.Sprint("pod-", i), harness.HostUsers()))
		return err
	})
	require.NoError(t, n.Restart(t.Context()))
	earlier := len(counts(t, dir)) // of the warm-up

	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "gate"), 0o600))
	gate, err := os.OpenFile(filepath.Join(dir, "gate"), os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { gate.Close() }) // which ends each DEL that still waits
	const beforeDEL = "attach_network.undo.before"
	require.NoError(t, n.Fault(beforeDEL, "off")) // it only counts
	stop, ctx := errgroup.WithContext(t.Context())
	for _, pod := range all {
		stop.Go(func() error { return pod.Stop(ctx) })
	}
	require.NoError(t, n.Faults.WaitReached(t.Context(), beforeDEL, pods))
	require.Eventually(t, func() bool { return len(counts(t, dir)) == earlier+atATime }, waitFor, tick)
	_, err = gate.WriteString(strings.Repeat("\n", pods))
	require.NoError(t, err)
	require.NoError(t, stop.Wait())
	require.Len(t, counts(t, dir), earlier+pods)
	require.Equal(t, atATime, slices.Max(counts(t, dir)))

	for _, pod := range all {
		require.NoError(t, pod.Remove(t.Context()))
	}
	n.RequireClean(t, before)
}

// counts returns how many DELs ran when each one began.
func counts(t *testing.T, dir string) (all []int) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "counts"))
	require.NoError(t, err)
	for _, field := range strings.Fields(string(text)) {
		count, err := strconv.Atoi(field)
		require.NoError(t, err)
		all = append(all, count)
	}
	return all
}
