package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// firstFormat is the commit that fixes the format of the first release, 0.1.0. Every later commit
// reads the format, and the first release reads that of every later commit.
const firstFormat = "68069533defbfe1980987cb0d596069a5804a491"

// A node is upgraded from the first release to this build and downgraded again, with pods in every
// state. Each time, the daemon is killed in the middle of all operations.
func TestUpgradeFromFirstRelease(t *testing.T) {
	t.Parallel() // it mostly waits
	u := startUpgrade(t, harness.At(firstFormat))
	u.change("up", harness.TestDaemon)
	u.change("down", harness.At(firstFormat))
	u.end(harness.TestDaemon)
}

// upgrade is a node whose daemon is replaced by other builds.
type upgrade struct {
	*testing.T
	n      *harness.Node
	before harness.Census
	ready  []*readyPod
	lost   *harness.Pod   // without records
	calls  sync.WaitGroup // that end with the daemon
	want   map[string]string
	healed map[string]string // what want becomes once the causes of failures are gone

	// unknown is a step of the last daemon that the next one does not have, or nil. Its cleanup
	// stays pending until a release with the step runs, and the error names the release that
	// recorded it.
	unknown *unknownStep
}

// unknownStep is a step that only the other build has.
type unknownStep struct {
	name, after string
	release     string // that recorded it
}

// begunBefore reports whether the creation path begins the unknown step before another step, or
// whether both are the same.
func (s *unknownStep) begunBefore(step string) bool {
	return s != nil && (step == s.name || slices.Index(steps, s.after) < slices.Index(steps, step))
}

// readyPod is a pod that must not notice the replacement of the daemon.
type readyPod struct {
	*harness.Pod
	main *harness.Container
	was  identity
}

// identity distinguishes the sandboxes of a pod.
type identity struct {
	state         runtime.PodSandboxState
	createdAt     int64
	pid           int
	netns, userns string
	ips           string
}

// startUpgrade makes a node with a pod of every mode, and a pod without records.
func startUpgrade(t *testing.T, from harness.Daemon) *upgrade {
	config := modesConfig()
	config.Daemon = from
	n, before := startNodeWithPool(t, config)
	u := &upgrade{T: t, n: n, before: before, want: map[string]string{}, healed: map[string]string{}}
	u.loseRecords()
	u.runReadyPods()
	return u
}

// loseRecords leaves a running pod without records.
func (u *upgrade) loseRecords() {
	u.lost = u.runPod("lost")
	require.NoError(u, u.n.Kill(u.Context()))
	ledger, err := filepath.Glob(filepath.Join(u.n.Dir(), "*", pluginDir, "ledger*"))
	require.NoError(u, err)
	require.NotEmpty(u, ledger)
	for _, file := range ledger {
		require.NoError(u, os.Remove(file))
	}
	require.NoError(u, u.n.Start(u.Context()))
	u.expect(u.lost.Config, "Quarantined", "Quarantined")
}

// runReadyPods runs a pod with a container in every mode.
func (u *upgrade) runReadyPods() {
	modes := append([]userMode{hostUsers, {"host network", harness.PodfsmHandler, harness.HostNetwork(), false}}, userModes...)
	for _, mode := range modes {
		u.runReady(mode.handler, u.n.PodConfig("ready-"+mode.name, mode.option))
	}
}

func (u *upgrade) runReady(handler string, config *runtime.PodSandboxConfig) {
	pod, err := u.n.RunPod(u.Context(), handler, config)
	require.NoError(u, err)
	p := &readyPod{Pod: pod, main: startContainer(u.T, pod, "main")}
	p.was = u.identify(pod)
	u.ready = append(u.ready, p)
	u.expect(config, "Ready", "Ready")
}

// change brings pods into every state, kills the daemon in the middle of that, and starts another
// build.
func (u *upgrade) change(direction string, to harness.Daemon) {
	name := func(pod string) string { return direction + "-" + pod }
	u.runReady(harness.PodfsmHandler, u.n.PodConfig(name("ready")))
	u.runNotReady(name("not-ready"))
	stopped := u.runPod(name("stopped"))
	require.NoError(u, stopped.Stop(u.Context()))
	u.expect(stopped.Config, "Stopped", "Stopped")
	again := u.interruptCreations(name)
	u.interruptEnds(name)
	u.leaveCleanupsPending(name)

	require.NoError(u, u.n.Kill(u.Context()))
	u.calls.Wait()
	require.NoError(u, u.n.Use(u.Context(), to))
	require.NoError(u, u.n.Start(u.Context()))
	u.requireStates("after the restart, without help")
	u.requireReadySame()

	require.NoError(u, u.n.Heal())
	u.want = maps.Clone(u.healed)
	u.requireStates("once the causes are gone")
	runOnce(u.T, u.n, again)
	u.removeOthers()
	for _, p := range u.ready {
		require.Equal(u, p.was, u.identify(p.Pod), p.Config.GetMetadata().GetName())
	}
}

