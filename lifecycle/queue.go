package lifecycle

import (
	"context"
	"fmt"
	"sync"
)

// queue holds the events of one sandbox and handles them one at a time. With no event, it costs no goroutine.
type queue struct {
	handle func(event func()) // handles one event; it must not panic
	left   func()             // is called when the goroutine that handles events ends

	mu        sync.Mutex
	events    []func()
	handling  bool
	interrupt context.CancelFunc // ends the event that is handled, as soon as another waits; nil for one that must not be
}

// add queues an event. The first event in an empty queue starts the goroutine that handles it, and all that come meanwhile. enter counts
// that goroutine in; when it refuses, so does add.
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

// next takes the first event. Without one, it is nil, and the goroutine has to end.
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

// giveWay ends the event that is handled, if it is one that gives way.
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

// interruptibly does work, in the queue, that gives way to every other event: its context ends when one comes, or when the engine closes.
func (q *queue) interruptibly(ctx context.Context, work func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !q.interruptBy(cancel) {
		return
	}
	defer q.interruptBy(nil)
	work(ctx)
}

// interruptBy says how the event that is handled is ended; nil for one that is not ended. Where another waits already, it isn't begun.
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

// ask queues a request and returns where its answer will come.
func (s *sandbox) ask(event func(reply func(error))) <-chan error {
	answer := make(chan error, 2) // an answer, and a panic after it
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

// await is the answer to a request, or an error that says late when ctx ends first.
func await(ctx context.Context, answer <-chan error, late string, args ...any) error {
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return fmt.Errorf(late+": %w", append(args, context.Cause(ctx))...)
	}
}

// inTurn queues an event that nobody waits for when it is the sandbox's turn. Requests don't wait for a turn.
func (s *sandbox) inTurn(event func()) {
	turns := &s.engine.turns
	turns.take(func() {
		if !s.post(func() { defer turns.give(); event() }) {
			turns.give()
		}
	})
}
