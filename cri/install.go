package cri

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
)

// Namespace is the containerd namespace of all that CRI makes.
const Namespace = records.Namespace

// Install puts the front, and [retries] before it, into the place of containerd's own service in instance, which
// is containerd's CRI plugin. All that containerd has around its service stays around the front: the registration
// on its servers, the namespace, the refusal before the service is initialized, the request log, the translation
// of errors. A finished sandbox that stays unclaimed for the time unclaimed is discarded. The front serves streams
// as streaming says, which is containerd's own configuration.
//
// An instance of an unknown kind stays as it is: NotImplemented.
func Install(instance any, sandboxes Sandboxes, unclaimed time.Duration, streaming Streaming) error {
	initializer, ok := instance.(interface{ IsInitialized() bool })
	pods, images, closer := part[runtime.RuntimeServiceServer](instance), part[runtime.ImageServiceServer](instance), part[io.Closer](instance)
	if !ok || pods == nil || images == nil || closer == nil {
		return fmt.Errorf("unsupported CRI plugin %T; use the podfsm package that fits this containerd: %w", instance, errdefs.ErrNotImplemented)
	}
	front := newService(inner{*pods, *images}, sandboxes, streaming)
	retries := newRetries(front, sandboxes, initializer.IsInitialized, unclaimed)
	*pods, *closer = retries, closers{front, retries, *closer}
	return nil
}

// part returns the interface I that the instance of a plugin embeds, to be replaced; nil for none. The type of
// containerd's CRI plugin isn't exported, but its embedded services are.
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

// closers close in their order.
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
	images runtime.ImageServiceServer
}

func newService(in inner, sandboxes Sandboxes, streaming Streaming) *service {
	return &service{inner: in, sandboxes: sandboxes, streams: newStreams(streaming, sandboxes.Sandbox)}
}

// Close ends the port forwards.
func (s *service) Close() error { return s.streams.close() }
