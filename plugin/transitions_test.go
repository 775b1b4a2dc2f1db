package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/history"
)

// told waits until the relay has nothing more to tell, and is what was published, as "seq from>to".
func (w *world) told(t *testing.T) (told []string) {
	w.publishing.flush(t.Context())
	for _, event := range w.published.all() {
		told = append(told, fmt.Sprintf("%s %d %s>%s", event.GetSandboxId(), event.GetTransition().GetSeq(), event.GetTransition().GetFrom(), event.GetTransition().GetTo()))
	}
	return told
}

func TestTransitionsArePublished(t *testing.T) {
	w := newWorld(t)
	w.host.do[CaptureNetNS] = failing
	require.NoError(t, w.create(t, "s1"))
	_, err := w.Start(inCRI(t), "s1")
	require.Error(t, err)
	require.Equal(t, []string{
		"s1 1 New>IDsAllocated", "s1 2 IDsAllocated>SnapshotRemapped", "s1 3 SnapshotRemapped>PauseStarted",
		"s1 4 PauseStarted>RollingBack", "s1 5 RollingBack>RolledBack",
	}, w.told(t))
	rollback := w.published.all()[3]
	require.NotNil(t, rollback.GetTransition().GetAt())
	require.NotNil(t, rollback.GetTransition().GetAfter())
	rollback.Transition.At, rollback.Transition.After, rollback.Transition.TraceId = nil, nil, ""
	require.True(t, proto.Equal(&podfsmv1.SandboxTransition{
		SandboxId: "s1", ContainerdNamespace: "k8s.io", PodName: "web", PodNamespace: "default", PodUid: "u-1", Attempt: 2,
		Transition: &podfsmv1.Transition{
			Seq: 4, From: "PauseStarted", To: "RollingBack", Event: "roll_back", Step: "capture_netns", ErrorType: "unavailable",
			Error: `step capture_netns of pod "default/web" failed: no luck: unavailable`,
		},
	}, rollback), "%v", rollback)
	packed, err := typeurl.MarshalAny(rollback)
	require.NoError(t, err)
	require.Equal(t, "podfsm.v1.SandboxTransition", packed.GetTypeUrl())
}

// No sandbox waits for the publisher.
func TestPublishingKeepsNobodyWaiting(t *testing.T) {
	w := newWorld(t)
	release := make(chan struct{})
	w.published.before = func() { <-release }
	for i := range 3 {
		w.run(t, fmt.Sprint("s", i), named(fmt.Sprint("pod", i)))
	}
	require.Empty(t, w.published.all())
	close(release)
	told := w.told(t)
	require.Len(t, told, 3*len(creationPath()))
	require.Equal(t, "s0 1 New>IDsAllocated", told[0])
	require.Equal(t, "s2 6 NetworkReady>Ready", told[len(told)-1])
}

func TestWhatCantBePublishedInTimeIsLeftOutAndTheRestGoesOn(t *testing.T) {
	reached, release := make(chan struct{}, 2*maxUnpublished), make(chan struct{})
	p := &press{before: func() { reached <- struct{}{}; <-release }}
	h := newPublishing(p)
	of := func(seq int) *podfsmv1.SandboxTransition {
		return &podfsmv1.SandboxTransition{ContainerdNamespace: "k8s.io", Transition: &podfsmv1.Transition{Seq: uint64(seq)}}
	}
	h.send(of(0))
	<-reached
	for i := range maxUnpublished + 5 {
		h.send(of(i + 1))
	}
	require.Equal(t, 5, h.full)
	close(release)
	h.flush(t.Context())
	all := p.all()
	require.Len(t, all, maxUnpublished+1)
	for i, event := range all {
		require.EqualValues(t, i, event.GetTransition().GetSeq())
	}
	h.send(of(7))
	h.flush(t.Context())
	require.Len(t, p.all(), maxUnpublished+2)
}

func TestCloseTellsAll(t *testing.T) {
	w := newWorld(t)
	w.published.before = func() { time.Sleep(time.Millisecond) }
	w.run(t, "s1")
	require.NoError(t, w.Close())
	require.Len(t, w.published.all(), len(creationPath()))
}

