package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/html"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/programs/feed"
)

// lines collects what a program writes.
func lines(r io.Reader) *feed.Feed[string] {
	all := &feed.Feed[string]{}
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			all.Add(s.Text())
		}
	}()
	return all
}

// watcher is a running podfsm watch.
type watcher struct {
	cmd            *osexec.Cmd
	stdout, stderr *feed.Feed[string]
}

// watch starts podfsm watch and waits until it follows the daemon.
func watch(t *testing.T, n *harness.Node, args ...string) *watcher {
	t.Helper()
	cmd := osexec.CommandContext(t.Context(), n.CLI(), append([]string{"--address", n.Socket(), "watch"}, args...)...)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	w := &watcher{cmd, lines(stdout), lines(stderr)}
	require.Contains(t, w.waitFor(t, w.stderr, func(all []string) bool { return len(all) > 0 })[0], "following the daemon")
	return w
}

func (w *watcher) waitFor(t *testing.T, of *feed.Feed[string], done func([]string) bool) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	all, err := of.WaitFor(ctx, done)
	require.NoError(t, err, "%q", all)
	return all
}

// subscribe collects the transitions among containerd's events, like any client of containerd, from
// its return on.
func subscribe(t *testing.T, n *harness.Node) *feed.Feed[*podfsmv1.SandboxTransition] {
	t.Helper()
	all, hello := &feed.Feed[*podfsmv1.SandboxTransition]{}, make(chan struct{}, 1)
	envelopes, _ := n.Containerd.Subscribe(t.Context(), `topic=="/podfsm/sandbox/transition"`, `topic=="/hello"`)
	go func() {
		for envelope := range envelopes {
			event, err := typeurl.UnmarshalAny(envelope.Event)
			if transition, ok := event.(*podfsmv1.SandboxTransition); ok && err == nil {
				all.Add(transition)
				continue
			}
			select {
			case hello <- struct{}{}:
			default:
			}
		}
	}()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	require.Eventually(t, func() bool {
		require.NoError(t, n.Containerd.EventService().Publish(ctx, "/hello", &eventtypes.SandboxCreate{SandboxID: "hello"}))
		return len(hello) > 0
	}, waitFor, tick)
	return all
}

// states returns the states of a sandbox by its transitions, whose numbers must be consecutive.
func entered(t *testing.T, told []*podfsmv1.SandboxTransition, id string) (states []string) {
	t.Helper()
	for _, one := range told {
		if one.GetSandboxId() != id {
			continue
		}
		states = append(states, one.GetTransition().GetTo())
		require.EqualValues(t, len(states), one.GetTransition().GetSeq(), "%v", told)
	}
	return states
}

