package cri

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/records"
)

// Namespace is the containerd namespace of everything that comes by CRI.
const Namespace = records.Namespace

// Install puts the front into instance, which is containerd's CRI plugin, in the place of containerd's own service. Everything that
// containerd puts around its service stays around the front: the registration on its servers, the namespace, the refusal before the
// service is initialized, the request log, the translation of errors. unclaimed is how long a finished sandbox waits for somebody to
// claim it. Streams are served as streaming says, which is containerd's own configuration.
//
// An instance of an unknown kind stays as it is: NotImplemented.
func Install(instance any, sandboxes Sandboxes, unclaimed time.Duration, streaming Streaming) error {
	initializer, ok := instance.(interface{ IsInitialized() bool })
	pods, images, closer := part[runtime.RuntimeServiceServer](instance), part[runtime.ImageServiceServer](instance), part[io.Closer](instance)
	if !ok || pods == nil || images == nil || closer == nil {
		return fmt.Errorf("unsupported CRI plugin %T; use the podfsm package that fits this containerd: %w", instance, errdefs.ErrNotImplemented)
	}
	front := newService(inner{*pods, *images, initializer.IsInitialized}, sandboxes, unclaimed, streaming)
	for _, id := range sandboxes.Unclaimed() {
		front.expireAfter(unclaimed, id)
	}
	*pods, *closer = front, closers{front, *closer}
	return nil
}

// part is the interface I that the instance of a plugin embeds, to be replaced; nil if it embeds none. containerd's CRI plugin embeds
// its services in a type that isn't exported; their fields are.
func part[I any](instance any) *I {
	value := reflect.Indirect(reflect.ValueOf(instance))
	if value.Kind() != reflect.Struct {
		return nil
	}
	field, ok := value.Type().FieldByName(reflect.TypeFor[I]().Name())
	if !ok || field.Type != reflect.TypeFor[I]() {
		return nil
	}
	found, err := value.FieldByIndexErr(field.Index)
	if err != nil || !found.CanSet() || found.IsNil() {
		return nil
	}
	return found.Addr().Interface().(*I)
}

// closers are closed in their order.
type closers []io.Closer

// Close closes all, whatever fails.
func (cs closers) Close() error {
	var errs []error
	for _, c := range cs {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// inner is containerd's own CRI service.
type inner struct {
	runtime.RuntimeServiceServer
	images      runtime.ImageServiceServer
	initialized func() bool // whether it serves yet
}

func newService(in inner, sandboxes Sandboxes, unclaimed time.Duration, streaming Streaming) *service {
	return &service{
		inner:     in,
		sandboxes: sandboxes,
		creations: newCreations(unclaimed),
		streams:   newStreams(streaming, sandboxes.Pod),
		turns:     turns{taken: map[attempt]chan struct{}{}},
	}
}

// Close ends what the front serves itself, and waits for the creations that are under way to be rolled back.
func (s *service) Close() error {
	err := s.streams.close()
	s.endCreations()
	return err
}
