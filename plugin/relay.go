package plugin

import (
	"context"
	"sync"

	"github.com/podfsm/podfsm/lifecycle"
)

// relay hands things on, one at a time and in their order. The sender never waits for the receiver. With nothing to hand on, a relay
// costs no goroutine. Its methods may be called by many goroutines.
type relay[T any] struct {
	bound int         // how many things may wait
	pass  func(T)     // the receiver; it may block, and a panic of it costs only the thing
	lost  func(n int) // is told how many things found no room, before the next thing

	mu      sync.Mutex
	waiting []T
	full    int           // things that found no room, since lost was told
	passing chan struct{} // closed when the goroutine ends; nil when there is none
}

// send queues a thing, or counts it as lost.
func (r *relay[T]) send(thing T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) >= r.bound {
		r.full++
		return
	}
	r.waiting = append(r.waiting, thing)
	if r.passing == nil {
		r.passing = make(chan struct{})
		go r.run(r.passing)
	}
}

// run hands on all that waits.
func (r *relay[T]) run(done chan struct{}) {
	defer close(done)
	for thing, lost, ok := r.next(); ok; thing, lost, ok = r.next() {
		_ = lifecycle.Protect(func() error { // which logs a panic
			if lost > 0 {
				r.lost(lost)
			}
			r.pass(thing)
			return nil
		})
	}
}

// next takes the first thing that waits. Without one, the goroutine has to end.
func (r *relay[T]) next() (thing T, lost int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) == 0 {
		r.waiting, r.passing = nil, nil
		return thing, 0, false
	}
	thing, lost = r.waiting[0], r.full
	clear(r.waiting[:1])
	r.waiting, r.full = r.waiting[1:], 0
	return thing, lost, true
}

// settle waits until all is handed on, or ctx ends.
func (r *relay[T]) settle(ctx context.Context) {
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
