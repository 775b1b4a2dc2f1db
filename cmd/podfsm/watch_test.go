package main

import (
	"bytes"
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func (f fakeSandboxes) Watch(_ *podfsmv1.WatchRequest, stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
	return f.watch(stream)
}

// told are the transitions of two pods.
func told() (all []*podfsmv1.SandboxTransition) {
	for _, s := range []*podfsmv1.Sandbox{ready, pending} {
		of := readyInspection
		if s == pending {
			of = pendingInspection
		}
		for _, t := range of.GetTransitions() {
			t = proto.CloneOf(t)
			t.After = durationpb.New(time.Duration(t.GetSeq()+1) * ms)
			all = append(all, &podfsmv1.SandboxTransition{
				SandboxId: s.GetId(), ContainerdNamespace: s.GetContainerdNamespace(), PodName: s.GetPodName(), PodNamespace: s.GetPodNamespace(),
				PodUid: s.GetPodUid(), Attempt: s.GetAttempt(), Transition: t,
			})
		}
	}
	all[len(all)-1].Transition.Error = hostile
	return all
}

// tells is a daemon that lists some sandboxes, sends all transitions, and then ends the stream with
// an error.
func tells(end error, listed ...*podfsmv1.Sandbox) fakeSandboxes {
	return fakeSandboxes{list: func() []*podfsmv1.Sandbox { return listed }, watch: func(stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
		if err := stream.SendHeader(metadata.MD{}); err != nil {
			return err
		}
		for _, t := range told() {
			if err := stream.Send(t); err != nil {
				return err
			}
		}
		return end
	}}
}

// watched runs a watching command until its output has a number of lines.
func watched(t *testing.T, lines int, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out := &countedLines{most: lines, reached: cancel}
	var errOut bytes.Buffer
	err = run(ctx, append([]string{"podfsm"}, args...), out, &errOut)
	return out.String(), errOut.String(), err
}

// countedLines calls reached after a number of lines.
type countedLines struct {
	bytes.Buffer
	most    int
	reached func()
}

func (c *countedLines) Write(p []byte) (int, error) {
	n, err := c.Buffer.Write(p)
	if bytes.Count(c.Bytes(), []byte("\n")) >= c.most {
		c.reached()
	}
	return n, err
}

func TestWatch(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, writeWatchHeader(&b))
	require.NoError(t, writeTransition(&b, standing(starting), time.UTC))
	for _, transition := range told() {
		require.NoError(t, writeTransition(&b, transition, time.UTC))
	}
	requireGolden(t, "watch.txt", b.Bytes())

	address := serve(t, tells(nil, starting))
	out, errOut, err := watched(t, strings.Count(b.String(), "\n"), "--address", address, "watch")
	require.NoError(t, err, "it was told to end")
	require.True(t, strings.HasPrefix(errOut, "podfsm: following the daemon at "+address+"\n"), errOut)
	require.Equal(t, strings.Count(b.String(), "\n"), strings.Count(out, "\n"))
	require.Regexp(t, `(?m)^\S+ +9d +2 +default/slow +- +NetNSCaptured$`, out)
	require.Regexp(t, `(?m)^\S+ +3b1f0c9a7e5d4 +0 +default/web +7ms +Ready$`, out)

	out, _, err = watched(t, len(readyInspection.GetTransitions()), "--address", address, "watch", "-o", "json", "default/web")
	require.NoError(t, err)
	requireGolden(t, "watch.json", []byte(out))

	out, _, err = watched(t, 2, "--address", address, "watch", pending.GetId()[:6])
	require.NoError(t, err)
	require.NotContains(t, out, "default/web")
	require.Contains(t, out, "CleanupOwed")
}

