// Package feed collects what arrives from another process and lets a test wait
// for it without polling.
package feed

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// Feed is an append-only list. The zero value is ready for use, and all methods are safe for
// concurrent use.
type Feed[T any] struct {
	mu      sync.Mutex
	items   []T
	arrived chan struct{} // closed and replaced whenever items grows
}

// Add appends items and wakes every waiter.
func (f *Feed[T]) Add(items ...T) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.items = append(f.items, items...)
	if f.arrived != nil {
		close(f.arrived)
		f.arrived = nil
	}
}

// Items returns a copy of what has arrived so far.
func (f *Feed[T]) Items() []T {
	items, _ := f.snapshot()
	return items
}

// WaitFor waits until done is true of the items, and returns them. If ctx ends first, it returns
// the items so far and an error that wraps that of ctx.
func (f *Feed[T]) WaitFor(ctx context.Context, done func([]T) bool) ([]T, error) {
	for {
		items, arrived := f.snapshot()
		if done(items) {
			return items, nil
		}
		select {
		case <-arrived:
		case <-ctx.Done():
			return items, fmt.Errorf("%d items arrived, but not the expected ones: %w", len(items), context.Cause(ctx))
		}
	}
}

func (f *Feed[T]) snapshot() ([]T, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.arrived == nil {
		f.arrived = make(chan struct{})
	}
	return slices.Clone(f.items), f.arrived
}
