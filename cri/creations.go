package cri

import (
	"context"
	"errors"
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
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// discardTimeout is how long one try at ending a discarded sandbox may take; the kubelet gives a stop as long.
	discardTimeout = 2 * time.Minute
	// closeTimeout is how long a stop of containerd waits for creations to be rolled back; what takes longer goes on after the
	// next start.
	closeTimeout = 10 * time.Second
	// uninitializedWait is the wait for containerd's service to serve, which has to before a sandbox can be ended.
	uninitializedWait = time.Second
	// deliveryTime is what an answer takes at most to reach its caller. One that was sent shortly before the caller's deadline may
	// have come too late.
	deliveryTime = 100 * time.Millisecond
)

var (
	errSuperseded = fmt.Errorf("superseded by a newer request for the same attempt, with another configuration: %w", errdefs.ErrAborted)
	errClosing    = fmt.Errorf("containerd is stopping: %w", errdefs.ErrUnavailable)
)

// attempt is what there is one sandbox of at a time. Its parts are those of containerd's own names.
type attempt struct {
	name, namespace, uid string
	number               uint32
}

func attemptOf(config *runtime.PodSandboxConfig) attempt {
	m := config.GetMetadata()
	return attempt{m.GetName(), m.GetNamespace(), m.GetUid(), m.GetAttempt()}
}

// creations are those under way, and the timers of the sandboxes that were finished and that nobody may have claimed.
type creations struct {
	timeout time.Duration // until an unclaimed sandbox is discarded
	ctx     context.Context
	cancel  context.CancelCauseFunc
	work    sync.WaitGroup // creations, and ends of discarded sandboxes

	mu       sync.Mutex
	closed   bool
	underWay map[attempt]*creation
	timers   map[string]*time.Timer // by sandbox id
}

func newCreations(timeout time.Duration) *creations {
	cs := &creations{timeout: timeout, underWay: map[attempt]*creation{}, timers: map[string]*time.Timer{}}
	cs.ctx, cs.cancel = context.WithCancelCause(namespaces.WithNamespace(context.Background(), Namespace))
	return cs
}

// creation is one run of a pod, detached from who asked for it.
type creation struct {
	request *runtime.RunPodSandboxRequest
	ctx     context.Context // of its span; it ends, with a cause, when the creation shall
	cancel  context.CancelCauseFunc
	ended   chan struct{} // closed once id and err are set: of a failed creation nothing is left then, or it is owed
	id      string
	err     error
}

// join returns the sandbox of the pod and attempt that r asks for: that of the creation that is under way, one that was finished and
// that nobody has taken, or a new one. A caller that goes leaves the creation alone. If what shapes the sandbox differs, the older
// creation is rolled back first.
func (s *service) join(ctx context.Context, r *runtime.RunPodSandboxRequest) (string, error) {
	for {
		c, joined, err := s.enter(ctx, r)
		if err != nil {
			return "", err
		}
		same := sameShape(c.request, r)
		if !joined || same && !c.superseded() {
			if id, err := s.wait(ctx, c, joined); id != "" || err != nil {
				return id, err
			}
			continue
		}
		if !same {
			s.sandboxes.Happened(RetrySuperseded)
			c.cancel(errSuperseded)
		}
		select {
		case <-c.ended:
		case <-ctx.Done():
			return "", s.goes(ctx, c)
		}
	}
}

// superseded says whether a creation ends for a newer request with another configuration.
func (c *creation) superseded() bool { return errors.Is(context.Cause(c.ctx), errSuperseded) }

// sameShape says whether two requests for one attempt of a pod ask for the same sandbox. Labels and annotations are what the kubelet
// may change of a pod at any time; whatever else it sends is a part of what is made.
func sameShape(a, b *runtime.RunPodSandboxRequest) bool {
	shape := func(r *runtime.RunPodSandboxRequest) *runtime.RunPodSandboxRequest {
		r = proto.CloneOf(r)
		if r.Config != nil {
			r.Config.Labels, r.Config.Annotations = nil, nil
		}
		return r
	}
	return proto.Equal(shape(a), shape(b))
}

