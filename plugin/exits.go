package plugin

import (
	"context"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
)

// subscriber is what is needed of containerd's event exchange.
type subscriber interface {
	Subscribe(ctx context.Context, filters ...string) (<-chan *events.Envelope, <-chan error)
}

// eventExchange is containerd's event exchange.
type eventExchange interface {
	events.Publisher
	subscriber
}

// exitWatch tells the engine when a pause has exited: one subscription for all sandboxes, so that none needs a goroutine.
type exitWatch struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func watchExits(s subscriber, engine *lifecycle.Engine) *exitWatch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &exitWatch{cancel: cancel, done: make(chan struct{})}
	exits, failed := s.Subscribe(ctx, `topic=="/tasks/exit"`)
	go func() {
		defer close(w.done)
		for {
			select {
			case envelope := <-exits:
				passOn(ctx, envelope, engine)
			case err := <-failed:
				if ctx.Err() == nil {
					log.G(ctx).WithError(err).Error("podfsm: containerd's event exchange has closed; exits of pause are not seen any more")
				}
				return
			}
		}
	}()
	return w
}

// passOn gives the exit of a container's first process to the engine, which ignores what isn't a sandbox of its own.
func passOn(ctx context.Context, envelope *events.Envelope, engine *lifecycle.Engine) {
	event, err := typeurl.UnmarshalAny(envelope.Event)
	if err != nil {
		log.G(ctx).WithError(err).Warn("podfsm: an exit event can't be read")
		return
	}
	exit, ok := event.(*eventtypes.TaskExit)
	if !ok || exit.GetID() != exit.GetContainerID() {
		return
	}
	engine.PauseExited(
		journal.Key{Namespace: envelope.Namespace, ID: exit.GetContainerID()},
		lifecycle.Exit{Code: exit.GetExitStatus(), At: protobuf.FromTimestamp(exit.GetExitedAt())},
	)
}

func (w *exitWatch) close() {
	w.cancel()
	<-w.done
}