func TestHistory(t *testing.T) {
	w := newWorld(t)
	service := &api{controller: w.Controller}
	w.host.do[CaptureNetNS] = failing
	require.NoError(t, w.create(t, "failed"))
	_, err := w.Start(inCRI(t), "failed")
	require.Error(t, err)
	delete(w.host.do, CaptureNetNS)
	w.run(t, "ready")

	response, err := service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Len(t, response.GetSandboxes(), 1)
	response, err = service.List(t.Context(), &podfsmv1.ListRequest{Ended: true})
	require.NoError(t, err)
	require.Len(t, response.GetSandboxes(), 2)
	failed := response.GetSandboxes()[0]
	require.Equal(t, "failed", failed.GetId(), "the oldest first")
	require.Equal(t, "RolledBack", failed.GetState())
	require.Equal(t, "capture_netns", failed.GetFailedStep())

	// Of a pod's sandboxes the living one counts, and of those that have ended the newest.
	inspected, err := service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "web"})
	require.NoError(t, err)
	require.Equal(t, "ready", inspected.GetSandbox().GetId())
	require.NoError(t, w.Shutdown(inCRI(t), "ready"))
	inspected, err = service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "web"})
	require.NoError(t, err)
	require.Equal(t, "ready", inspected.GetSandbox().GetId())
	require.Equal(t, "Removed", inspected.GetSandbox().GetState())
	require.Empty(t, inspected.GetSandbox().GetError())
	inspected, err = service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "failed"})
	require.NoError(t, err)
	var tries []string
	for _, try := range inspected.GetTries() {
		require.NotNil(t, try.GetDuration())
		tries = append(tries, try.GetKind()+" "+try.GetStep())
	}
	require.Equal(t, []string{
		"do allocate_ids", "do remap_snapshot", "do start_pause", "do capture_netns",
		"undo capture_netns", "undo start_pause", "undo remap_snapshot", "undo allocate_ids",
	}, tries)
}

// A history that can't be kept keeps no sandbox from anything.
func TestHistoryThatCantBeKept(t *testing.T) {
	w := newWorld(t)
	dir := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(dir, nil, 0o600))
	file, err := history.Open(filepath.Join(dir, history.FileName))
	require.Error(t, err)
	w.ended = newEnded(file)
	w.run(t, "s1")
	require.NoError(t, w.Shutdown(inCRI(t), "s1"))
	_, err = (&api{controller: w.Controller}).Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	require.Error(t, err)
	require.NotEqual(t, codes.NotFound, grpcstatus.Code(err))
}

// watching is a stream of transitions from the service, over a connection as containerd's.
func watching(t *testing.T, w *world) grpc.ServerStreamingClient[podfsmv1.SandboxTransition] {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	server := grpc.NewServer()
	podfsmv1.RegisterSandboxesServer(server, &api{controller: w.Controller})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, conn.Close())
		server.Stop()
		require.NoError(t, <-served)
	})
	stream, err := podfsmv1.NewSandboxesClient(conn).Watch(t.Context(), &podfsmv1.WatchRequest{})
	require.NoError(t, err)
	return stream
}

func TestWatch(t *testing.T) {
	w := newWorld(t)
	w.exchange = exchange.NewExchange()
	w.publishing = newPublishing(w.exchange)
	stream := watching(t, w)
	_, err := stream.Header()
	require.NoError(t, err)
	w.run(t, "s1")
	for i, event := range creationPath() {
		got, err := stream.Recv()
		require.NoError(t, err)
		require.Equal(t, "s1", got.GetSandboxId())
		require.EqualValues(t, i+1, got.GetTransition().GetSeq())
		require.Equal(t, string(event), got.GetTransition().GetEvent())
	}
}

// feed is an exchange whose events the test hands over one by one. containerd's keeps without bound what a subscriber doesn't take.
type feed struct {
	eventExchange
	envelopes chan *events.Envelope
	ended     chan struct{} // closed at the end of the subscription
}

func (f *feed) Subscribe(ctx context.Context, _ ...string) (<-chan *events.Envelope, <-chan error) {
	failed := make(chan error)
	context.AfterFunc(ctx, func() { close(f.ended); close(failed) })
	return f.envelopes, failed
}

// A watcher that stalls, as behind a pager, is given up when it is too far behind, and told so when it goes on.
func TestWatchThatStalls(t *testing.T) {
	w := newWorld(t)
	f := &feed{envelopes: make(chan *events.Envelope), ended: make(chan struct{})}
	w.exchange = f
	stream := watching(t, w)
	_, err := stream.Header()
	require.NoError(t, err)
	packed, err := typeurl.MarshalAny(&podfsmv1.SandboxTransition{SandboxId: strings.Repeat("s", 1000)})
	require.NoError(t, err)
	told, deadline := 0, time.After(10*time.Second)
	for taken := true; taken; told++ {
		require.Less(t, told, 100*maxBehind, "the daemon keeps whatever the watcher doesn't take")
		select {
		case f.envelopes <- &events.Envelope{Event: packed}:
		case <-f.ended:
			taken = false
		case <-deadline:
			require.Fail(t, "no subscriber takes the events, and the subscription goes on")
		}
	}
	got := 0
	for ; err == nil; got++ {
		_, err = stream.Recv()
	}
	require.Equal(t, codes.ResourceExhausted, grpcstatus.Code(err), "%v", err)
	require.Greater(t, got, maxBehind, "what had been taken is told first")
}

func TestWatchWhileDegraded(t *testing.T) {
	c := &Controller{stock: &stockConfig{}}
	c.refuse(errors.New("the ledger can't be opened"))
	_, err := watching(t, &world{Controller: c}).Recv()
	require.Equal(t, codes.Unavailable, grpcstatus.Code(err))
	require.ErrorContains(t, err, "the ledger can't be opened")
}