// enter returns the creation that is under way for r's pod and attempt, or begins one. It fails with Unavailable once the front is
// closed.
func (s *service) enter(ctx context.Context, r *runtime.RunPodSandboxRequest) (_ *creation, joined bool, _ error) {
	s.creations.mu.Lock()
	defer s.creations.mu.Unlock()
	if s.creations.closed {
		return nil, false, errClosing
	}
	key := attemptOf(r.GetConfig())
	if c, ok := s.creations.underWay[key]; ok {
		return c, true, nil
	}
	c := &creation{request: proto.CloneOf(r), ended: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	c.ctx, _ = tracing.Start(c.ctx, tracing.SpanRun, Attributes(r.GetConfig(), r.GetRuntimeHandler())...)
	s.creations.underWay[key] = c
	s.creations.work.Add(1)
	go s.run(c)
	return c, false, nil
}

// wait returns the outcome of a creation, unless ctx ends first. The caller has then taken the sandbox. When it was discarded before
// that, which only a moment allows, wait returns nothing.
func (s *service) wait(ctx context.Context, c *creation, joined bool) (id string, err error) {
	if joined {
		s.sandboxes.Happened(RetryJoined)
		var span trace.Span
		ctx, span = otel.Tracer(tracing.Name).Start(ctx, tracing.SpanRun, trace.WithLinks(trace.LinkFromContext(c.ctx)),
			trace.WithAttributes(append(Attributes(c.request.GetConfig(), c.request.GetRuntimeHandler()), tracing.Joined.Bool(true))...))
		defer func() { tracing.End(span, err) }()
	}
	select {
	case <-c.ended:
		if c.err != nil {
			return "", c.err
		}
	case <-ctx.Done():
	}
	switch claim := claimOf(ctx); {
	case claim == lifecycle.Unclaimed:
		return "", s.goes(ctx, c)
	case !s.sandboxes.Claim(ctx, c.id, claim):
		return "", nil
	default:
		s.creations.dontExpire(c.id)
		return c.id, nil
	}
}

// claimOf is the claim that a caller has on a sandbox which is returned to it now.
func claimOf(ctx context.Context) lifecycle.Claim {
	switch deadline, ok := ctx.Deadline(); {
	case ctx.Err() != nil:
		return lifecycle.Unclaimed
	case ok && time.Until(deadline) < deliveryTime:
		return lifecycle.Shown // it may have it, so it stays; a retry gets it, too
	default:
		return lifecycle.Taken
	}
}

// goes is the answer to a caller that ended before the creation did. What differs from try to try is in the log only.
func (s *service) goes(ctx context.Context, c *creation) error {
	name := records.PodName(c.request.GetConfig())
	entry := tracing.Log(c.ctx).WithField(tracing.LogPod, name)
	if pod, ok := s.sandboxes.Named(c.request.GetConfig().GetMetadata()); ok {
		entry = entry.WithField(tracing.LogSandbox, pod.ID).WithField(tracing.LogState, pod.State)
		if pod.Step != "" {
			entry = entry.WithField(tracing.LogStep, pod.Step).WithField(tracing.LogSeconds, time.Since(pod.Since).Seconds())
		}
	}
	entry.Warn("podfsm: a caller has gone before its pod was ready; the creation goes on, and a retry joins it")
	return fmt.Errorf("pod %q isn't ready yet; its creation goes on, and a retry joins it: %w", name, ctx.Err())
}

// run makes c's sandbox and tells who waits for it.
func (s *service) run(c *creation) {
	defer s.creations.work.Done()
	var id string
	err := lifecycle.Protect(func() (err error) {
		id, err = s.make(c)
		return err
	})
	if cause := context.Cause(c.ctx); err != nil && cause != nil {
		tracing.Log(c.ctx).WithField(tracing.LogPod, records.PodName(c.request.GetConfig())).WithError(err).Warn("podfsm: a creation was ended")
		err = fmt.Errorf("the creation of pod %q was ended: %w", records.PodName(c.request.GetConfig()), cause)
	}
	tracing.End(trace.SpanFromContext(c.ctx), err)
	c.id, c.err = id, constant(err, id)

	s.creations.mu.Lock()
	delete(s.creations.underWay, attemptOf(c.request.GetConfig()))
	s.creations.mu.Unlock()
	if err == nil {
		tracing.Log(c.ctx).WithField(tracing.LogPod, records.PodName(c.request.GetConfig())).WithField(tracing.LogSandbox, id).Debug("podfsm: a sandbox waits to be claimed")
		s.expireAfter(s.creations.timeout, id)
	}
	close(c.ended)
	c.cancel(nil)
}

// make returns the sandbox of c's pod and attempt that is there already, or runs a new one. An error comes with the id of the sandbox
// that it is about, if there was one.
func (s *service) make(c *creation) (id string, err error) {
	if id, err := s.present(c); id != "" || err != nil {
		return id, err
	}
	begun := time.Now()
	defer func() { s.sandboxes.Created(time.Since(begun), err) }()
	if err := s.ensurePauseImage(c.ctx, c.request); err != nil {
		return "", err
	}
	return s.runOnStock(c.ctx, c.request)
}

// present is the sandbox of c's pod and attempt that is there already, if its retry may have it; "" when there is none. What is in the
// way of a new one is waited for or ended first. It fails with AlreadyExists when somebody has taken it.
func (s *service) present(c *creation) (string, error) {
	waitedFor := ""
	for c.ctx.Err() == nil {
		if err := s.turns.wait(c.ctx, attemptOf(c.request.GetConfig())); err != nil {
			return "", err
		}
		pod, ok := s.sandboxes.Named(c.request.GetConfig().GetMetadata())
		if !ok {
			return "", nil
		}
		made := &runtime.RunPodSandboxRequest{Config: pod.Config, RuntimeHandler: pod.Handler}
		finished := pod.State == states.Ready || pod.State == states.NotReady
		switch {
		case pod.State == states.Ready && pod.Claim < lifecycle.Taken && sameShape(made, c.request):
			s.sandboxes.Happened(RetryTook)
			retried(c.ctx, pod)
			return pod.ID, nil
		case pod.Claim == lifecycle.Discarded, finished && s.sandboxes.Discard(pod.ID, lifecycle.Shown):
			if err := s.discard(c.ctx, pod.ID); err != nil {
				return pod.ID, err
			}
		case !finished && waitedFor != pod.ID:
			waitedFor = pod.ID
			if err := s.sandboxes.Settle(c.ctx, pod.ID); err != nil {
				return pod.ID, err
			}
		default:
			return "", fmt.Errorf("pod %q has sandbox %q for its attempt %d already; a new sandbox needs a new attempt: %w",
				records.PodName(c.request.GetConfig()), pod.ID, c.request.GetConfig().GetMetadata().GetAttempt(), errdefs.ErrAlreadyExists)
		}
	}
	return "", context.Cause(c.ctx)
}

// retried marks the span in ctx as that of a retry which takes a sandbox that was there.
func retried(ctx context.Context, pod Pod) {
	span := trace.SpanFromContext(ctx)
	span.SetAttributes(tracing.Joined.Bool(true), tracing.SandboxID.String(pod.ID))
	for _, link := range tracing.Link(pod.TraceParent) {
		span.AddLink(link)
	}
}

// expireAfter has a sandbox that was finished discarded after a while, unless somebody claims it until then.
func (s *service) expireAfter(wait time.Duration, id string) {
	s.creations.mu.Lock()
	defer s.creations.mu.Unlock()
	if !s.creations.closed {
		s.creations.timers[id] = time.AfterFunc(wait, func() { s.expire(id) })
	}
}

// dontExpire spares a sandbox that is claimed its look at the claim.
func (cs *creations) dontExpire(id string) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if timer, ok := cs.timers[id]; ok {
		timer.Stop()
		delete(cs.timers, id)
	}
}

