package plugin

import (
	"context"
	"sync"

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

// herald publishes transitions as events of containerd, in their order, while nobody waits for it. With nothing to tell it costs no
// goroutine. What it has to leave out, it logs; the numbers of the transitions show it, too.
type herald struct {
	publisher events.Publisher

	mu      sync.Mutex
	untold  []*podfsmv1.SandboxTransition
	lost    int
	telling chan struct{} // closed when the goroutine ends; nil when there is none
}

// tell queues a transition.
func (h *herald) tell(t *podfsmv1.SandboxTransition) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.untold) >= maxUntold {
		h.lost++
		return
	}
	h.untold = append(h.untold, t)
	if h.telling == nil {
		h.telling = make(chan struct{})
		go h.publish(h.telling)
	}
}

// publish tells all that there is.
func (h *herald) publish(done chan struct{}) {
	defer close(done)
	for {
		h.mu.Lock()
		all, lost := h.untold, h.lost
		h.untold, h.lost = nil, 0
		if len(all) == 0 && lost == 0 {
			h.telling = nil
			h.mu.Unlock()
			return
		}
		h.mu.Unlock()
		for _, t := range all {
			ctx := namespaces.WithNamespace(context.Background(), t.GetContainerdNamespace())
			if err := lifecycle.Protect(func() error { return h.publisher.Publish(ctx, transitionTopic, t) }); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, t.GetSandboxId()).WithError(err).Warn("podfsm: a transition was not published as an event")
			}
		}
		if lost > 0 {
			log.L.Warnf("podfsm: containerd's event exchange is too slow: %d transitions were not published", lost)
		}
	}
}

// settle waits until all is told, or ctx ends.
func (h *herald) settle(ctx context.Context) {
	h.mu.Lock()
	telling := h.telling
	h.mu.Unlock()
	if telling == nil {
		return
	}
	select {
	case <-telling:
	case <-ctx.Done():
	}
}

// observe is told of each transition by the engine.
func (c *Controller) observe(view lifecycle.View) {
	if view.State.Terminal() {
		c.ended.add(view)
	}
	c.meters.moved(view)
	c.herald.tell(records.Transition(view))
}
