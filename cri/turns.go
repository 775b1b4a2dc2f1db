package cri

import (
	"context"
	"fmt"
	"sync"
)

// turns lets one request at a time end the sandbox of a pod's attempt. containerd's service fails a Remove that meets another one at a
// container, and tells of the sandbox's end twice; the CRI says that both are idempotent. And it holds the sandbox's name a moment
// longer than we do, so the next sandbox of that name waits for the turn, too.
type turns struct {
	mu    sync.Mutex
	taken map[attempt]chan struct{} // closed when the turn ends
}

// take waits for the attempt's turn. It fails when ctx ends first.
func (t *turns) take(ctx context.Context, of attempt) (end func(), err error) {
	for {
		before, free := t.tryTake(of)
		if free {
			return func() { t.give(of) }, nil
		}
		select {
		case <-before:
		case <-ctx.Done():
			return nil, fmt.Errorf("the sandbox of pod \"%s/%s\" is being ended by another request: %w", of.namespace, of.name, context.Cause(ctx))
		}
	}
}

// wait returns when nobody is ending the attempt's sandbox, or with an error when ctx ends.
func (t *turns) wait(ctx context.Context, of attempt) error {
	end, err := t.take(ctx, of)
	if err == nil {
		end()
	}
	return err
}

func (t *turns) tryTake(of attempt) (before <-chan struct{}, free bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if before, ok := t.taken[of]; ok {
		return before, false
	}
	t.taken[of] = make(chan struct{})
	return nil, true
}

func (t *turns) give(of attempt) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.taken[of])
	delete(t.taken, of)
}
