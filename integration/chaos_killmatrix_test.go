package integration

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/tools/page"
)

// killMatrixPage shows what the matrix found. A run compares what it finds with it, and writes it with -write-docs.
const killMatrixPage = "../docs/explanation/kill-matrix.md"

var writeDocs = flag.Bool("write-docs", false, "write "+killMatrixPage+" instead of comparing with it")

// TestKillMatrix kills containerd by SIGKILL at every point of everything that podfsm does to a
// pod. Afterwards the pod is ready and works, or nothing of it is left after the kubelet has
// stopped and removed the listed pods. A further restart changes nothing.
func TestKillMatrix(t *testing.T) {
	n, before := warmNode(t)
	page, err := os.ReadFile(killMatrixPage)
	require.True(t, err == nil || *writeDocs, "%v", err)

	all, found := matrix(), map[cell]string{}
	for _, c := range all {
		if !full() && !slices.Contains(slice(all), c) {
			continue
		}
		passed := t.Run(c.String(), func(t *testing.T) {
			k := &killing{T: t, n: n, cell: c, before: before, config: n.PodConfig("pod")}
			k.kill()
			found[c] = k.restart()
			if !*writeDocs {
				require.Contains(t, string(page), c.row(found[c]), "%s is stale, make kill-matrix writes it", killMatrixPage)
			}
		})
		if !passed { // what is left must not fail the next cell
			require.NoError(t, n.Kill(t.Context()))
			n, before = warmNode(t)
		}
	}
	now := killPage(all, merged(t, all, found))
	if *writeDocs {
		require.NoError(t, os.WriteFile(killMatrixPage, []byte(now), 0o644))
	} else if !t.Failed() {
		require.Equal(t, now, string(page), "%s is stale, make kill-matrix writes it", killMatrixPage)
	}
}

// merged returns the results of this run, with those of the existing page for the cells that were
// not run.
func merged(t *testing.T, all []cell, found map[cell]string) map[cell]string {
	t.Helper()
	page, err := os.ReadFile(killMatrixPage)
	require.True(t, err == nil || *writeDocs, "%v", err)
	every := maps.Clone(found)
	for _, c := range all {
		if _, tried := found[c]; tried {
			continue
		}
		_, rest, ok := strings.Cut(string(page), c.row(""))
		require.True(t, ok || *writeDocs, "%s lacks %v, make kill-matrix writes it", killMatrixPage, c)
		line, _, _ := strings.Cut(rest, "\n")
		every[c] = strings.TrimSpace(strings.TrimSuffix(line, "|"))
	}
	return every
}

// cell is one kill: the operation that is interrupted, and the point.
type cell struct {
	phase     string
	operation string // of which step
	moment    string
	point     string
}

func (c cell) String() string { return c.phase + ": " + c.point }

// When the kill comes.
const (
	afterIntent = "after the intent"
	midStep     = "mid-step"
	notRecorded = "done, not on record"
)

// stepPoints returns the points of a step's operation: before, in the middle and after.
func stepPoints(phase, operation string, mid ...string) []cell {
	cells := []cell{{phase, operation, afterIntent, operation + ".before"}}
	for _, point := range mid {
		cells = append(cells, cell{phase, operation, midStep, point})
	}
	return append(cells, cell{phase, operation, notRecorded, operation + ".after"})
}

// noMiddle returns why the operation of a step has no middle.
var noMiddle = map[string]string{
	"allocate_ids.do":    "it makes nothing, the mapping is on record since the sandbox was begun",
	"allocate_ids.undo":  "there is nothing to undo",
	"declare_ready.do":   "it looks at pause and makes nothing",
	"declare_ready.undo": "there is nothing to undo",
	"remap_snapshot.undo": "it is one transaction of containerd's metadata store; the snapshotter's own removal follows in its garbage " +
		"collection, which is a row of its own where it can come during the phase",
	"start_pause.stop": "pause is killed by one system call, and its cgroup goes",
	"start_pause.undo": "as for the stop; the container's record goes in one transaction of the metadata store",
}

// The middle of an operation is in the real program, in containerd's own stores, or, for a point that
// ends with .mid, in a system call.
var (
	doMid = map[string][]string{
		"remap_snapshot": {"snapshotter.prepare.before", "snapshotter.prepare.after"},
		// Cloned and not recorded; before its own root; before it drops its privileges and executes
		// pause.
		"start_pause":    {"start_pause.do.close_range.mid", "start_pause.do.pivot_root.mid", "start_pause.do.capset.mid"},
		"capture_netns":  {"capture_netns.do.mid"},
		"attach_network": {"bridge.ADD", "host-local.ADD", "host-local.ADD.after", "bridge.ADD.after", "portmap.ADD", "portmap.ADD.after"},
	}
	undoMid = map[string][]string{
		"capture_netns":  {"capture_netns.undo.mid"},
		"attach_network": {"portmap.DEL", "portmap.DEL.after", "bridge.DEL", "host-local.DEL", "host-local.DEL.after", "bridge.DEL.after"},
	}
	collected = []string{"snapshotter.remove.before", "snapshotter.remove.after"}
)

