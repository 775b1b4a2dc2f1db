package plugin

import (
	"context"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// transitionTopic is the topic of containerd's events that tell of transitions. They hold a podfsm.v1.SandboxTransition.
	transitionTopic = "/podfsm/sandbox/transition"
	// writeOffTopic is that of those that tell of cleanups that were written off. They hold a podfsm.v1.SandboxWriteOff.
	writeOffTopic = "/podfsm/sandbox/write-off"
)

// sandboxEvent is what an event of containerd holds: a transition or a write-off.
type sandboxEvent interface {
	GetSandboxId() string
	GetContainerdNamespace() string
}

// topicOf is the topic of an event.
func topicOf(event sandboxEvent) string {
	if _, ok := event.(*podfsmv1.SandboxWriteOff); ok {
		return writeOffTopic
	}
	return transitionTopic
}

// maxUntold bounds how many events may wait to be published.
const maxUntold = 1 << 16

// newPublishing is a relay that publishes events of containerd. The log says how many were left out; the numbers of the transitions show
// it, too.
func newPublishing(publisher events.Publisher) *relay[sandboxEvent] {
	return &relay[sandboxEvent]{
		bound: maxUntold,
		pass: func(event sandboxEvent) {
			ctx := namespaces.WithNamespace(context.Background(), event.GetContainerdNamespace())
			if err := publisher.Publish(ctx, topicOf(event), event); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, event.GetSandboxId()).WithError(err).Warnf("podfsm: failed to publish an event of the topic %q", topicOf(event))
			}
		},
		lost: func(n int) {
			log.L.Warnf("podfsm: containerd's event exchange is too slow: %d events were not published", n)
		},
	}
}

// observe is told of each transition by the engine.
func (c *Controller) observe(view lifecycle.View) {
	if view.State.Terminal() {
		c.ended.add(view)
	}
	c.meters.moved(view)
	c.publishing.send(records.Transition(view))
}

// wroteOff is told of each cleanup that is written off by the engine.
func (c *Controller) wroteOff(view lifecycle.View, w lifecycle.WriteOff) {
	c.meters.wroteOff(w)
	c.publishing.send(records.WriteOff(view, w))
}
