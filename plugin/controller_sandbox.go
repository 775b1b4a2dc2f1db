package plugin

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/tracing"
)

var _ sandbox.Controller = (*Controller)(nil)

// Create records a sandbox. It makes no resources yet. It checks the pod again, see [Controller.Admit].
func (c *Controller) Create(ctx context.Context, info sandbox.Sandbox, opts ...sandbox.CreateOpt) (err error) {
	call := cri.FromContext(ctx)
	defer func() { tellFront(call, err) }()
	if err := c.degradedError(); err != nil {
		return err
	}
	left, err := c.drain.enter()
	if err != nil {
		return err
	}
	defer left()
	spec, err := c.specForCreate(ctx, info, opts)
	if err != nil {
		return err
	}
	key, err := keyOf(ctx, info.ID)
	if err != nil {
		return err
	}
	if err := c.engine.Create(inCallersTrace(ctx), key, request(key, spec)); err != nil {
		return err
	}
	if call != nil {
		call.SandboxID = info.ID
	}
	return nil
}

// tellFront stores an error in the front's call, because containerd's service wraps errors.
func tellFront(call *cri.Call, err error) {
	if err != nil && call != nil {
		call.Err = err
	}
}

// request returns the engine's request for a sandbox.
func request(key ledger.Key, spec *Spec) lifecycle.Request {
	return lifecycle.Request{
		Name:       nameOf(key.Namespace, spec.Config.GetMetadata()),
		Pod:        records.PodName(spec.Config),
		Spec:       spec,
		Attributes: append(cri.Attributes(spec.Config, spec.Handler), tracing.SandboxID.String(key.ID)),
	}
}

// nameOf returns the name of a pod's attempt in a containerd namespace. It has the parts of
// containerd's own names, whose reservation containerd loses at a restart.
func nameOf(namespace string, metadata *runtime.PodSandboxMetadata) string {
	return fmt.Sprintf("%s/%s_%s_%s_%d", namespace, metadata.GetName(), metadata.GetNamespace(), metadata.GetUid(), metadata.GetAttempt())
}

// Start runs the creation path.
func (c *Controller) Start(ctx context.Context, id string) (_ sandbox.ControllerInstance, err error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	call := cri.FromContext(ctx)
	if call != nil {
		ctx = call.Caller
	} else {
		var span trace.Span
		ctx, span = tracing.Start(ctx, tracing.SpanRun, c.attributes(key)...)
		defer func() { tracing.End(span, err) }()
	}
	defer func() { tellFront(call, err) }()
	if err := c.engine.Start(ctx, key); err != nil {
		return sandbox.ControllerInstance{}, err
	}
	if call == nil {
		c.engine.Claim(ctx, key, lifecycle.Taken) // without CRI, the caller gets the sandbox
	}
	started, err := c.instance(ctx, key)
	if err != nil {
		// The caller would not undo a start that failed.
		return started, errors.Join(err, c.engine.Remove(context.WithoutCancel(ctx), key))
	}
	return started, nil
}

// instance returns what containerd's service keeps of a started sandbox.
func (c *Controller) instance(ctx context.Context, key ledger.Key) (sandbox.ControllerInstance, error) {
	view, err := c.engine.Get(key)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	container, err := c.node.containers.Get(ctx, key.ID)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	return instance(view, container)
}

// Stop ends pause. For the front that is all: containerd's service tells NRI next, and then the
// front stops the sandbox. For other callers, Stop stops the whole sandbox.
func (c *Controller) Stop(ctx context.Context, id string, _ ...sandbox.StopOpt) (err error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return err
	}
	if cri.FromContext(ctx) != nil {
		return c.engine.Halt(ctx, key)
	}
	ctx, span := tracing.Start(ctx, tracing.SpanStop, c.attributes(key)...)
	defer func() { tracing.End(span, err) }()
	if err := c.engine.Halt(ctx, key); err != nil {
		return err
	}
	return c.engine.Stop(ctx, key)
}

