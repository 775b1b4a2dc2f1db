// Package cri is podfsm's thin front on containerd's own CRI service.
//
// containerd's service makes the network namespace and runs CNI before it calls a sandbox controller, except for
// pods on the node's network. So the front passes a podfsm pod on as such a pod. The pod's true configuration
// travels beside it in the context. On the way out, the front restores what the answers show of that. It passes
// on every other request, and every other pod, untouched.
//
// A request comes through [retries] first, which gives concurrent and repeated requests for one attempt of a pod
// the same sandbox. Then [service] translates it, calls containerd's service and restores the answer.
//
// A RunPodSandbox for a podfsm pod goes this way:
//
//	retries.go                     retries.RunPodSandbox  admits the pod
//	                               join                   joins the creation under way, or starts one
//	retries_run.go                 runCreation, create    once for all callers of the attempt
//	front.go                       service.RunPodSandbox  gets the pause image
//	                               runOurs                puts a [Call] into the context
//	containerd's CRI service                              calls podfsm's sandbox controller
//	plugin/controller_sandbox.go   Create, Start          look the call up, and call the engine
//	lifecycle/engine.go            Create, Start          queue the request
//	lifecycle/create.go                                   runs the steps: plugin/step_*.go
package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/tracing"
)

// service is the front. What it doesn't define, containerd's service serves.
type service struct {
	inner
	sandboxes Sandboxes
	streams   *streams // port forwards
	unread    unreadStats
}

// RunPodSandbox runs a podfsm pod through containerd's service. If ctx ends, what was made is undone.
func (s *service) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (_ *runtime.RunPodSandboxResponse, err error) {
	ours, err := s.sandboxes.Ours(r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	if !ours {
		return s.runStock(ctx, r)
	}
	begun := time.Now()
	err = errdefs.ErrInternal // the outcome if what follows panics
	defer func() { s.sandboxes.Created(time.Since(begun), err) }()
	if err := s.ensurePauseImage(ctx, r); err != nil {
		return nil, err
	}
	return s.runOurs(ctx, r)
}

// pullTimeout bounds the pull of the pause image. No caller's deadline ends the pull, and containerd's own bound,
// on a pull without progress, can be off.
const pullTimeout = 10 * time.Minute

// ensurePauseImage pulls the pause image if it is missing, before anything is made for the pod. containerd's
// service would pull it with half of the pod made. It fails with the class of the pull's error, else with
// Unavailable.
func (s *service) ensurePauseImage(ctx context.Context, r *runtime.RunPodSandboxRequest) error {
	image := &runtime.ImageSpec{Image: s.sandboxes.PauseImage(), RuntimeHandler: r.GetRuntimeHandler()}
	found, err := s.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: image})
	if err == nil && found.GetImage() != nil {
		return nil
	}
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, pullTimeout, fmt.Errorf("no image within %s: %w", pullTimeout, context.DeadlineExceeded))
		defer cancel()
		_, err = s.images.PullImage(ctx, &runtime.PullImageRequest{Image: image, SandboxConfig: r.GetConfig()})
	}
	if err != nil {
		return fmt.Errorf("failed to get the pause image %q of pod %q; check pinned_images.sandbox, or import the image: %w: %w",
			image.GetImage(), records.PodName(r.GetConfig()), err, errdefs.ErrUnavailable)
	}
	return nil
}

// runOurs translates the request, calls containerd's service, and cleans up after a failure.
func (s *service) runOurs(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	call := &Call{Config: proto.CloneOf(r.GetConfig()), Handler: r.GetRuntimeHandler()}
	// The end of ctx reaches the controller through the call. containerd's service doesn't clean up after a
	// failure once its own context has ended.
	resp, err := s.RuntimeServiceServer.RunPodSandbox(context.WithoutCancel(with(ctx, call)), onNodeNetwork(r))
	trace.SpanFromContext(ctx).SetAttributes(tracing.SandboxID.String(call.SandboxID))
	switch {
	case err == nil:
		return resp, nil
	case call.Err != nil:
		err = call.Err
	case call.SandboxID != "":
		// NRI or the store failed around the controller. No one but the front undoes the sandbox then.
		if pending := s.sandboxes.RemoveSandbox(context.WithoutCancel(ctx), call.SandboxID); pending != nil {
			err = lifecycle.WithPendingCleanup(err, pending)
		}
	}
	return nil, aboutSandbox(call.SandboxID, err)
}

// onNodeNetwork is a copy of the request with the network mode NODE, which makes containerd's service leave the
// network alone.
func onNodeNetwork(r *runtime.RunPodSandboxRequest) *runtime.RunPodSandboxRequest {
	r = proto.CloneOf(r)
	linux := ensure(&ensure(&r.Config).Linux)
	ensure(&ensure(&linux.SecurityContext).NamespaceOptions).Network = runtime.NamespaceMode_NODE
	return r
}

// ensure gives a message pointer that may be nil a message to point to.
func ensure[T any](p **T) *T {
	if *p == nil {
		*p = new(T)
	}
	return *p
}

const (
	// stopTries is how often one request tries to stop a sandbox. A few tries suffice: the kubelet retries, too.
	stopTries = 3
	// stopAgain is the wait before the second try. It doubles with each try.
	stopAgain = 500 * time.Millisecond
)