// end stops the daemon, starts another build, and ends the ready pods.
func (u *upgrade) end(by harness.Daemon) {
	require.NoError(u, u.n.Stop(u.Context()))
	require.NoError(u, u.n.Use(u.Context(), by))
	require.NoError(u, u.n.Start(u.Context()))
	u.requireStates("after the last restart")
	u.requireReadySame()
	for _, p := range u.ready {
		require.NoError(u, p.StopAndRemove(u.Context()))
	}
	require.NoError(u, u.lost.StopAndRemove(u.Context()))
	u.n.RequireClean(u, u.before)
}

// expect sets the state of a pod after the daemon was replaced, and after the causes of failures
// are gone: a state, with the goal of a pending cleanup, or "" for a pod that is gone.
func (u *upgrade) expect(config *runtime.PodSandboxConfig, state, healed string) {
	name := config.GetMetadata().GetName()
	set := func(states map[string]string, state string) {
		delete(states, name)
		if state != "" {
			states[name] = state
		}
	}
	set(u.want, state)
	set(u.healed, healed)
}

func (u *upgrade) requireStates(when string) {
	var now map[string]string
	same := eventually(func() bool {
		list, err := u.n.Sandboxes().List(u.Context(), &podfsmv1.ListRequest{})
		require.NoError(u, err)
		now = map[string]string{}
		for _, s := range list.GetSandboxes() {
			now[s.GetPodName()] = s.GetState()
			if s.GetGoal() != "" {
				now[s.GetPodName()] += " for " + s.GetGoal()
			}
		}
		return maps.Equal(now, u.want)
	})
	if !same {
		require.Equal(u, u.want, now, when)
	}
}

func (u *upgrade) runPod(name string) *harness.Pod { return runPod(u.T, u.n, u.n.PodConfig(name)) }

func (u *upgrade) runNotReady(name string) {
	pod := u.runPod(name)
	pid, err := pod.Pid(u.Context())
	require.NoError(u, err)
	require.NoError(u, unix.Kill(pid, unix.SIGKILL))
	require.Eventually(u, func() bool {
		status, err := pod.Status(u.Context())
		return err == nil && status.GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY
	}, waitFor, tick)
	u.expect(pod.Config, "NotReady", "NotReady")
}

// interruptCreations leaves a creation in the middle of each step, and a creation in the middle of
// its rollback, whose pod it returns.
func (u *upgrade) interruptCreations(name func(string) string) *runtime.PodSandboxConfig {
	moments := map[string][]string{"start_pause": {"after"}, "attach_network": {"after"}}
	if full() {
		for _, step := range steps {
			moments[step] = []string{"before", "after"}
		}
	}
	if u.unknown != nil {
		moments[u.unknown.name] = []string{"before", "after"}
	}
	for step, whens := range sorted(moments) {
		for _, when := range whens {
			config := u.n.PodConfig(name("half-made-" + step + "-" + when))
			u.hold(config, step+".do", when, func(ctx context.Context) { _, _ = u.n.RunPod(ctx, harness.PodfsmHandler, config) })
			if u.unknown.begunBefore(step) {
				u.expect(config, "CleanupOwed for RolledBack", "CleanupOwed for RolledBack")
			} else {
				u.expect(config, "", "")
			}
		}
	}
	config := u.n.PodConfig(name("rolling-back"))
	u.fault(config, "declare_ready.do", "after", "error(not ready)")
	u.hold(config, "capture_netns.undo", "before", func(ctx context.Context) { _, _ = u.n.RunPod(ctx, harness.PodfsmHandler, config) })
	u.expect(config, "", "")
	return config
}

