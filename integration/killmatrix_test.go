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
)

// killMatrixPage shows what the matrix found. A run compares what it finds with it, and writes it with -write-docs.
const killMatrixPage = "../docs/kill-matrix.md"

var writeDocs = flag.Bool("write-docs", false, "write "+killMatrixPage+" instead of comparing with it")

// TestKillMatrix kills containerd by SIGKILL at every point of everything that podfsm does to a pod. Afterwards the pod is ready
// and works, or nothing of it is left once the kubelet has stopped and removed what is listed; a further restart changes nothing.
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
		if !passed { // the next cell shall not stumble over what is left
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

// merged is what was found by this run, and by the page as it is for the cells that it didn't try.
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

func warmNode(t *testing.T) (*harness.Node, harness.Census) {
	t.Helper()
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	return n, before
}

// cell is one kill: what is under way, and where it is.
type cell struct {
	phase  string
	act    string // of which step
	moment string
	point  string
}

func (c cell) String() string { return c.phase + ": " + c.point }

// When the kill comes.
const (
	afterIntent = "after the intent"
	midAct      = "mid-act"
	acted       = "acted, not on record"
)

// stepPoints are the points of a step's act: before it, in the middle of it, and after it.
func stepPoints(phase, act string, mid ...string) []cell {
	cells := []cell{{phase, act, afterIntent, act + ".before"}}
	for _, point := range mid {
		cells = append(cells, cell{phase, act, midAct, point})
	}
	return append(cells, cell{phase, act, acted, act + ".after"})
}

// noMidAct says why a step's act has no middle.
var noMidAct = map[string]string{
	"allocate_ids.do":    "it makes nothing, the mapping is on record since the sandbox was begun",
	"allocate_ids.undo":  "there is nothing to undo",
	"declare_ready.do":   "it looks at pause and makes nothing",
	"declare_ready.undo": "there is nothing to undo",
	"remap_snapshot.undo": "it is one transaction of containerd's metadata store; the snapshotter's own removal follows in its garbage " +
		"collection, which is a row of its own where it can come during the phase",
	"start_pause.stop": "pause is killed by one system call, and its cgroup goes",
	"start_pause.undo": "as for the stop; the container's record goes in one transaction of the metadata store",
}

// The middle of what acts: in the real program, in containerd's own stores, or, where a point ends in .mid, in a system call.
var (
	doMid = map[string][]string{
		"remap_snapshot": {"snapshotter.prepare.before", "snapshotter.prepare.after"},
		// Cloned and on no record; on its way to a root of its own; about to give up its privileges and to execute pause.
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

// The phases: what is under way when the kill comes.
const (
	creating           = "create"
	rollingBack        = "rollback"
	stopping           = "stop"
	removing           = "remove"
	retryingRollback   = "retry of an owed rollback"
	retryingStop       = "retry of an owed stop"
	retryingRemoval    = "retry of an owed removal"
	adopting           = "recovery of a ready pod"
	recoveringCreation = "recovery of a creation"
	recoveringStop     = "recovery of a stop"
	recoveringRemoval  = "recovery of a removal"
	recoveringDebt     = "recovery of an owed rollback"
)

// matrix is all cells.
func matrix() []cell {
	var all []cell
	add := func(cells ...cell) { all = append(all, cells...) }

	add(cell{creating, "", "before podfsm's Create", "leases.create.after"}, cell{creating, "", "before podfsm's Create", "sandboxes.create.after"})
	for _, step := range steps {
		add(stepPoints(creating, step+".do", doMid[step]...)...)
	}
	add(cell{creating, "", "after podfsm's Start", "sandboxes.update.before"}, cell{creating, "", "after podfsm's Start", "sandboxes.update.after"})

	for _, phase := range []string{rollingBack, retryingRollback, recoveringCreation, recoveringDebt} {
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
			add(cell{phase, "remap_snapshot.undo", midAct, point})
		}
	}
	add(cell{removing, "", "after podfsm's Shutdown", "sandboxes.delete.before"}, cell{removing, "", "after podfsm's Shutdown", "sandboxes.delete.after"})
	add(stepPoints(adopting, "start_pause.exited")...)
	slices.SortStableFunc(all, func(a, b cell) int { return slices.Index(phases, a.phase) - slices.Index(phases, b.phase) })
	return all
}

var phases = []string{
	creating, rollingBack, stopping, removing, retryingRollback, retryingStop, retryingRemoval,
	adopting, recoveringCreation, recoveringStop, recoveringRemoval, recoveringDebt,
}

// slice is the part that every test run does: of each phase the middle one of each moment.
func slice(all []cell) []cell {
	groups := map[[2]string][]cell{}
	for _, c := range all {
		key := [2]string{c.phase, c.moment}
		groups[key] = append(groups[key], c)
	}
	var chosen []cell
	for _, group := range groups {
		chosen = append(chosen, group[len(group)/2])
	}
	return chosen
}

// killing is one cell being tried.
type killing struct {
	*testing.T
	n      *harness.Node
	cell   cell
	before harness.Census
	config *runtime.PodSandboxConfig
}

// kill brings a pod to the cell's point, makes sure of it, and kills containerd there.
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
	case recoveringDebt: // whose first retry was killed
		k.failCreation("1*error(not ready)")
		hits = k.armAfter("1*error(no luck)->1*die")
		run()
		require.NoError(k, k.n.Faults.WaitReached(ctx, k.cell.act+".before", 2))
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

// arm makes the cell's point block, after hits that do something else.
func (k *killing) arm(earlier string) {
	require.NoError(k, k.n.Fault(k.blocked(), earlier+"1*block"))
}

// armAfter makes the beginning of the cell's act do something else first. It returns the hit of the cell's point that blocks.
func (k *killing) armAfter(earlier string) (hits int) {
	begin := k.cell.act + ".before"
	if k.blocked() == begin {
		k.arm(earlier + "->")
		return strings.Count(earlier, "*") + 1
	}
	require.NoError(k, k.n.Fault(begin, earlier))
	k.arm("")
	return 1
}

// interrupt kills containerd at the first point of an act, and starts it again with the cell's point armed. It returns the hit that
// blocks there.
func (k *killing) interrupt(first string, act func() error) (hits int) {
	hits = 1
	if k.blocked() == first {
		k.arm("1*die->")
		hits = 2
	} else {
		require.NoError(k, k.n.Fault(first, "1*die"))
	}
	require.Error(k, act())
	require.NoError(k, k.n.Kill(k.Context()))
	if hits == 1 {
		k.arm("")
	}
	require.NoError(k, k.n.Start(k.Context()))
	return hits
}

// stalls says whether the kill comes in the middle of what the daemon itself does.
func (k *killing) stalls() bool { return strings.HasSuffix(k.cell.point, ".mid") }

// blocked is the fault point where the daemon waits: the cell's, or the one before an act that is to be stalled.
func (k *killing) blocked() string {
	if k.stalls() {
		return k.cell.act + ".before"
	}
	return k.cell.point
}

// stall lets the daemon go on from the point where it waits into the middle of the act.
func (k *killing) stall(ctx context.Context) {
	if call, ok := strings.CutPrefix(strings.TrimSuffix(k.cell.point, ".mid"), "start_pause.do."); ok {
		k.stallInit(ctx, call)
		return
	}
	k.stallPin(ctx)
}

// stallInit lets the daemon go on until what becomes pause is about to make a system call.
func (k *killing) stallInit(ctx context.Context, call string) {
	require.NoError(k, k.n.StallChild(ctx, call))
	require.NoError(k, k.n.Faults.Release(k.blocked()))
	require.NoError(k, k.n.WaitChildIn(ctx, call))
}

// stallPin lets the daemon go on until the file of the pin is there and nothing is mounted on it.
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

// restart starts containerd again and sees that the pod is ready and works, or nothing of it stays, whatever the number of restarts.
// It returns what was found.
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

// again restarts containerd once more with a pod that is listed, sees that nothing changes, and is rid of the pod.
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

// listed are the pods that the kubelet sees.
func listed(t *testing.T, n *harness.Node) []*runtime.PodSandbox {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	return list.GetItems()
}

// settled waits until podfsm has undone all that it undoes by itself, and returns the states of what stays, by id.
func settled(t *testing.T, n *harness.Node) map[string]string {
	t.Helper()
	resting := []string{"Ready", "NotReady", "Stopped", "Quarantined"}
	var states map[string]string
	if !eventually(func() bool {
		list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
		require.NoError(t, err)
		states = map[string]string{}
		for _, s := range list.GetSandboxes() {
			states[s.GetId()] = s.GetState()
		}
		return !slices.ContainsFunc(slices.Collect(maps.Values(states)), func(state string) bool { return !slices.Contains(resting, state) })
	}) {
		t.Fatalf("podfsm is still busy: %v", states)
	}
	return states
}

// works sees that containers can be started in a pod, that they have its address, and that they reach its gateway.
func works(t *testing.T, pod *harness.Pod, container string) {
	t.Helper()
	ip, err := pod.IP(t.Context())
	require.NoError(t, err)
	c := startContainer(t, pod, container)
	require.Contains(t, exec(t, c, "ip", "-4", "addr", "show", "eth0"), "inet "+ip+"/")
	exec(t, c, "ping", "-c", "1", "-W", "5", harness.Gateway)
}

// row is the page's line for a cell; without what was found, its beginning.
func (c cell) row(found string) string {
	row := fmt.Sprintf("| %s | %s | `%s` |", c.phase, c.moment, c.point)
	if found != "" {
		row += " " + found + " |\n"
	}
	return row
}

// killPage is the page of what was found.
func killPage(all []cell, found map[cell]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `<!-- Written by make kill-matrix; do not edit. -->
# The kill matrix

%[1]d times, containerd was killed by SIGKILL at the point that a row names, after that point was seen to be reached. The last column
is what `+"`TestKillMatrix`"+` found after the restart and after all that podfsm then undoes by itself. "Ready, works" means that
containers could be started in the pod, had its address and reached its gateway. "Nothing left" and "gone" mean that nothing differed
from before the pod: processes, shims, sockets, mounts, cgroups, links, addresses, iptables rules, records, leases, snapshots, files.
A pod that was listed was the same after one more restart, and one that was gone stayed gone.

Points that end in .before and .after are around what a step does (do, undo, stop), what containerd's stores do (leases, sandboxes),
or its snapshotter; the CNI plugins' are before the program runs and after it has; .mid is a system call in the
middle of what the step does, between making the file of the pin and mounting on it, or between unmounting and removing it, or one of
what becomes pause: its first, when the daemon has cloned it and has it on no record, that to a root of its own, and its last but one before it executes pause.

| under way | the kill comes | at the point | found after the restart |
|---|---|---|---|
`, len(all))
	for _, c := range all {
		if found[c] != "" {
			b.WriteString(c.row(found[c]))
		}
	}
	b.WriteString("\nThese acts have no middle:\n\n")
	for _, act := range slices.Sorted(maps.Keys(noMidAct)) {
		fmt.Fprintf(&b, "- `%s`: %s.\n", act, noMidAct[act])
	}
	return b.String()
}