// The phases: the operation that the kill interrupts.
const (
	creating           = "create"
	rollingBack        = "rollback"
	stopping           = "stop"
	removing           = "remove"
	retryingRollback   = "retry of a pending rollback"
	retryingStop       = "retry of a pending stop"
	retryingRemoval    = "retry of a pending removal"
	adopting           = "recovery of a ready pod"
	recoveringCreation = "recovery of a creation"
	recoveringStop     = "recovery of a stop"
	recoveringRemoval  = "recovery of a removal"
	recoveringPending  = "recovery of a pending rollback"
)

// matrix returns all cells.
func matrix() []cell {
	var all []cell
	add := func(cells ...cell) { all = append(all, cells...) }

	add(cell{creating, "", "before podfsm's Create", "leases.create.after"}, cell{creating, "", "before podfsm's Create", "sandboxes.create.after"})
	for _, step := range steps {
		add(stepPoints(creating, step+".do", doMid[step]...)...)
	}
	add(cell{creating, "", "after podfsm's Start", "sandboxes.update.before"}, cell{creating, "", "after podfsm's Start", "sandboxes.update.after"})

	for _, phase := range []string{rollingBack, retryingRollback, recoveringCreation, recoveringPending} {
		for _, step := range slices.Backward(steps) {
			add(stepPoints(phase, step+".undo", undoMid[step]...)...)
		}
	}
	for _, phase := range []string{stopping, retryingStop, recoveringStop} {
		add(stepPoints(phase, "start_pause.stop")...)
		add(stepPoints(phase, "attach_network.undo", undoMid["attach_network"]...)...)
		add(stepPoints(phase, "capture_netns.undo", undoMid["capture_netns"]...)...)
	}
	for _, phase := range []string{removing, retryingRemoval, recoveringRemoval} {
		for _, step := range []string{"declare_ready", "start_pause", "remap_snapshot", "allocate_ids"} {
			add(stepPoints(phase, step+".undo")...)
		}
	}
	for _, phase := range []string{rollingBack, removing} {
		for _, point := range collected {
			add(cell{phase, "remap_snapshot.undo", midStep, point})
		}
	}
	add(cell{removing, "", "after podfsm's Shutdown", "sandboxes.delete.before"}, cell{removing, "", "after podfsm's Shutdown", "sandboxes.delete.after"})
	add(stepPoints(adopting, "start_pause.exited")...)
	slices.SortStableFunc(all, func(a, b cell) int { return slices.Index(phases, a.phase) - slices.Index(phases, b.phase) })
	return all
}

var phases = []string{
	creating, rollingBack, stopping, removing, retryingRollback, retryingStop, retryingRemoval,
	adopting, recoveringCreation, recoveringStop, recoveringRemoval, recoveringPending,
}

// slice returns the cells of every test run: the middle cell of each moment of a creation, and of
// one moment of each other phase.
func slice(all []cell) []cell {
	var chosen []cell
	for i, phase := range phases {
		var moments []string
		groups := map[string][]cell{}
		for _, c := range all {
			if c.phase != phase {
				continue
			}
			if groups[c.moment] == nil {
				moments = append(moments, c.moment)
			}
			groups[c.moment] = append(groups[c.moment], c)
		}
		if phase != creating {
			next := i % len(moments)
			moments = moments[next : next+1]
		}
		for _, moment := range moments {
			chosen = append(chosen, groups[moment][len(groups[moment])/2])
		}
	}
	return chosen
}

// killing is the run of one cell.
type killing struct {
	*testing.T
	n      *harness.Node
	cell   cell
	before harness.Census
	config *runtime.PodSandboxConfig
}

