package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
)

// api is the gRPC service for the CLI, on containerd's socket.
type api struct {
	podfsmv1.UnimplementedSandboxesServer
	controller *Controller
}

// Register puts the service on containerd's gRPC server, which is about to serve: all plugins have been loaded.
func (a *api) Register(server *grpc.Server) error {
	podfsmv1.RegisterSandboxesServer(server, a)
	a.controller.background.loaded()
	return nil
}

// List answers with every sandbox that hasn't ended, and on request with those that have.
func (a *api) List(_ context.Context, r *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	var ended []*podfsmv1.InspectResponse
	if r.GetEnded() {
		if ended, err = a.controller.ended.read(); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	since, draining := a.controller.drain.settledSince() // before the list: after it, a pod that came between would be missed
	response := records.List(engine.List(), ended...)
	if draining {
		response.DrainingSince = timestamppb.New(since)
	}
	return response, nil
}

// Inspect answers with all there is to know of one sandbox, also one that ended not long ago.
func (a *api) Inspect(_ context.Context, r *podfsmv1.InspectRequest) (*podfsmv1.InspectResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	response, err := records.Inspect(r.GetRef(), engine.List(), a.controller.ended.read)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}

// Watch passes the transitions on that podfsm publishes, from the moment on at which it sends the headers.
func (a *api) Watch(_ *podfsmv1.WatchRequest, stream grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error {
	if _, err := a.engine(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	envelopes, failed := a.controller.exchange.Subscribe(ctx, fmt.Sprintf("topic==%q", transitionTopic))
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	waiting := make(chan *podfsmv1.SandboxTransition, maxBehind)
	var ended error // is set when waiting is closed
	go func() {
		defer close(waiting)
		defer cancel()
		ended = takeTransitions(envelopes, failed, waiting)
	}()
	for t := range waiting {
		if err := stream.Send(t); err != nil {
			return err
		}
	}
	return errgrpc.ToGRPC(ended)
}

// maxBehind is how many transitions wait for a watcher at most.
const maxBehind = 1024

// takeTransitions passes events on as fast as they come: containerd's exchange would keep them without bound. It returns when the
// subscription ends, which is no error when the caller has gone, or when too many wait.
func takeTransitions(envelopes <-chan *events.Envelope, failed <-chan error, waiting chan<- *podfsmv1.SandboxTransition) error {
	for {
		select {
		case envelope := <-envelopes:
			t := &podfsmv1.SandboxTransition{}
			if err := typeurl.UnmarshalTo(envelope.Event, t); err != nil {
				return fmt.Errorf("failed to read an event: %w", err)
			}
			select {
			case waiting <- t:
			default:
				return fmt.Errorf("the watcher is %d transitions behind; watch again, and list what there is: %w", maxBehind, errdefs.ErrResourceExhausted)
			}
		case err := <-failed:
			return err
		}
	}
}

// IDs answers with who holds which host ids.
func (a *api) IDs(ctx context.Context, _ *podfsmv1.IDsRequest) (*podfsmv1.IDsResponse, error) {
	if _, err := a.engine(); err != nil {
		return nil, err
	}
	return records.IDs(a.controller.node.ids.Overview(ctx)), nil
}

// Leaks answers with what belongs to nobody, and removes it when asked to. What is gone afterwards is found out by looking.
func (a *api) Leaks(ctx context.Context, r *podfsmv1.LeaksRequest) (*podfsmv1.LeaksResponse, error) {
	if _, err := a.engine(); err != nil {
		return nil, err
	}
	response, err := a.leaks(ctx, r.GetFix())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}

// Drain begins or ends the drain, also where podfsm can't run pods.
func (a *api) Drain(ctx context.Context, r *podfsmv1.DrainRequest) (*podfsmv1.DrainResponse, error) {
	change := func() error { return a.controller.drain.begin(ctx) }
	if r.GetCancel() {
		change = a.controller.drain.end
	}
	if err := change(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	log.G(ctx).WithField("draining", !r.GetCancel()).Info("podfsm: somebody has asked for a drain, or for its end")
	return &podfsmv1.DrainResponse{}, nil
}

// finder looks a reference up among sandboxes.
type finder func(ref string, views []lifecycle.View) (lifecycle.View, error)

// RetryCleanup tries a pending cleanup now.
func (a *api) RetryCleanup(ctx context.Context, r *podfsmv1.RetryCleanupRequest) (*podfsmv1.CleanupResponse, error) {
	return a.cleanup(r.GetRef(), records.FindPending, func(engine *lifecycle.Engine, key journal.Key) error { return engine.Retry(ctx, key) })
}

// WriteOffCleanup gives up a pending cleanup, or the DEL of one CNI plugin.
func (a *api) WriteOffCleanup(ctx context.Context, r *podfsmv1.WriteOffCleanupRequest) (*podfsmv1.CleanupResponse, error) {
	if r.GetAll() == (r.GetPlugin() != "") {
		return nil, errgrpc.ToGRPC(fmt.Errorf("name the CNI plugin whose DEL is written off, or write off all that fails: %w", errdefs.ErrInvalidArgument))
	}
	return a.cleanup(r.GetRef(), records.FindPendingExactly, func(engine *lifecycle.Engine, key journal.Key) error {
		return engine.WriteOff(ctx, key, r.GetPlugin(), r.GetReason())
	})
}

// cleanup does something about the one sandbox with a pending cleanup that find finds by a reference.
func (a *api) cleanup(ref string, find finder, do func(*lifecycle.Engine, journal.Key) error) (*podfsmv1.CleanupResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	pending, err := find(ref, engine.List())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	err = do(engine, pending.Key)
	if err != nil && !errors.As(err, new(*lifecycle.PendingError)) {
		return nil, errgrpc.ToGRPC(err)
	}
	after, ok := a.controller.find(pending.Key)
	if !ok {
		return nil, errgrpc.ToGRPC(fmt.Errorf("sandbox %q has ended: %w", pending.Key.ID, errdefs.ErrNotFound))
	}
	return &podfsmv1.CleanupResponse{Sandbox: records.Sandbox(after), Error: records.Text(err)}, nil
}

func (a *api) leaks(ctx context.Context, fix bool) (*podfsmv1.LeaksResponse, error) {
	found, err := a.controller.leaks(ctx)
	if err != nil {
		return nil, err
	}
	left, failed := found, map[string]error{}
	if fix && len(found) > 0 {
		failed = a.controller.fix(ctx, found)
		if left, err = a.controller.leaks(ctx); err != nil {
			return nil, err
		}
	}
	response := &podfsmv1.LeaksResponse{}
	for _, thing := range found {
		leak := records.Leak(thing)
		leak.Removed = !slices.Contains(left, thing)
		if fix && !leak.Removed {
			leak.Error = cmp.Or(records.Text(failed[thing.ID]), "it is still there")
		}
		response.Leaks = append(response.Leaks, leak)
	}
	response.DamagedLedgerFiles, err = a.controller.ledger.Aside()
	return response, err
}

// Doctor examines the node.
func (a *api) Doctor(ctx context.Context, _ *podfsmv1.DoctorRequest) (*podfsmv1.DoctorResponse, error) {
	if a.controller.doctor == nil {
		return nil, errgrpc.ToGRPC(a.controller.well())
	}
	return records.Examination(a.controller.doctor.Examine(ctx)), nil
}

func (a *api) engine() (*lifecycle.Engine, error) {
	if a.controller.engine == nil {
		return nil, errgrpc.ToGRPC(a.controller.well())
	}
	return a.controller.engine, nil
}
