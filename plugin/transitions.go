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

// transitionTopic is the topic of containerd's events that tell of transitions. They hold a podfsm.v1.SandboxTransition.
const transitionTopic = "/podfsm/sandbox/transition"

// maxUntold bounds how many transitions may wait to be published.
const maxUntold = 1 << 16

// newPublishing is a relay that publishes transitions as events of containerd. The log says how many were left out; the numbers of the
// transitions show it, too.
func newPublishing(publisher events.Publisher) *relay[*podfsmv1.SandboxTransition] {
	return &relay[*podfsmv1.SandboxTransition]{
		bound: maxUntold,
		pass: func(t *podfsmv1.SandboxTransition) {
			ctx := namespaces.WithNamespace(context.Background(), t.GetContainerdNamespace())
			if err := publisher.Publish(ctx, transitionTopic, t); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, t.GetSandboxId()).WithError(err).Warn("podfsm: a transition was not published as an event")
			}
		},
		lost: func(n int) {
			log.L.Warnf("podfsm: containerd's event exchange is too slow: %d transitions were not published", n)
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
