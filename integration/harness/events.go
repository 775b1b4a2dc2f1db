package harness

import (
	"context"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/programs/feed"
)

// Events are the CRI container events of a subscription.
type Events struct {
	feed.Feed[*runtime.ContainerEventResponse]

	cancel context.CancelFunc
	ended  chan struct{}
}

// Events subscribes to CRI's container events, as the kubelet with evented PLEG does, and returns
// once the daemon has accepted. The caller must Close it.
func (n *Node) Events(ctx context.Context) (*Events, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := n.Runtime.GetContainerEvents(ctx, &runtime.GetEventsRequest{})
	if err != nil {
		cancel()
		return nil, err
	}
	e := &Events{cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(e.ended)
		for {
			event, err := stream.Recv()
			if err != nil {
				return // closed, or the daemon has ended
			}
			e.Add(event)
		}
	}()
	return e, nil
}

// Close ends the subscription.
func (e *Events) Close() {
	e.cancel()
	<-e.ended
}

// OfType returns the events of a type for one container or sandbox.
func OfType(events []*runtime.ContainerEventResponse, id string, kind runtime.ContainerEventType) []*runtime.ContainerEventResponse {
	var of []*runtime.ContainerEventResponse
	for _, e := range events {
		if e.GetContainerId() == id && e.GetContainerEventType() == kind {
			of = append(of, e)
		}
	}
	return of
}
