package cri

import (
	"context"
	"fmt"
	"sync"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// attempt names one attempt at running a pod. Only one sandbox per attempt exists at a time. containerd's
// service names sandboxes by the same four fields.
type attempt struct {
	name, namespace, uid string
	number               uint32
}

func attemptOf(config *runtime.PodSandboxConfig) attempt {
	m := config.GetMetadata()
	return attempt{m.GetName(), m.GetNamespace(), m.GetUid(), m.GetAttempt()}
}

// attemptLock locks attempts. A request that stops or removes a sandbox holds the lock of the sandbox's attempt.
//
// The CRI calls both requests idempotent. In containerd's service, two removals at a time fail at the first
// container, and both report the end of the sandbox. That service also releases the sandbox's name a moment
// after podfsm does. So the next sandbox of the attempt waits for the lock as well.
type attemptLock struct {
	mu   sync.Mutex
	held map[attempt]chan struct{} // closed when the holder unlocks
}

// lock waits until no other request holds the attempt. It fails when ctx ends first.
func (l *attemptLock) lock(ctx context.Context, of attempt) (unlock func(), err error) {
	for {
		released, locked := l.tryLock(of)
		if locked {
			return func() { l.unlock(of) }, nil
		}
		select {
		case <-released:
		case <-ctx.Done():
			return nil, fmt.Errorf("another request is stopping or removing the sandbox of pod \"%s/%s\": %w", of.namespace, of.name, context.Cause(ctx))
		}
	}
}

// wait returns as soon as no request holds the attempt. It fails when ctx ends first.
func (l *attemptLock) wait(ctx context.Context, of attempt) error {
	unlock, err := l.lock(ctx, of)
	if err == nil {
		unlock()
	}
	return err
}

// tryLock locks the attempt, or returns the channel that its holder closes.
func (l *attemptLock) tryLock(of attempt) (released <-chan struct{}, locked bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if released, ok := l.held[of]; ok {
		return released, false
	}
	l.held[of] = make(chan struct{})
	return nil, true
}

func (l *attemptLock) unlock(of attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.held[of])
	delete(l.held, of)
}