// kill brings a pod to the point of the cell, requires that it is there, and kills containerd.
func (k *killing) kill() {
	ctx, cancel := context.WithTimeout(k.Context(), waitFor)
	var calls sync.WaitGroup
	defer func() { // calls end with the daemon
		cancel()
		calls.Wait()
	}()
	run := func() { _, _ = k.n.RunPod(ctx, harness.PodfsmHandler, k.config) }
	ready := func() *harness.Pod {
		pod, err := k.n.RunPod(ctx, harness.PodfsmHandler, k.config)
		require.NoError(k, err)
		return pod
	}
	stopped := func() *harness.Pod {
		pod := ready()
		require.NoError(k, pod.Stop(ctx))
		return pod
	}
	hits := 1 // the hit of the point that blocks

	switch k.cell.phase {
	case creating:
		k.arm("")
		calls.Go(run)
	case rollingBack:
		k.failCreation("1*error(not ready)")
		k.arm("")
		calls.Go(run)
	case stopping:
		pod := ready()
		k.arm("")
		calls.Go(func() { _ = pod.Stop(ctx) })
	case removing:
		pod := stopped()
		k.arm("")
		calls.Go(func() { _ = pod.Remove(ctx) })
	case retryingRollback:
		k.failCreation("1*error(not ready)")
		hits = k.armAfter("1*error(no luck)")
		run()
	case retryingStop:
		pod := ready()
		hits = k.armAfter("1*error(no luck)")
		calls.Go(func() { _ = pod.Stop(ctx) }) // the call tries again
	case retryingRemoval:
		pod := stopped()
		hits = k.armAfter("1*error(no luck)")
		require.Error(k, pod.Remove(ctx))
	case adopting:
		ready()
		require.NoError(k, k.n.Kill(ctx))
		require.NoError(k, k.n.Fault(k.cell.point, "1*die"))
		require.Error(k, k.n.Start(ctx), "it dies while it looks at the pod")
	case recoveringCreation:
		k.failCreation("1*die")
		run()
		require.NoError(k, k.n.Kill(ctx))
		k.arm("")
		require.NoError(k, k.n.Start(ctx))
	case recoveringStop:
		hits = k.interrupt("start_pause.stop.before", func() error { return ready().Stop(ctx) })
	case recoveringRemoval:
		hits = k.interrupt("declare_ready.undo.before", func() error { return stopped().Remove(ctx) })
	case recoveringPending: // whose first retry was killed
		k.failCreation("1*error(not ready)")
		hits = k.armAfter("1*error(no luck)->1*die")
		run()
		require.NoError(k, k.n.Faults.WaitReached(ctx, k.cell.operation+".before", 2))
		require.NoError(k, k.n.Kill(ctx))
		require.NoError(k, k.n.Start(ctx))
	}
	require.NoError(k, k.n.Faults.WaitReached(ctx, k.blocked(), hits))
	if k.stalls() {
		k.stall(ctx)
	}
	require.NoError(k, k.n.Kill(k.Context()))
}

func (k *killing) failCreation(program string) {
	require.NoError(k, k.n.Fault("declare_ready.do.after", program))
}

// arm makes the point of the cell block, after a number of hits that do something else.
func (k *killing) arm(earlier string) {
	require.NoError(k, k.n.Fault(k.blocked(), earlier+"1*block"))
}

// armAfter makes the beginning of the cell's operation do something else first, and returns the number of
// the hit that blocks.
func (k *killing) armAfter(earlier string) (hits int) {
	begin := k.cell.operation + ".before"
	if k.blocked() == begin {
		k.arm(earlier + "->")
		return strings.Count(earlier, "*") + 1
	}
	require.NoError(k, k.n.Fault(begin, earlier))
	k.arm("")
	return 1
}

// interrupt kills containerd at the first point of an operation, and starts it again with the point of
// the cell armed. It returns the number of the hit that blocks.
func (k *killing) interrupt(first string, operation func() error) (hits int) {
	hits = 1
	if k.blocked() == first {
		k.arm("1*die->")
		hits = 2
	} else {
		require.NoError(k, k.n.Fault(first, "1*die"))
	}
	require.Error(k, operation())
	require.NoError(k, k.n.Kill(k.Context()))
	if hits == 1 {
		k.arm("")
	}
	require.NoError(k, k.n.Start(k.Context()))
	return hits
}

// stalls reports whether the kill comes in the middle of an operation of the daemon itself.
func (k *killing) stalls() bool { return strings.HasSuffix(k.cell.point, ".mid") }

// blocked returns the fault point at which the daemon waits: that of the cell, or the one before a
// stalled operation.
func (k *killing) blocked() string {
	if k.stalls() {
		return k.cell.operation + ".before"
	}
	return k.cell.point
}

// stall lets the daemon continue from the point at which it waits into the middle of the operation.
func (k *killing) stall(ctx context.Context) {
	if call, ok := strings.CutPrefix(strings.TrimSuffix(k.cell.point, ".mid"), "start_pause.do."); ok {
		k.stallInit(ctx, call)
		return
	}
	k.stallPin(ctx)
}

// stallInit lets the daemon continue until podfsm-init is about to make a system call.
func (k *killing) stallInit(ctx context.Context, call string) {
	require.NoError(k, k.n.StallChild(ctx, call))
	require.NoError(k, k.n.Faults.Release(k.blocked()))
	require.NoError(k, k.n.WaitChildIn(ctx, call))
}

