package plugin

import (
	"context"
	"testing"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/podfsm/podfsm/states"
)

func TestExits(t *testing.T) {
	w := newWorld(t)
	for _, id := range []string{"s1", "s2"} {
		w.run(t, id, named(id))
	}
	bus := exchange.NewExchange()
	w.exits = watchExits(bus, w.engine)
	publish := func(namespace, topic string, event events.Event) {
		require.NoError(t, bus.Publish(namespaces.WithNamespace(t.Context(), namespace), topic, event))
	}
	at := time.Unix(8, 0).UTC()
	exit := func(container, id string) *eventtypes.TaskExit {
		return &eventtypes.TaskExit{ContainerID: container, ID: id, ExitStatus: 9, ExitedAt: timestamppb.New(at)}
	}
	// None of these is the end of s1's pause.
	publish("k8s.io", "/tasks/exit", exit("s1", "an-exec"))
	publish("another", "/tasks/exit", exit("s1", "s1"))
	publish("k8s.io", "/tasks/start", exit("s1", "s1"))
	publish("k8s.io", "/tasks/exit", &eventtypes.TaskOOM{ContainerID: "s1"})
	publish("k8s.io", "/tasks/exit", exit("unknown", "unknown"))
	require.NoError(t, bus.Forward(t.Context(), &events.Envelope{
		Timestamp: at, Namespace: "k8s.io", Topic: "/tasks/exit", Event: unknownEvent{},
	}))
	publish("k8s.io", "/tasks/exit", exit("s2", "s2"))

	// Events keep their order: once s2's is seen, the others were.
	w.waitFor(t, "s2", states.NotReady)
	require.EqualValues(t, 9, w.view(t, "s2").Exit.Code)
	require.Equal(t, at, w.view(t, "s2").Exit.At)
	require.Equal(t, states.Ready, w.view(t, "s1").State)
	require.Nil(t, w.view(t, "s1").Exit)
}

// unknownEvent is of a type that nobody has registered.
type unknownEvent struct{}

func (unknownEvent) GetTypeUrl() string { return "podfsm.test/unknown" }
func (unknownEvent) GetValue() []byte   { return []byte("{") }

var _ typeurl.Any = unknownEvent{}

// broken is an event exchange that has closed.
type broken struct{}

func (broken) Subscribe(context.Context, ...string) (<-chan *events.Envelope, <-chan error) {
	failed := make(chan error, 1)
	failed <- errNoLuck
	close(failed)
	return make(chan *events.Envelope), failed
}

func TestExitsEndWithTheExchange(t *testing.T) {
	watch := watchExits(broken{}, newWorld(t).engine)
	<-watch.done
	watch.close()
}
