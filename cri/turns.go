package cri

import (
	"context"
	"fmt"
	"sync"
)

// turns lets one request at a time end a sandbox. containerd's service fails a Remove that meets another one at a container, and tells
// of the sandbox's end twice; the CRI says that both are idempotent.
type turns struct {
	mu    sync.Mutex
	taken map[string]chan struct{} // by sandbox id, closed when the turn ends
}

// take waits for the sandbox's turn. It fails when ctx ends first.
func (t *turns) take(ctx context.Context, id string) (end func(), err error) {
	for {
		before, free := t.tryTake(id)
		if free {
			return func() { t.give(id) }, nil
		}
		select {
		case <-before:
		case <-ctx.Done():
			return nil, fmt.Errorf("sandbox %q is being ended by another request: %w", id, ctx.Err())
		}
	}
}

func (t *turns) tryTake(id string) (before <-chan struct{}, free bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if before, ok := t.taken[id]; ok {
		return before, false
	}
	t.taken[id] = make(chan struct{})
	return nil, true
}

func (t *turns) give(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.taken[id])
	delete(t.taken, id)
}