// stallPin lets the daemon continue until the file of the pin exists and nothing is mounted on it.
func (k *killing) stallPin(ctx context.Context) {
	list, err := k.n.Sandboxes().List(ctx, &podfsmv1.ListRequest{})
	require.NoError(k, err)
	require.Len(k, list.GetSandboxes(), 1)
	pin := filepath.Join(k.n.Dir(), "state/io.containerd.grpc.v1.cri/netns/podfsm-"+list.GetSandboxes()[0].GetId())
	if strings.Contains(k.cell.point, ".undo.") {
		require.NoError(k, k.n.StallBefore(ctx, "unlinkat", pin))
	} else {
		require.NoError(k, k.n.StallAfter(ctx, "openat", pin))
	}
	require.NoError(k, k.n.Faults.Release(k.blocked()))
	require.Eventually(k, func() bool {
		var fs unix.Statfs_t
		return unix.Statfs(pin, &fs) == nil && fs.Type != unix.NSFS_MAGIC
	}, waitFor, tick, "half of a pin at %q", pin)
}

// restart starts containerd and requires that the pod is ready and works, or that nothing of it
// stays, after any number of restarts. It returns the result.
func (k *killing) restart() (found string) {
	require.NoError(k, k.n.Start(k.Context()))
	pods := listed(k.T, k.n)
	require.NoError(k, k.n.Faults.Release(k.blocked()), "what has outlived the daemon goes on")
	require.NoError(k, k.n.Heal())
	states := settled(k.T, k.n)
	if len(pods) == 0 {
		require.Empty(k, states, "nobody asks podfsm for what isn't listed")
		found = "nothing left"
	} else {
		require.Len(k, pods, 1)
		pod := k.n.FindPod(pods[0].GetId(), k.config)
		found = k.again(pod, pods[0].GetState(), states[pod.ID])
	}
	k.n.RequireClean(k, k.before)
	require.NoError(k, k.n.Restart(k.Context()))
	k.n.RequireClean(k, k.before)
	return found
}

// again restarts containerd once more with a listed pod, requires that nothing changes, and removes
// the pod.
func (k *killing) again(pod *harness.Pod, listed runtime.PodSandboxState, state string) (found string) {
	ready := listed == runtime.PodSandboxState_SANDBOX_READY
	require.Equal(k, ready, state == "Ready", "podfsm's and the kubelet's view")
	found = state + ", listed as not ready; gone after Stop and Remove"
	if ready {
		works(k.T, pod, "first")
		found = "ready, works; gone after Stop and Remove"
	}
	seen := sight(k.T, k.n, pod)
	census, err := k.n.Rest(k.Context())
	require.NoError(k, err)
	require.NoError(k, k.n.Restart(k.Context()))
	k.n.RequireClean(k, census)
	requireSame(k.T, seen, sight(k.T, k.n, pod))
	if ready {
		works(k.T, pod, "second")
	}
	require.NoError(k, pod.StopAndRemove(k.Context()))
	return found
}

// row returns the line of a cell on the page, or the beginning of the line without a result.
func (c cell) row(found string) string {
	row := page.Row(c.phase, c.moment, "`"+c.point+"`", found)
	if found == "" {
		return strings.TrimSuffix(row, "  |\n")
	}
	return row
}

// killPage returns the page with the results.
func killPage(all []cell, found map[cell]string) string {
	points := map[string]bool{}
	for _, c := range all {
		points[c.point] = true
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<!-- Written by make kill-matrix; do not edit. -->
# The kill matrix

Each of the %[1]d rows is one SIGKILL of containerd, at the point that the row names. There are
%[2]d points. The last column is what `+"`TestKillMatrix`"+` found after the restart and after everything
that podfsm then undoes by itself.

- "Ready, works": a new container starts in the pod, has its address and reaches its gateway.
- "Nothing left", "gone": nothing differs from before the pod. The test compares processes, shims,
  sockets, mounts, cgroups, links, addresses, iptables rules, records, leases, snapshots and files.
- One more restart changes nothing: a listed pod is the same, and a pod that was gone stays gone.

Names of points:

- `+"`.before` and `.after`"+` are around what a step does (do, undo, stop), or around a call of
  containerd's stores (leases, sandboxes) or snapshotter. For a CNI plugin, they are before and
  after its program.
- `+"`.mid`"+` is a system call in the middle. For the pin, it is between making the file and mounting
  on it, or between unmounting and removing it. For podfsm-init, it is its first system call, when
  no record has its pid yet, `+"`pivot_root`"+`, or its last but one before it executes pause.

%[3]s`, len(all), len(points), page.Head("under way", "the kill comes", "at the point", "found after the restart"))
	for _, c := range all {
		if found[c] != "" {
			b.WriteString(c.row(found[c]))
		}
	}
	b.WriteString("\nThese operations have no middle:\n\n")
	for _, operation := range slices.Sorted(maps.Keys(noMiddle)) {
		b.WriteString(page.Wrap(fmt.Sprintf("- `%s`: %s.", operation, noMiddle[operation]), "  "))
	}
	return b.String()
}