// requireFoundByConfig runs the inspecting commands on a node with a ready and a failed pod, as an
// operator does: containerd's configuration has the socket and the directories.
func requireFoundByConfig(t *testing.T, n *harness.Node, failed, ready string) {
	t.Helper()
	run := func(want int, args ...string) string {
		t.Helper()
		cmd := osexec.CommandContext(t.Context(), n.CLI(), append([]string{"--config", filepath.Join(n.Dir(), "config.toml")}, args...)...)
		var out, errOut strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errOut
		if err := cmd.Run(); err != nil {
			require.ErrorAs(t, err, new(*osexec.ExitError))
		}
		require.Equal(t, want, cmd.ProcessState.ExitCode(), "%q: %s", args, errOut.String())
		return out.String()
	}
	require.Regexp(t, `(?m)^Daemon: +podfsm \S+, containerd \S+, up for .*\nDegraded: +no\nFailed checks: +none\nSandboxes: +1: 1 Ready\n`, run(0, "status"))
	require.Regexp(t, `(?m)^Slowest step: +\S+ of default/story, \S+$`, run(0, "status"))
	status := &podfsmv1.StatusResponse{}
	require.NoError(t, protojson.Unmarshal([]byte(run(0, "status", "-o", "json")), status))
	require.NotNil(t, status.GetLastRecovery(), "the first start has found nothing")
	require.Regexp(t, `\nDaemon:  podfsm \S+, containerd \S+\n$`, run(0, "version"))

	require.Equal(t, ready+"\n", run(0, "ps", "-q", "-n", "default", "--state", "Ready"))
	require.Empty(t, run(0, "ps", "--no-headers", "--state", "NotReady"))
	require.True(t, strings.HasSuffix(run(0, "ps", "-a", "-q", "--sort-by", "age"), failed+"\n"+ready+"\n"))
	require.Regexp(t, `(?m)^State: +Ready for `, run(0, "describe", "story"))
	require.Empty(t, run(4, "describe", "nobody"))
	require.Empty(t, run(64, "describe"))
	timeline := &podfsmv1.TimelineOutput{}
	require.NoError(t, protojson.Unmarshal([]byte(run(0, "timeline", "-o", "json", failed)), timeline))
	require.Equal(t, "Creation and rollback", timeline.GetPeriods()[0].GetTitle())
	require.Equal(t, "No leaks found\n", run(0, "leaks", failed))
	require.Regexp(t, `a drain would take no new pods and wait for 1 sandbox:\n.*\n`+ready[:13], run(0, "drain", "--dry-run"))
	require.NotContains(t, run(0, "ps", "-o", "json"), `"drainingSince"`)

	logs := run(0, "logs", "--file", filepath.Join(n.Dir(), "containerd.log"), failed)
	require.Contains(t, logs, "no ports today")
	for line := range strings.Lines(logs) {
		require.Regexp(t, failed+"|"+timeline.GetSandbox().GetTraceId(), line)
	}
	file := filepath.Join(t.TempDir(), "bundle.tar.gz")
	require.Equal(t, file+"\n", run(0, "bundle", "--file", file))
	list, err := osexec.CommandContext(t.Context(), "tar", "-tzf", file).CombinedOutput()
	require.NoError(t, err, string(list))
	require.Contains(t, string(list), "/sandboxes/"+failed+".txt\n")
	require.Contains(t, run(0, "completion", "bash"), "podfsm")
	require.Contains(t, run(0, "--generate-shell-completion"), "timeline")
}

