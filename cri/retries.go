package cri

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// closeTimeout bounds how long containerd's shutdown waits for rollbacks. An unfinished rollback continues
	// after the restart.
	closeTimeout = 10 * time.Second
	// deliveryTime is the most that an answer takes to reach its caller. An answer that leaves later than this
	// before the caller's deadline may arrive too late.
	deliveryTime = 100 * time.Millisecond
)

var (
	errSuperseded = fmt.Errorf("superseded by a newer request for the same attempt, with another configuration: %w", errdefs.ErrAborted)
	errClosing    = fmt.Errorf("containerd is stopping: %w", errdefs.ErrUnavailable)
)

// retries is the CRI service that callers meet. It decorates the front: for callers that give up and retry, it
// makes one sandbox per attempt of a pod.
//
//   - A creation doesn't end with its caller. A retry joins the creation, or receives the finished sandbox.
//   - A retry with another configuration ends the older creation first, which rolls the creation back.
//   - Every answer that returns or shows a sandbox claims the sandbox, see [lifecycle.Claim]. An unclaimed
//     sandbox is discarded after a while. A creation under way is in no answer, because containerd's service
//     lists no unfinished sandbox.
//
// It passes on every other request, and every pod of another runtime handler.
type retries struct {
	runtime.RuntimeServiceServer // the front
	sandboxes                    Attempts
	initialized                  func() bool // whether containerd's service serves yet
	unclaimed                    time.Duration
	ending                       attemptLock // of stops and removals

	ctx    context.Context // of discards; it ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup // creations and discards

	mu       sync.Mutex
	closed   bool
	underWay map[attempt]*sharedCreation
	timers   map[string]*time.Timer // of unclaimed sandboxes, by sandbox id
}

// newRetries decorates front. It discards finished sandboxes that stay unclaimed for the time unclaimed.
func newRetries(front runtime.RuntimeServiceServer, sandboxes Attempts, initialized func() bool, unclaimed time.Duration) *retries {
	r := &retries{
		RuntimeServiceServer: front,
		sandboxes:            sandboxes,
		initialized:          initialized,
		unclaimed:            unclaimed,
		ending:               attemptLock{held: map[attempt]chan struct{}{}},
		underWay:             map[attempt]*sharedCreation{},
		timers:               map[string]*time.Timer{},
	}
	r.ctx, r.cancel = context.WithCancelCause(namespaces.WithNamespace(context.Background(), Namespace))
	for _, id := range sandboxes.Unclaimed() {
		r.discardAfter(unclaimed, id)
	}
	return r
}

// Close ends the creations under way, which rolls them back, and refuses new ones. Unclaimed sandboxes stay
// claimable after the restart.
func (r *retries) Close() error {
	r.mu.Lock()
	r.closed = true
	for _, timer := range r.timers {
		timer.Stop()
	}
	for _, c := range r.underWay {
		c.cancel(errClosing)
	}
	r.mu.Unlock()
	r.cancel(errClosing)

	idle := make(chan struct{})
	go func() {
		r.work.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(closeTimeout):
		log.L.Warn("rollback unfinished at shutdown, continues after the restart")
	}
	return nil
}