// Shutdown removes the sandbox. It is idempotent; an unknown id is success.
func (c *Controller) Shutdown(ctx context.Context, id string) (err error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return err
	}
	if cri.FromContext(ctx) == nil {
		var span trace.Span
		ctx, span = tracing.Start(c.inCreationTrace(ctx, key), tracing.SpanRemove, c.attributes(key)...)
		defer func() { tracing.End(span, err) }()
	}
	return c.engine.Remove(ctx, key)
}

// Wait blocks until pause exits.
func (c *Controller) Wait(ctx context.Context, id string) (sandbox.ExitStatus, error) {
	if c.engine == nil {
		// Don't return: containerd's service would take each sandbox for ended.
		<-ctx.Done()
		return sandbox.ExitStatus{}, ctx.Err()
	}
	key, err := c.known(ctx, id)
	if err != nil {
		return sandbox.ExitStatus{}, err
	}
	exit, err := c.engine.Wait(ctx, key)
	if err != nil {
		return sandbox.ExitStatus{}, err
	}
	return sandbox.ExitStatus{ExitStatus: exit.Code, ExitedAt: exit.At}, nil
}

// Status returns the CRI state of the sandbox, with all details if verbose is set.
func (c *Controller) Status(ctx context.Context, id string, verbose bool) (sandbox.ControllerStatus, error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return sandbox.ControllerStatus{}, err
	}
	view, err := c.engine.Get(key)
	if err != nil {
		return sandbox.ControllerStatus{}, err
	}
	return status(ctx, c.node, view, verbose)
}

// Platform returns the node's platform.
func (c *Controller) Platform(context.Context, string) (imagespec.Platform, error) {
	return platforms.DefaultSpec(), nil
}

// Update does nothing: containerd's service keeps updates in its own record.
func (c *Controller) Update(context.Context, string, sandbox.Sandbox, ...string) error { return nil }

// Metrics returns the metrics of the pod's parent cgroup.
func (c *Controller) Metrics(ctx context.Context, id string) (*types.Metric, error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return nil, err
	}
	view, err := c.engine.Get(key)
	if err != nil {
		return nil, err
	}
	return podMetrics(id, view.Spec.(*Spec).Config.GetLinux().GetCgroupParent())
}

// known returns the key of a sandbox in the containerd namespace of ctx. Without an engine it fails
// with Unavailable: after NotFound, containerd's service would forget sandboxes that are in the
// ledger.
func (c *Controller) known(ctx context.Context, id string) (ledger.Key, error) {
	if c.engine == nil {
		return ledger.Key{}, c.degradedError()
	}
	return keyOf(ctx, id)
}

func keyOf(ctx context.Context, id string) (ledger.Key, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return ledger.Key{}, err
	}
	return ledger.Key{Namespace: namespace, ID: id}, nil
}

// inCallersTrace returns ctx in the span of the front's request, if there is one. containerd's
// service puts its own span in between.
func inCallersTrace(ctx context.Context) context.Context {
	if call := cri.FromContext(ctx); call != nil {
		return trace.ContextWithSpan(ctx, trace.SpanFromContext(call.Caller))
	}
	return ctx
}

// attributes returns the span attributes of a sandbox: only the id if the sandbox is unknown.
func (c *Controller) attributes(key ledger.Key) []attribute.KeyValue {
	view, ok := c.find(key)
	if !ok {
		return []attribute.KeyValue{tracing.SandboxID.String(key.ID)}
	}
	return request(key, view.Spec.(*Spec)).Attributes
}

// inCreationTrace returns ctx in the trace of the sandbox's creation, unless ctx has a trace. If
// NRI or the store fails a creation, containerd's service cleans up with a context without a trace.
func (c *Controller) inCreationTrace(ctx context.Context, key ledger.Key) context.Context {
	view, ok := c.find(key)
	if !ok || trace.SpanContextFromContext(ctx).IsValid() {
		return ctx
	}
	return trace.ContextWithRemoteSpanContext(ctx, tracing.FromParent(view.TraceParent))
}