// watch waits for a daemon that restarts. It reports what changed in the meantime, and nothing
// twice.
func TestWatchSurvivesARestart(t *testing.T) {
	var daemons atomic.Int32
	gone, stopped := proto.CloneOf(ready), proto.CloneOf(ready)
	gone.Id, gone.PodName, gone.State, gone.Seq = lostID, "gone", "Removed", 9
	stopped.State, stopped.Seq = "NotReady", 7
	step := func(seq uint64, s *podfsmv1.Sandbox, to string) *podfsmv1.SandboxTransition {
		return &podfsmv1.SandboxTransition{SandboxId: s.GetId(), PodName: s.GetPodName(), PodNamespace: s.GetPodNamespace(),
			Transition: &podfsmv1.Transition{Seq: seq, At: at(0), Event: "e", To: to}}
	}
	address := serve(t, fakeSandboxes{
		ended: []*podfsmv1.Sandbox{gone, crashed.GetSandbox()},
		list: func() []*podfsmv1.Sandbox {
			if daemons.Load() < 2 {
				return nil
			}
			return []*podfsmv1.Sandbox{stopped}
		},
		watch: func(stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
			first := daemons.Add(1) == 1
			if err := stream.SendHeader(metadata.MD{}); err != nil {
				return err
			}
			tell := []*podfsmv1.SandboxTransition{step(6, ready, "Ready"), step(8, gone, "Stopping")}
			if !first {
				tell = []*podfsmv1.SandboxTransition{step(7, ready, "NotReady"), step(8, ready, "Stopping")}
			}
			for _, one := range tell {
				if err := stream.Send(one); err != nil {
					return err
				}
			}
			return status.Error(codes.Unavailable, "closing")
		},
	})
	out, errOut, err := watched(t, 6, "--address", address, "watch")
	require.NoError(t, err)
	var entered []string
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		entered = append(entered, fields[3]+" "+fields[len(fields)-1])
	}
	require.Equal(t, []string{"POD ERROR", "default/web Ready", "default/gone Stopping", "default/gone Removed", "default/web NotReady", "default/web Stopping"}, entered)
	require.Contains(t, errOut, "the daemon at "+address+" has gone; waiting for the next one\n")
}

func TestPsWatch(t *testing.T) {
	service := tells(nil, starting)
	service.inspect = func(_ context.Context, id string) (*podfsmv1.InspectResponse, error) {
		if id == ready.GetId() {
			return readyInspection, nil
		}
		return nil, status.Error(codes.NotFound, "it has ended")
	}
	address := serve(t, service)
	out, _, err := watched(t, 8, "--address", address, "ps", "-w")
	require.NoError(t, err)
	require.Regexp(t, `^SANDBOX +POD +STATE .*\n9d +default/slow +NetNSCaptured .*\n3b1f0c9a7e5d4 +default/web +Ready .*\n`, out)

	out, _, err = watched(t, 6, "--address", address, "ps", "-w", "-q", "--state", "Ready")
	require.NoError(t, err)
	require.Equal(t, strings.Repeat(ready.GetId()+"\n", 6), out)
}

func TestWatchErrors(t *testing.T) {
	refuses := fakeSandboxes{watch: func(grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
		return status.Error(codes.Unavailable, "podfsm is degraded: no luck")
	}}
	address := serve(t, refuses)
	_, errOut, err := watched(t, 9, "--address", address, "watch")
	require.EqualError(t, err, "the daemon at "+address+" is unavailable: podfsm is degraded: no luck")
	require.Empty(t, errOut)

	address = serve(t, nil)
	_, _, err = watched(t, 9, "--address", address, "watch")
	require.ErrorContains(t, err, "is a containerd without podfsm")

	address = serve(t, tells(status.Error(codes.Internal, "bad\x1b[2J")))
	_, _, err = watched(t, 99, "--address", address, "watch")
	require.EqualError(t, err, "the daemon at "+address+` failed: bad\x1b[2J`)

	_, _, err = watched(t, 9, "--address", t.TempDir()+"/none", "watch")
	require.ErrorContains(t, err, "is the daemon running?")
	_, _, err = watched(t, 9, "--address", address, "watch", "a", "b")
	require.ErrorContains(t, err, "watch takes one argument at most")
}

func TestWatchWaitsAsLongAsForAnyAnswer(t *testing.T) {
	address := serve(t, fakeSandboxes{watch: func(stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
		<-stream.Context().Done()
		return stream.Context().Err()
	}})
	_, _, err := watched(t, 9, "--address", address, "watch", "--timeout", "50ms")
	require.EqualError(t, err, "no answer from the daemon at "+address+" within 50ms")
	require.Equal(t, exitNoDaemon, exitStatus(err))
}

func TestGraph(t *testing.T) {
	address := serveTimelines(t)
	for golden, args := range map[string][]string{
		"graph.txt":             {"graph"},
		"graph-crashed.txt":     {"--address", address, "graph", "7c41"},
		"graph-crashed.dot":     {"--address", address, "graph", "-o", "dot", "7c41"},
		"graph-crashed.mermaid": {"--address", address, "graph", "-o", "mermaid", "7c41"},
	} {
		t.Run(golden, func(t *testing.T) {
			if len(args) > 1 {
				args[len(args)-1] = crashed.GetSandbox().GetId()
			}
			out, err := podfsm(t, args...)
			require.NoError(t, err)
			requireGolden(t, golden, []byte(out))
		})
	}
	var b bytes.Buffer
	require.NoError(t, writePath(&b, pendingTimeline.InspectResponse))
	require.NotContains(t, b.String(), "\x1b")
	_, err := podfsm(t, "graph", "a", "b")
	require.ErrorContains(t, err, "graph takes one argument at most")
}
