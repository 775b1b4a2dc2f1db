package lifecycle

import (
	"context"
	"fmt"
	"sync"
)

// queue holds the events of one sandbox and handles them one at a time. With no event, it costs no goroutine.
type queue struct {
	handle func(event func()) // handles one event; it must not panic
	left   func()             // called when the goroutine that handles events ends

	mu        sync.Mutex
	events    []func()
	handling  bool
	interrupt context.CancelFunc // ends the current event as soon as another waits; nil for an event that isn't interruptible
}

// add queues an event. The first event in an empty queue starts a goroutine, which handles all
// events until the queue is empty again. enter counts the goroutine in. If enter returns false, so
// does add.
func (q *queue) add(event func(), enter func() bool) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.handling {
		if !enter() {
			return false
		}
		q.handling = true
		go q.run()
	}
	q.events = append(q.events, event)
	q.interruptLocked()
	return true
}

func (q *queue) run() {
	defer q.left()
	for event := q.next(); event != nil; event = q.next() {
		q.handle(event)
	}
}

// next takes the first event. It returns nil for an empty queue, and the goroutine has to end.
func (q *queue) next() func() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.events) == 0 {
		q.events, q.handling = nil, false
		return nil
	}
	event := q.events[0]
	q.events = q.events[1:]
	return event
}

// giveWay ends the current event if it is interruptible.
func (q *queue) giveWay() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.interruptLocked()
}

func (q *queue) interruptLocked() {
	if q.interrupt != nil {
		q.interrupt()
	}
}

// interruptibly does work in the queue that gives way to every other event. The work's context ends when another event
// comes, or when the engine closes.
func (q *queue) interruptibly(ctx context.Context, work func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !q.interruptBy(cancel) {
		return
	}
	defer q.interruptBy(nil)
	work(ctx)
}

// interruptBy sets how to interrupt the current event; nil for not at all. It returns false if another event waits
// already, so that the work isn't begun.
func (q *queue) interruptBy(interrupt context.CancelFunc) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if interrupt != nil && len(q.events) > 0 {
		return false
	}
	q.interrupt = interrupt
	return true
}

// post queues an event, unless the engine is closed.
func (s *sandbox) post(event func()) bool { return s.queue.add(event, s.engine.enter) }

// ask queues a request and returns the channel for its answer.
func (s *sandbox) ask(event func(reply func(error))) <-chan error {
	answer := make(chan error, 2) // the answer, and the error of a panic after it
	reply := func(err error) { answer <- err }
	posted := s.post(func() {
		if err := Protect(func() error { event(reply); return nil }); err != nil {
			reply(err)
		}
	})
	if !posted {
		reply(errClosed)
	}
	return answer
}

// await waits for the answer to a request. If ctx ends first, the error says late.
func await(ctx context.Context, answer <-chan error, late string, args ...any) error {
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return fmt.Errorf(late+": %w", append(args, context.Cause(ctx))...)
	}
}

// postLimited queues an event that no caller waits for, once the engine's limiter has a free slot. Requests need no
// slot.
func (s *sandbox) postLimited(event func()) {
	limit := &s.engine.limit
	limit.acquire(func() {
		if !s.post(func() { defer limit.release(); event() }) {
			limit.release()
		}
	})
}
