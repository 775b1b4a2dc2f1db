package cni

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"
)

// maxDels is how many DELs of a plugin run at a time. Each plugin has its own limit, so that a
// hanging plugin delays no pods of other networks.
const maxDels = 32

// limits are the semaphores of the plugins, by type. The zero value is ready for use. A semaphore
// serves pods in the order of their arrival.
type limits struct {
	mu   sync.Mutex
	free map[string]*semaphore.Weighted
}

// enter waits until the plugin may run. Call left when the plugin has ended.
//
// Errors: the cause of ctx.
func (l *limits) enter(ctx context.Context, plugin string) (left func(), _ error) {
	free := l.of(plugin)
	if err := free.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("waited for the DELs of other pods, of which %d run at a time: %w", maxDels, context.Cause(ctx))
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