// StopPodSandbox lets containerd's service stop the containers and pause, and tell NRI. Then it takes the pod off
// its network. If a runtime, a shim or a plugin fails, it retries within the caller's deadline.
func (s *service) StopPodSandbox(ctx context.Context, r *runtime.StopPodSandboxRequest) (_ *runtime.StopPodSandboxResponse, err error) {
	id, pod, ok := s.find(ctx, r.GetPodSandboxId())
	if !ok {
		return s.RuntimeServiceServer.StopPodSandbox(ctx, r)
	}
	ctx, span := tracing.Start(ctx, tracing.SpanStop, append(Attributes(pod.Config, ""), tracing.SandboxID.String(id))...)
	defer func() { tracing.End(span, err) }()

	wait := stopAgain
	for try := 1; ; try++ {
		begun := time.Now()
		resp, err := s.stop(ctx, id, r)
		// Another try takes as long as the last.
		if err == nil || try == stopTries || lasts(err) || !leavesTime(ctx, wait+time.Since(begun)) {
			return resp, err
		}
		tracing.Log(ctx).WithField(tracing.LogPod, records.PodName(pod.Config)).WithField(tracing.LogSandbox, id).
			WithField(tracing.LogRetryIn, wait.Seconds()).WithError(err).Warn("stop failed, retrying")
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, err
		}
		wait *= 2
	}
}

// lasts says whether an error stays until an operator repairs the node or the caller changes the request. The
// error's class tells that.
func lasts(err error) bool {
	return errdefs.IsFailedPrecondition(err) || errdefs.IsInvalidArgument(err) || errdefs.IsAlreadyExists(err)
}

// leavesTime says whether ctx lasts at least as long as needed.
func leavesTime(ctx context.Context, needed time.Duration) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() == nil && (!ok || time.Until(deadline) >= needed)
}

func (s *service) stop(ctx context.Context, id string, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	held, sayTornDown := holdTornDown(with(ctx, &Call{}), id)
	resp, err := s.RuntimeServiceServer.StopPodSandbox(held, r)
	if err != nil {
		return nil, err
	}
	s.streams.endPod(id)
	if err := s.sandboxes.StopSandbox(ctx, id); err != nil {
		return nil, err
	}
	sayTornDown()
	return resp, nil
}

// RemovePodSandbox lets containerd's service remove the containers and shut the sandbox down, which undoes all
// that podfsm made.
func (s *service) RemovePodSandbox(ctx context.Context, r *runtime.RemovePodSandboxRequest) (_ *runtime.RemovePodSandboxResponse, err error) {
	id, pod, ok := s.find(ctx, r.GetPodSandboxId())
	if !ok {
		return s.removeStock(ctx, r)
	}
	ctx, span := tracing.Start(ctx, tracing.SpanRemove, append(Attributes(pod.Config, ""), tracing.SandboxID.String(id))...)
	defer func() { tracing.End(span, err) }()

	held, sayTornDown := holdTornDown(with(ctx, &Call{}), id)
	resp, err := s.RuntimeServiceServer.RemovePodSandbox(held, r)
	if err != nil {
		return nil, err
	}
	s.streams.endPod(id)
	// containerd's service may no longer know the sandbox. podfsm's part of it has to go all the same.
	if err := s.sandboxes.RemoveSandbox(ctx, id); err != nil {
		return nil, err
	}
	sayTornDown()
	return resp, nil
}

// find returns the podfsm sandbox that a request names.
func (s *service) find(ctx context.Context, id string) (string, Sandbox, bool) {
	return find(ctx, s.RuntimeServiceServer, s.sandboxes.Sandbox, id)
}

// fullID is the length of the ids that containerd's service gives out. The kubelet uses full ids.
const fullID = 64

// find returns the full id and the podfsm sandbox for an id that may be shortened, as containerd's service
// resolves ids. It lists the sandboxes only for a shortened id: a list costs more with each pod of the node.
func find(ctx context.Context, lister runtime.RuntimeServiceServer, byID func(id string) (Sandbox, bool), id string) (string, Sandbox, bool) {
	if pod, ok := byID(id); ok || id == "" || len(id) >= fullID {
		return id, pod, ok
	}
	list, err := lister.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: id}})
	if err != nil || len(list.GetItems()) != 1 {
		return "", Sandbox{}, false
	}
	full := list.GetItems()[0].GetId()
	pod, ok := byID(full)
	return full, pod, ok
}

// Attributes describe a pod on a span. They leave out an empty handler.
func Attributes(config *runtime.PodSandboxConfig, handler string) []attribute.KeyValue {
	metadata := config.GetMetadata()
	attributes := []attribute.KeyValue{
		tracing.PodName.String(metadata.GetName()),
		tracing.PodNamespace.String(metadata.GetNamespace()),
		tracing.PodUID.String(metadata.GetUid()),
		tracing.PodAttempt.Int64(int64(metadata.GetAttempt())),
	}
	if handler != "" {
		attributes = append(attributes, tracing.RuntimeHandler.String(handler))
	}
	return attributes
}