// RunPodSandbox returns the sandbox of the pod's attempt: the one that a creation under way makes, a finished
// one that no caller has taken, or a new one. A caller that leaves doesn't end the creation. An error other than
// the caller's own means that nothing of the pod is left, or that the ledger has what is left.
func (r *retries) RunPodSandbox(ctx context.Context, req *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	ours, err := r.sandboxes.Ours(req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	if !ours {
		return r.RuntimeServiceServer.RunPodSandbox(ctx, req)
	}
	// A request that can't work must not supersede a creation that works.
	if err := r.sandboxes.Admit(ctx, req.GetRuntimeHandler(), req.GetConfig()); err != nil {
		return nil, err
	}
	id, err := r.join(ctx, req)
	if err != nil {
		return nil, err
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// join returns the sandbox of the creation under way for the pod's attempt, or of a new one, which it starts.
func (r *retries) join(ctx context.Context, req *runtime.RunPodSandboxRequest) (string, error) {
	for {
		c, joined, err := r.lookUpOrRegister(ctx, req)
		if err != nil {
			return "", err
		}
		if !joined {
			go r.runCreation(c)
		} else if r.supersede(c, req) {
			select {
			case <-c.ended:
				continue
			case <-ctx.Done():
				return "", r.callerLeft(ctx, c)
			}
		}
		id, discarded, err := r.await(ctx, c, joined)
		if !discarded {
			return id, err
		}
	}
}

// lookUpOrRegister returns the creation under way for the pod's attempt, or registers a new one, which the caller
// runs. It fails with Unavailable after Close.
func (r *retries) lookUpOrRegister(ctx context.Context, req *runtime.RunPodSandboxRequest) (_ *sharedCreation, joined bool, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, false, errClosing
	}
	key := attemptOf(req.GetConfig())
	if c, ok := r.underWay[key]; ok {
		return c, true, nil
	}
	c := newSharedCreation(ctx, req)
	r.underWay[key] = c
	r.work.Add(1)
	return c, false, nil
}

// supersede ends a creation with another configuration than that of req. It says whether req has to wait for the
// end of the creation: an earlier request may have superseded the creation, too.
func (r *retries) supersede(c *sharedCreation, req *runtime.RunPodSandboxRequest) bool {
	if sameShape(c.request, req) {
		return c.superseded()
	}
	r.sandboxes.CountRetry(RetrySuperseded)
	c.cancel(errSuperseded)
	return true
}

// await waits for the outcome of a creation, until ctx ends, and claims the sandbox for the caller. discarded says
// that the sandbox was discarded before the claim, so that the caller needs another one.
func (r *retries) await(ctx context.Context, c *sharedCreation, joined bool) (id string, discarded bool, err error) {
	if joined {
		r.sandboxes.CountRetry(RetryJoined)
		var span trace.Span
		ctx, span = otel.Tracer(tracing.Name).Start(ctx, tracing.SpanRun, trace.WithLinks(trace.LinkFromContext(c.ctx)),
			trace.WithAttributes(append(Attributes(c.request.GetConfig(), c.request.GetRuntimeHandler()), tracing.Joined.Bool(true))...))
		defer func() { tracing.End(span, err) }()
	}
	select {
	case <-c.ended:
		if c.err != nil {
			return "", false, c.err
		}
	case <-ctx.Done():
	}
	claim := claimOf(ctx)
	if claim == lifecycle.Unclaimed {
		return "", false, r.callerLeft(ctx, c)
	}
	if !r.sandboxes.Claim(ctx, c.id, claim) {
		return "", true, nil
	}
	r.stopDiscardTimer(c.id)
	return c.id, false, nil
}

// claimOf is the claim of a caller that is returned a sandbox now.
func claimOf(ctx context.Context) lifecycle.Claim {
	switch deadline, ok := ctx.Deadline(); {
	case ctx.Err() != nil:
		return lifecycle.Unclaimed
	case ok && time.Until(deadline) < deliveryTime:
		return lifecycle.Shown // the caller may receive the sandbox, so it stays; a retry may have it, too
	default:
		return lifecycle.Taken
	}
}

// callerLeft is the answer to a caller whose context ends before the creation does. The kubelet aggregates events by
// text, so only the log has what differs from try to try.
func (r *retries) callerLeft(ctx context.Context, c *sharedCreation) error {
	entry := tracing.Log(c.ctx).WithField(tracing.LogPod, c.pod())
	if pod, ok := r.sandboxes.Named(c.request.GetConfig().GetMetadata()); ok {
		entry = entry.WithField(tracing.LogSandbox, pod.ID).WithField(tracing.LogState, pod.State)
		if pod.Step != "" {
			entry = entry.WithField(tracing.LogStep, pod.Step).WithField(tracing.LogSeconds, time.Since(pod.Since).Seconds())
		}
	}
	entry.Warn("pod creation continues after its caller's deadline")
	return fmt.Errorf("creation of pod %q continues after its caller's deadline, and a retry joins it: %w", c.pod(), ctx.Err())
}

// sameShape says whether two requests for one attempt ask for the same sandbox. The kubelet may change labels
// and annotations of a pod at any time. Every other field shapes the sandbox.
func sameShape(a, b *runtime.RunPodSandboxRequest) bool {
	shape := func(req *runtime.RunPodSandboxRequest) *runtime.RunPodSandboxRequest {
		req = proto.CloneOf(req)
		if req.Config != nil {
			req.Config.Labels, req.Config.Annotations = nil, nil
		}
		return req
	}
	return proto.Equal(shape(a), shape(b))
}
