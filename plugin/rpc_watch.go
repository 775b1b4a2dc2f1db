package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// Watch streams the transitions that podfsm publishes, from the moment it sends the headers.
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
	var ended error // set before waiting is closed
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

// maxBehind bounds the transitions that wait for a watcher.
const maxBehind = 1024

// takeTransitions passes events on without waiting, because containerd's exchange would queue them
// without bound. It returns when the subscription ends, with no error if the caller has gone, or
// when too many transitions wait.
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
				return fmt.Errorf("the watcher is more than %d transitions behind; watch again, then list the sandboxes: %w", maxBehind, errdefs.ErrResourceExhausted)
			}
		case err := <-failed:
			return err
		}
	}
}
