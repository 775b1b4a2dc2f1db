package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// sharedCreation is one creation of a sandbox, for all callers that ask for the same attempt. No caller ends the
// creation by leaving.
type sharedCreation struct {
	request *runtime.RunPodSandboxRequest
	ctx     context.Context // with the creation's span; ending it ends the creation
	cancel  context.CancelCauseFunc
	ended   chan struct{} // closed once id and err are set
	id      string
	err     error
}

// newSharedCreation returns a creation that outlives the end of ctx.
func newSharedCreation(ctx context.Context, req *runtime.RunPodSandboxRequest) *sharedCreation {
	c := &sharedCreation{request: proto.CloneOf(req), ended: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	c.ctx, _ = tracing.Start(c.ctx, tracing.SpanRun, Attributes(req.GetConfig(), req.GetRuntimeHandler())...)
	return c
}

func (c *sharedCreation) pod() string { return records.PodName(c.request.GetConfig()) }

// superseded says whether a newer request with another configuration ends the creation.
func (c *sharedCreation) superseded() bool { return errors.Is(context.Cause(c.ctx), errSuperseded) }

// runCreation runs a registered creation and wakes the callers that wait for it. After a failure nothing is left, or
// the ledger has what is left.
func (r *retries) runCreation(c *sharedCreation) {
	defer r.work.Done()
	var id string
	err := lifecycle.Protect(func() (err error) {
		id, err = r.create(c)
		return err
	})
	about, err := unmark(err)
	if cause := context.Cause(c.ctx); err != nil && cause != nil {
		tracing.Log(c.ctx).WithField(tracing.LogPod, c.pod()).WithError(err).Warn("pod creation canceled")
		err = fmt.Errorf("the creation of pod %q was ended: %w", c.pod(), cause)
	}
	tracing.End(trace.SpanFromContext(c.ctx), err)
	c.id, c.err = id, constant(err, about)

	r.mu.Lock()
	delete(r.underWay, attemptOf(c.request.GetConfig()))
	r.mu.Unlock()
	if err == nil {
		tracing.Log(c.ctx).WithField(tracing.LogPod, c.pod()).WithField(tracing.LogSandbox, id).Debug("sandbox waits to be claimed")
		// The timer starts before a caller can claim the sandbox, because the claim stops the timer.
		r.discardAfter(r.unclaimed, id)
	}
	close(c.ended)
	c.cancel(nil)
}

// create returns the sandbox that c's attempt already has, or has the front run a new one.
func (r *retries) create(c *sharedCreation) (id string, err error) {
	if id, err := r.existing(c); id != "" || err != nil {
		return id, err
	}
	resp, err := r.RuntimeServiceServer.RunPodSandbox(c.ctx, c.request)
	return resp.GetPodSandboxId(), err
}

// existing returns the sandbox that c's attempt already has, if a retry may have it; "" for none. It first waits
// for, or discards, a sandbox that is in the way of a new one. It fails with AlreadyExists if the sandbox is
// taken.
func (r *retries) existing(c *sharedCreation) (id string, err error) {
	waitedFor := ""
	for c.ctx.Err() == nil {
		if err := r.ending.wait(c.ctx, attemptOf(c.request.GetConfig())); err != nil {
			return "", err
		}
		pod, ok := r.sandboxes.Named(c.request.GetConfig().GetMetadata())
		if !ok {
			return "", nil
		}
		made := &runtime.RunPodSandboxRequest{Config: pod.Config, RuntimeHandler: pod.Handler}
		finished := pod.State == states.Ready || pod.State == states.NotReady
		switch {
		// The sandbox is what the retry asks for, and its creation's caller didn't get it.
		case pod.State == states.Ready && pod.Claim < lifecycle.Taken && sameShape(made, c.request):
			r.sandboxes.CountRetry(RetryTook)
			markRetried(c.ctx, pod)
			return pod.ID, nil
		// The sandbox is being discarded, or no caller took it and it is of no use: pause has exited, or its
		// configuration is another one.
		case pod.Claim == lifecycle.Discarded, finished && r.sandboxes.Discard(pod.ID, lifecycle.Shown):
			if err := r.discard(c.ctx, pod.ID); err != nil {
				return "", aboutSandbox(pod.ID, err)
			}
		// Recovery may be rolling the sandbox back, or a caller may be removing it. One wait tells whether the sandbox
		// goes away.
		case !finished && waitedFor != pod.ID:
			waitedFor = pod.ID
			if err := r.sandboxes.WaitQueued(c.ctx, pod.ID); err != nil {
				return "", aboutSandbox(pod.ID, err)
			}
		// A caller has the sandbox, or it stays for another reason, such as a pending cleanup.
		default:
			return "", fmt.Errorf("pod %q has sandbox %q for its attempt %d already; a new sandbox needs a new attempt: %w",
				c.pod(), pod.ID, c.request.GetConfig().GetMetadata().GetAttempt(), errdefs.ErrAlreadyExists)
		}
	}
	return "", context.Cause(c.ctx)
}

// markRetried marks the span in ctx as that of a retry that takes a finished sandbox.
func markRetried(ctx context.Context, pod Sandbox) {
	span := trace.SpanFromContext(ctx)
	span.SetAttributes(tracing.Joined.Bool(true), tracing.SandboxID.String(pod.ID))
	for _, link := range tracing.Link(pod.TraceParent) {
		span.AddLink(link)
	}
}
