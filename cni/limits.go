package cni

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"
)

// maxDels is how many DELs of a plugin run at a time. Each plugin has a limit of its own: pods of other networks don't wait for one that
// hangs.
const maxDels = 32

// limits are the semaphores of the plugins, by type. The zero value has none yet. A semaphore serves in the order of arrival, and a pod
// arrives once per plugin: the pods take turns.
type limits struct {
	mu   sync.Mutex
	free map[string]*semaphore.Weighted
}

// enter waits until the plugin may run. left has to be called when it has ended. It fails with what ended ctx.
func (l *limits) enter(ctx context.Context, plugin string) (left func(), _ error) {
	free := l.of(plugin)
	if err := free.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("it waited for the DELs of other pods, at most %d run at a time: %w", maxDels, context.Cause(ctx))
	}
	return func() { free.Release(1) }, nil
}

func (l *limits) of(plugin string) *semaphore.Weighted {
	l.mu.Lock()
	defer l.mu.Unlock()
	free, ok := l.free[plugin]
	if !ok {
		if l.free == nil {
			l.free = map[string]*semaphore.Weighted{}
		}
		free = semaphore.NewWeighted(maxDels)
		l.free[plugin] = free
	}
	return free
}
