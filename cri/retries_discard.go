package cri

import (
	"context"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// discardTimeout bounds one try to discard a sandbox. The kubelet gives a stop as long.
	discardTimeout = 2 * time.Minute
	// uninitializedWait is the wait for containerd's service to serve. Before that, it can't stop a sandbox.
	uninitializedWait = time.Second
)

// discardAfter discards a finished sandbox after a while, unless a caller claims the sandbox until then.
func (r *retries) discardAfter(wait time.Duration, id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.timers[id] = time.AfterFunc(wait, func() { r.discardUnclaimed(id) })
	}
}

// stopDiscardTimer stops the timer of a claimed sandbox. It only saves the timer: a claimed sandbox isn't discarded.
func (r *retries) stopDiscardTimer(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if timer, ok := r.timers[id]; ok {
		timer.Stop()
		delete(r.timers, id)
	}
}

// discardUnclaimed discards a sandbox without a claim. A failure is retried.
func (r *retries) discardUnclaimed(id string) {
	if !r.enterDiscard(id) {
		return
	}
	defer r.work.Done()
	if !r.initialized() {
		r.discardAfter(uninitializedWait, id)
		return
	}
	pod, ok := r.sandboxes.Sandbox(id)
	if !ok || !r.sandboxes.Discard(id, lifecycle.Unclaimed) {
		return
	}
	ctx, cancel := context.WithTimeout(r.ctx, discardTimeout)
	defer cancel()
	ctx, span := tracing.StartLinked(ctx, tracing.SpanDiscard, pod.TraceParent,
		append(Attributes(pod.Config, pod.Handler), tracing.SandboxID.String(id))...)
	entry := tracing.Log(ctx).WithField(tracing.LogPod, records.PodName(pod.Config)).WithField(tracing.LogSandbox, id)
	entry.Info("no caller claimed the sandbox in time, discarding")
	err := lifecycle.Protect(func() error { return r.discard(ctx, id) })
	tracing.End(span, err)
	if err != nil {
		entry.WithError(err).WithField(tracing.LogRetryIn, r.unclaimed.Seconds()).Warn("discard failed, retrying")
		r.discardAfter(r.unclaimed, id)
		return
	}
	r.sandboxes.CountRetry(PodUnclaimed)
}

// enterDiscard counts a discard in, unless Close was called.
func (r *retries) enterDiscard(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.timers, id)
	if r.closed {
		return false
	}
	r.work.Add(1)
	return true
}

// discard stops and removes a sandbox that is marked as discarded, in containerd's service, too.
func (r *retries) discard(ctx context.Context, id string) error {
	if _, err := r.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := r.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}