// An operator who knows the name of a pod finds the failed step and its attempt, what was undone,
// and which cleanup is pending: during the failure, later, while the daemon is down, and after it
// was killed.
func TestCLI(t *testing.T) {
	n, before := warmNode(t)
	table, stream, one := watch(t, n), watch(t, n, "-o", "json"), watch(t, n, "default/nobody")
	events := subscribe(t, n)

	// The second plugin of the chain fails, and so does its first DEL.
	require.NoError(t, n.Fault("portmap.ADD", "1*error(no ports today)"))
	require.NoError(t, n.Fault("portmap.DEL", "1*error(no luck)"))
	require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("story")), "no ports today")
	failed := looked(t, n, "default/story").GetSandbox().GetId()
	require.Eventually(t, func() bool { return looked(t, n, failed).GetSandbox().GetState() == "RolledBack" }, waitFor, tick, "the pending cleanup has completed")
	pod := runPod(t, n, n.PodConfig("story", attempt(1)))

	created := []string{"IDsAllocated", "SnapshotRemapped", "PauseStarted", "NetNSCaptured"}
	rolledBack := slices.Concat(created, []string{"RollingBack", "CleanupOwed", "RollingBack", "RolledBack"})
	ready := slices.Concat(created, []string{"NetworkReady", "Ready"})
	t.Run("events", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), waitFor)
		defer cancel()
		total := len(rolledBack) + len(ready)
		told, err := events.WaitFor(ctx, func(all []*podfsmv1.SandboxTransition) bool { return len(all) >= total })
		require.NoError(t, err)
		require.Len(t, told, total, "each comes once")
		require.Equal(t, rolledBack, entered(t, told, failed))
		require.Equal(t, ready, entered(t, told, pod.ID))
		rollback := told[4]
		require.Equal(t, "story", rollback.GetPodName())
		require.Equal(t, "default", rollback.GetPodNamespace())
		require.Equal(t, pod.Config.GetMetadata().GetUid(), rollback.GetPodUid())
		require.Equal(t, "attach_network", rollback.GetTransition().GetStep())
		require.Contains(t, rollback.GetTransition().GetError(), "no ports today")
		require.NotEmpty(t, rollback.GetTransition().GetErrorType())
		require.EqualValues(t, 1, told[total-1].GetAttempt())

		watched := stream.waitFor(t, stream.stdout, func(all []string) bool { return len(all) >= total })
		for i, line := range watched {
			require.True(t, json.Valid([]byte(line)), line)
			transition := &podfsmv1.SandboxTransition{}
			require.NoError(t, protojson.Unmarshal([]byte(line), transition))
			require.True(t, proto.Equal(told[i], transition), "%v\n%v", told[i], transition)
		}
		text := strings.Join(table.waitFor(t, table.stdout, func(all []string) bool { return len(all) > total }), "\n")
		require.Regexp(t, `(?m)^\S+ +`+failed[:13]+` +0 +default/story +\S+ +RollingBack +step attach_network of pod .*no ports today`, text)
		require.Regexp(t, `(?m)^\S+ +`+pod.ID[:13]+` +1 +default/story +\S+ +Ready$`, text)
		require.Len(t, one.waitFor(t, one.stdout, func(all []string) bool { return len(all) > 0 }), 1, "another pod's transitions are none of its")
	})

	requireStory := func(t *testing.T) {
		t.Helper()
		out := timelineOf(t, n, "--attempt", "0", "story")
		for _, want := range []string{
			`Pod: +default/story, uid \S+, attempt 0`,
			`State: +RolledBack for `,
			`Failed: +attach_network`,
			`(?m)^attach_network +\+\S+ +\S+ \[ *x+ *\]$`,
			`(?m)^  \S*/bridge ADD +\+\S+ +\S+ \[ *=+ *\]$`,
			`(?m)^  \S*/portmap ADD +\+\S+ +\S+ \[ *x+ *\]$`,
			`(?m)^undo attach_network +\+\S+ +\S+ \[ *!+ *\]$`,
			`Rollback, tried again, from`,
			`(?m)^undo attach_network +\+\S+ +\S+ \[ *-+ *\]$`,
			`(?m)^  \S*/portmap DEL +\+\S+ +\S+ \[ *-+ *\]$`,
			`(?m)^undo start_pause +\+\S+ +\S+ \[ *-+ *\]$`,
			`no ports today`,
			`no luck`,
			`(?m)^\* +0 +` + failed[:13] + ` .* RolledBack +attach_network$`,
			`(?m)^ +1 +` + pod.ID[:13],
		} {
			require.Regexp(t, want, out)
		}
		for line := range strings.Lines(out) {
			require.LessOrEqual(t, len([]rune(strings.TrimSuffix(line, "\n"))), 80, line)
		}
		require.NotContains(t, out, "\x1b", "it is no terminal")
	}
	t.Run("timeline", func(t *testing.T) {
		requireStory(t)
		out := timelineOf(t, n, "story")
		require.Regexp(t, `(?m)^State: +Ready for `, out)
		require.Regexp(t, `(?m)^  \S*/portmap ADD +\+\S+ +\S+ \[ *=+ *\]$`, out)
		require.Contains(t, timelineOf(t, n, failed[:8]), "Sandbox:  "+failed)
		out, _, code := cli(t, n, "graph", "-o", "dot", failed)
		require.Zero(t, code)
		require.Contains(t, out, `"NetNSCaptured" -> "RollingBack" [label="roll_back (5)"`)
	})
	t.Run("page", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "story.html")
		timelineOf(t, n, "--html", file, failed)
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		root, err := html.Parse(strings.NewReader(string(text)))
		require.NoError(t, err)
		var words strings.Builder
		for node := range root.Descendants() {
			require.NotContains(t, []string{"script", "link", "img", "iframe", "a"}, node.Data)
			if node.Type == html.TextNode {
				words.WriteString(node.Data + " ")
			}
		}
		for _, want := range []string{"default/story", "attach_network", "portmap ADD", "undo failed", "no ports today", "no luck", "RolledBack", "Sandboxes of this pod"} {
			require.Contains(t, words.String(), want)
		}
	})

	t.Run("by the configuration alone", func(t *testing.T) { requireFoundByConfig(t, n, failed, pod.ID) })

	// The history stays: of the ended sandbox, of one that is ending, and of one that lives on.
	alive := runPod(t, n, n.PodConfig("alive"))
	require.NoError(t, pod.StopAndRemove(t.Context()))
	wasFailed, wasRemoved, wasAlive := looked(t, n, failed), looked(t, n, "story"), looked(t, n, "alive")
	require.Equal(t, "Removed", wasRemoved.GetSandbox().GetState())
	require.Equal(t, pod.ID, wasRemoved.GetSandbox().GetId())
	requireKept := func(t *testing.T) {
		t.Helper()
		for ref, was := range map[string]*podfsmv1.InspectResponse{failed: wasFailed, "default/story": wasRemoved, "alive": wasAlive} {
			is := looked(t, n, ref)
			require.True(t, proto.Equal(was, is), "%s\n%v\n%v", ref, was, is)
		}
		requireStory(t)
		out, _, code := cli(t, n, "ps", "--all")
		require.Zero(t, code)
		require.Regexp(t, `(?m)^`+failed[:13]+` +default/story +RolledBack +\S+ +- +- +\S+ +0 +attach_network$`, out)
		require.Regexp(t, `(?m)^`+pod.ID[:13]+` +default/story +Removed +\S+ +- +- +\S+ +1 +-$`, out)
		require.Regexp(t, `(?m)^`+alive.ID[:13]+` +default/alive +Ready `, out)
		out, _, code = cli(t, n, "ps")
		require.Zero(t, code)
		require.NotContains(t, out, failed[:13])
	}
	requireKept(t)
	require.NoError(t, n.Kill(t.Context()))
	t.Run("while the daemon is down", func(t *testing.T) {
		for _, w := range []*watcher{table, stream, one} {
			w.waitFor(t, w.stderr, func(all []string) bool {
				return strings.HasSuffix(all[len(all)-1], "has gone; waiting for the next one")
			})
		}
		requireKept(t)
		_, errOut, code := cli(t, n, "watch")
		require.Equal(t, 3, code)
		require.Contains(t, errOut, "is the daemon running?")
		out, _, code := cli(t, n, "status")
		require.Equal(t, 3, code)
		require.Regexp(t, `(?m)^Sandboxes: +1: 1 Ready$`, out)
	})
	require.NoError(t, n.Start(t.Context()))
	t.Run("after it was killed", requireKept)
	t.Run("watchers go on", func(t *testing.T) {
		for _, w := range []*watcher{table, stream, one} {
			w.waitFor(t, w.stderr, func(all []string) bool {
				return strings.Contains(all[len(all)-1], "following the daemon") && len(all) > 2
			})
		}
		before := len(table.stdout.Items())
		late := runPod(t, n, n.PodConfig("late"))
		all := table.waitFor(t, table.stdout, func(all []string) bool { return len(all) >= before+len(ready) })
		require.Regexp(t, `default/late .* Ready$`, all[before+len(ready)-1], "nothing is told twice")
		require.NoError(t, late.StopAndRemove(t.Context()))
		for _, w := range []*watcher{table, stream, one} {
			require.NoError(t, w.cmd.Process.Kill())
			_ = w.cmd.Wait() // it was killed
		}
	})

	// A damaged or read-only history has no other effect.
	require.NoError(t, n.Stop(t.Context()))
	past := filepath.Join(ledgerDirs(n)[0], "history")
	rewrite(t, past, func(text []byte) []byte { return append([]byte("{damaged\n"), text[len(text)/2:]...) })
	require.NoError(t, n.Start(t.Context()))
	again := runPod(t, n, n.PodConfig("again"))
	require.NoError(t, again.StopAndRemove(t.Context()))
	require.Equal(t, "Removed", looked(t, n, again.ID).GetSandbox().GetState())

	// The transitions of an adopted sandbox continue with the next number.
	told := subscribe(t, n)
	require.NoError(t, alive.StopAndRemove(t.Context()))
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	all, err := told.WaitFor(ctx, func(all []*podfsmv1.SandboxTransition) bool { return len(all) >= 4 })
	require.NoError(t, err)
	require.EqualValues(t, len(ready)+1, all[0].GetTransition().GetSeq())
	require.Equal(t, "Removed", all[3].GetTransition().GetTo())
	n.RequireClean(t, before)
}
