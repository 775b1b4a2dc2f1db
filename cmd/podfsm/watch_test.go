package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
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

// told are the transitions that a daemon tells, of two pods.
func told() (all []*podfsmv1.SandboxTransition) {
	for _, s := range []*podfsmv1.Sandbox{ready, owing} {
		of := readyInspection
		if s == owing {
			of = owingInspection
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

// tells is a daemon that tells all and then goes with an error.
func tells(end error) fakeSandboxes {
	return fakeSandboxes{watch: func(stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
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

// watched runs podfsm watch until it ends.
func watched(t *testing.T, address string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	err = run(t.Context(), append([]string{"podfsm", "--address", address, "watch"}, args...), &out, &errOut)
	return out.String(), errOut.String(), err
}

func TestWatch(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, writeWatchHeader(&b))
	for _, transition := range told() {
		require.NoError(t, writeTransition(&b, transition, time.UTC))
	}
	requireGolden(t, "watch.txt", b.Bytes())

	address := serve(t, tells(nil))
	gone := "the daemon at " + address + " has gone"
	out, errOut, err := watched(t, address)
	require.EqualError(t, err, gone)
	require.Equal(t, "podfsm: following the daemon at "+address+"\n", errOut)
	require.Equal(t, strings.Count(b.String(), "\n"), strings.Count(out, "\n"))
	require.Regexp(t, `(?m)^\S+ +3b1f0c9a7e5d4 +0 +default/web +7ms +Ready$`, out)

	out, _, err = watched(t, address, "-o", "json", "default/web")
	require.EqualError(t, err, gone)
	requireGolden(t, "watch.json", []byte(out))
	require.Equal(t, len(readyInspection.GetTransitions()), strings.Count(out, "\n"))

	out, _, err = watched(t, address, owing.GetId()[:6])
	require.EqualError(t, err, gone)
	require.Equal(t, 2, strings.Count(out, "\n"))
	out, _, err = watched(t, address, "nobody")
	require.EqualError(t, err, gone)
	require.Equal(t, 1, strings.Count(out, "\n"))
}

func TestWatchErrors(t *testing.T) {
	refuses := fakeSandboxes{watch: func(grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
		return status.Error(codes.Unavailable, "podfsm runs no pods: no luck")
	}}
	address := serve(t, refuses)
	_, errOut, err := watched(t, address)
	require.EqualError(t, err, "the daemon at "+address+" is unavailable: podfsm runs no pods: no luck")
	require.Empty(t, errOut)

	address = serve(t, nil)
	_, _, err = watched(t, address)
	require.ErrorContains(t, err, "is a containerd without podfsm")

	address = serve(t, tells(status.Error(codes.Unavailable, "closing")))
	_, _, err = watched(t, address)
	require.EqualError(t, err, "the daemon at "+address+" has gone")

	address = serve(t, tells(status.Error(codes.Internal, "bad\x1b[2J")))
	_, _, err = watched(t, address)
	require.EqualError(t, err, "the daemon at "+address+` failed: bad\x1b[2J`)

	_, _, err = watched(t, t.TempDir()+"/none")
	require.ErrorContains(t, err, "is the daemon running?")
	_, _, err = watched(t, address, "a", "b")
	require.ErrorContains(t, err, "watch takes one argument at most")
}

func TestWatchWaitsAsLongAsForAnyAnswer(t *testing.T) {
	address := serve(t, fakeSandboxes{watch: func(stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
		<-stream.Context().Done()
		return stream.Context().Err()
	}})
	_, _, err := watched(t, address, "--timeout", "50ms")
	require.EqualError(t, err, "no answer from the daemon at "+address+" within 50ms")
}

// Who ends it has asked for that.
func TestWatchEndsWithItsContext(t *testing.T) {
	reached := make(chan struct{})
	address := serve(t, fakeSandboxes{watch: func(stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
		if err := stream.SendHeader(metadata.MD{}); err != nil {
			return err
		}
		close(reached)
		<-stream.Context().Done()
		return errors.New("gone")
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-reached
		cancel()
	}()
	var out, errOut bytes.Buffer
	require.NoError(t, run(ctx, []string{"podfsm", "--address", address, "watch", "--timeout", "10s"}, &out, &errOut))
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
	require.NoError(t, writePath(&b, owingTimeline.InspectResponse))
	require.NotContains(t, b.String(), "\x1b")
	_, err := podfsm(t, "graph", "a", "b")
	require.ErrorContains(t, err, "graph takes one argument at most")
}