// expire ends a sandbox that nobody has claimed. When that fails it is tried again.
func (s *service) expire(id string) {
	s.creations.mu.Lock()
	delete(s.creations.timers, id)
	closed := s.creations.closed
	if !closed {
		s.creations.work.Add(1)
	}
	s.creations.mu.Unlock()
	if closed {
		return
	}
	defer s.creations.work.Done()
	if !s.initialized() {
		s.expireAfter(uninitializedWait, id)
		return
	}
	pod, ok := s.sandboxes.Pod(id)
	if !ok || !s.sandboxes.Discard(id, lifecycle.Unclaimed) {
		return
	}
	ctx, cancel := context.WithTimeout(s.creations.ctx, discardTimeout)
	defer cancel()
	ctx, span := tracing.StartLinked(ctx, tracing.SpanDiscard, pod.TraceParent,
		append(Attributes(pod.Config, pod.Handler), tracing.SandboxID.String(id))...)
	entry := tracing.Log(ctx).WithField(tracing.LogPod, records.PodName(pod.Config)).WithField(tracing.LogSandbox, id)
	entry.Info("podfsm: nobody has asked for a sandbox again whose caller had gone; it is discarded")
	err := lifecycle.Protect(func() error { return s.discard(ctx, id) })
	tracing.End(span, err)
	if err != nil {
		entry.WithError(err).Warn("podfsm: failed to discard a sandbox; it will be tried again")
		s.expireAfter(s.creations.timeout, id)
		return
	}
	s.sandboxes.Happened(PodUnclaimed)
}

// discard ends a sandbox that is marked as discarded, in containerd's service, too.
func (s *service) discard(ctx context.Context, id string) error {
	if _, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

// endCreations ends the creations that are under way, which rolls them back, and refuses new ones. Sandboxes that wait to be claimed go on
// doing so after the next start.
func (s *service) endCreations() {
	s.creations.mu.Lock()
	s.creations.closed = true
	for _, timer := range s.creations.timers {
		timer.Stop()
	}
	for _, c := range s.creations.underWay {
		c.cancel(errClosing)
	}
	s.creations.mu.Unlock()
	s.creations.cancel(errClosing)

	idle := make(chan struct{})
	go func() {
		s.creations.work.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(closeTimeout):
		log.L.Warn("podfsm: creations are not rolled back in time; that goes on after the next start")
	}
}
