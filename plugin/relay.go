package plugin

import (
	"context"
	"sync"

	"github.com/podfsm/podfsm/lifecycle"
)

// relay passes items to a receiver, one at a time and in order. The sender never waits for the
// receiver. An idle relay has no goroutine. Its methods may be called by many goroutines.
type relay[T any] struct {
	bound   int         // of waiting items
	pass    func(T)     // the receiver; it may block, and a panic drops only the item
	dropped func(n int) // is called with the number of dropped items, before the next item

	mu      sync.Mutex
	waiting []T
	full    int           // dropped items since the last call of dropped
	passing chan struct{} // closed when the goroutine ends; nil without a goroutine
}

// send queues an item, or drops it if too many wait.
func (r *relay[T]) send(item T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) >= r.bound {
		r.full++
		return
	}
	r.waiting = append(r.waiting, item)
	if r.passing == nil {
		r.passing = make(chan struct{})
		go r.run(r.passing)
	}
}

// run passes all waiting items.
func (r *relay[T]) run(done chan struct{}) {
	defer close(done)
	for item, dropped, ok := r.next(); ok; item, dropped, ok = r.next() {
		_ = lifecycle.Protect(func() error { // which logs a panic
			if dropped > 0 {
				r.dropped(dropped)
			}
			r.pass(item)
			return nil
		})
	}
}

// next returns the first waiting item. It returns false if the goroutine has to end.
func (r *relay[T]) next() (item T, dropped int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) == 0 {
		r.waiting, r.passing = nil, nil
		return item, 0, false
	}
	item, dropped = r.waiting[0], r.full
	clear(r.waiting[:1])
	r.waiting, r.full = r.waiting[1:], 0
	return item, dropped, true
}

// flush waits until all items are handled, or ctx ends.
func (r *relay[T]) flush(ctx context.Context) {
	r.mu.Lock()
	passing := r.passing
	r.mu.Unlock()
	if passing == nil {
		return
	}
	select {
	case <-passing:
	case <-ctx.Done():
	}
}