// interruptEnds leaves a stop and a removal under way.
func (u *upgrade) interruptEnds(name func(string) string) {
	stopping := u.runPod(name("stopping"))
	u.hold(stopping.Config, "attach_network.undo", "after", func(ctx context.Context) { _ = stopping.Stop(ctx) })
	u.expect(stopping.Config, "Stopped", "Stopped")

	removing := u.runPod(name("removing"))
	require.NoError(u, removing.Stop(u.Context()))
	u.hold(removing.Config, "remap_snapshot.undo", "before", func(ctx context.Context) { _ = removing.Remove(ctx) })
	u.expect(removing.Config, "", "")
}

// leaveCleanupsPending leaves a pending cleanup of each goal. The cleanups fail until they are
// healed.
func (u *upgrade) leaveCleanupsPending(name func(string) string) {
	rollback := u.n.PodConfig(name("pending-rollback"))
	u.fault(rollback, "declare_ready.do", "after", "error(not ready)")
	u.fault(rollback, "attach_network.undo", "before", "error(no luck)")
	_, err := u.n.RunPod(u.Context(), harness.PodfsmHandler, rollback)
	require.ErrorContains(u, err, "no luck")
	u.expect(rollback, "CleanupOwed for RolledBack", "")

	stop := u.runPod(name("pending-stop"))
	u.fault(stop.Config, "capture_netns.undo", "before", "error(no luck)")
	require.ErrorContains(u, stop.Stop(u.Context()), "no luck")
	u.expect(stop.Config, "CleanupOwed for Stopped", "Stopped")

	removal := u.runPod(name("pending-removal"))
	u.fault(removal.Config, "start_pause.undo", "before", "error(no luck)")
	require.NoError(u, removal.Stop(u.Context()))
	require.ErrorContains(u, removal.Remove(u.Context()), "no luck")
	u.expect(removal.Config, "CleanupOwed for Removed", "")
}

// fault sets the program of a point of one pod.
func (u *upgrade) fault(config *runtime.PodSandboxConfig, act, when, program string) string {
	point := fmt.Sprintf("%s@%s.%s", act, config.GetMetadata().GetName(), when)
	require.NoError(u, u.n.Fault(point, program))
	return point
}

// hold begins a call and waits until it blocks at a point of the pod. The call ends with the
// daemon.
func (u *upgrade) hold(config *runtime.PodSandboxConfig, act, when string, call func(context.Context)) {
	point := u.fault(config, act, when, "1*block")
	u.calls.Go(func() { call(u.Context()) })
	require.NoError(u, u.n.Faults.WaitReached(u.Context(), point, 1))
}

func (u *upgrade) identify(pod *harness.Pod) identity {
	status, err := pod.Status(u.Context())
	require.NoError(u, err)
	pid, err := pod.Pid(u.Context())
	require.NoError(u, err)
	namespace := func(kind string) string {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		require.NoError(u, err)
		return link
	}
	return identity{
		state: status.GetState(), createdAt: status.GetCreatedAt(), pid: pid,
		netns: namespace("net"), userns: namespace("user"), ips: fmt.Sprint(podIPs(u.T, pod)),
	}
}

// requireReadySame requires that the ready pods are unchanged, and that their containers run.
func (u *upgrade) requireReadySame() {
	for _, p := range u.ready {
		require.Equal(u, p.was, u.identify(p.Pod), p.Config.GetMetadata().GetName())
		exec(u.T, p.main, "true")
	}
	u.lateContainer()
}

// lateContainer starts a container in a pod of an earlier daemon, and removes it.
func (u *upgrade) lateContainer() {
	late := startContainer(u.T, u.ready[0].Pod, "late")
	exec(u.T, late, "true")
	require.NoError(u, late.Stop(u.Context(), 0))
	require.NoError(u, late.Remove(u.Context()))
}

// removeOthers removes all listed pods except for the ready ones and the lost one, as the kubelet
// does.
func (u *upgrade) removeOthers() {
	keep := map[string]bool{u.lost.ID: true}
	for _, p := range u.ready {
		keep[p.ID] = true
	}
	for _, item := range listed(u.T, u.n) {
		if keep[item.GetId()] {
			continue
		}
		config := &runtime.PodSandboxConfig{Metadata: item.GetMetadata()}
		pod := u.n.FindPod(item.GetId(), config)
		require.NoError(u, pod.Stop(u.Context()))
		err := pod.Remove(u.Context())
		if u.unknown != nil {
			require.ErrorContains(u, err, u.unknown.text())
			u.expect(config, "CleanupOwed for Removed", "CleanupOwed for Removed")
			continue
		}
		require.NoError(u, err)
		u.expect(config, "", "")
	}
	u.requireStates("after the removal of what is listed")
}
