package plugin

import (
	"context"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// transitionTopic is the topic of containerd's events on transitions. The events hold a
	// podfsm.v1.SandboxTransition.
	transitionTopic = "/podfsm/sandbox/transition"
	// writeOffTopic is the topic of events on written-off cleanups. The events hold a
	// podfsm.v1.SandboxWriteOff.
	writeOffTopic = "/podfsm/sandbox/write-off"
)

// sandboxEvent is the content of an event: a transition or a write-off.
type sandboxEvent interface {
	GetSandboxId() string
	GetContainerdNamespace() string
}

// topicOf returns the topic of an event.
func topicOf(event sandboxEvent) string {
	if _, ok := event.(*podfsmv1.SandboxWriteOff); ok {
		return writeOffTopic
	}
	return transitionTopic
}

// maxUnpublished bounds the events that wait to be published.
const maxUnpublished = 1 << 16

// newPublishing returns a relay that publishes events by containerd. Dropped events are logged;
// gaps in the numbers of transitions show them, too.
func newPublishing(publisher events.Publisher) *relay[sandboxEvent] {
	return &relay[sandboxEvent]{
		bound: maxUnpublished,
		pass: func(event sandboxEvent) {
			ctx := namespaces.WithNamespace(context.Background(), event.GetContainerdNamespace())
			if err := publisher.Publish(ctx, topicOf(event), event); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, event.GetSandboxId()).WithError(err).Warnf("failed to publish event of topic %q", topicOf(event))
			}
		},
		dropped: func(n int) {
			log.L.Warnf("containerd's event exchange is too slow, %d events not published", n)
		},
	}
}

// observe is called by the engine at each transition.
func (c *Controller) observe(view lifecycle.View) {
	if view.State.Terminal() {
		c.ended.add(view)
	}
	c.meters.moved(view)
	c.publishing.send(show.Transition(view))
}

// wroteOff is called by the engine at each write-off.
func (c *Controller) wroteOff(view lifecycle.View, w lifecycle.WriteOff) {
	c.meters.wroteOff(w)
	c.publishing.send(show.WriteOff(view, w))
}
