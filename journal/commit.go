package journal

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
)

// operation is one durable write: a record, or the end of a sandbox.
type operation struct {
	key        Key
	put        *stored  // nil: forget the sandbox
	superseded [][]byte // ledger.db's keys of the records that put replaces
	frame      []byte   // the record or the tombstone
	done       chan error
}

// queue holds the operations that wait for the committer.
type queue struct {
	mu      sync.Mutex
	waiting []*operation
	closed  bool
	wake    chan struct{} // holds one token while there may be something new
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

func (q *queue) put(op *operation) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errClosed
	}
	q.waiting = append(q.waiting, op)
	q.signal()
	return nil
}

// close lets next hand out what waits and then end.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.signal()
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// next blocks until there is something and returns all of it; nothing means that the queue is closed and empty.
func (q *queue) next() []*operation {
	for {
		q.mu.Lock()
		ops, closed := q.waiting, q.closed
		q.waiting = nil
		q.mu.Unlock()
		if len(ops) > 0 || closed {
			return ops
		}
		<-q.wake
	}
}

// submit queues op and waits for its outcome. When ctx ends first the operation may still be carried out.
func (l *Ledger) submit(ctx context.Context, op *operation) error {
	op.done = make(chan error, 1)
	if err := l.queue.put(op); err != nil {
		return err
	}
	select {
	case err := <-op.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("stopped waiting for the disk, the write may still happen: %w", ctx.Err())
	}
}

// runCommitter commits everything that is queued in one transaction after the other, until the queue is closed. While one
// is fsynced the next fills up, so concurrent writers share an fsync and a lone one waits for nobody.
func (l *Ledger) runCommitter() {
	defer close(l.committerDone)
	for ops := l.queue.next(); len(ops) > 0; ops = l.queue.next() {
		committed, logged := l.commit(ops)
		for _, op := range ops {
			err := committed
			if err == nil && op.put != nil {
				err = logged // what ledger.db has no more is forgotten all the same
			}
			op.done <- err
		}
	}
}

// commit writes ledger.db first and the log second: see the package comment. What has waited for it is in the log already. It returns
// the errors of the two.
func (l *Ledger) commit(ops []*operation) (committed, logged error) {
	waiting := l.prepare(ops)
	err := l.durable.commit(l.header(), slices.Concat(waiting, ops))

	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.waiting = slices.Concat(waiting, l.waiting)
		return err, nil
	}
	var frames []byte
	for _, op := range ops {
		frames = append(frames, op.frame...)
	}
	at, err := l.log.append(frames)
	// A restart would find the operations, whatever became of the log. What that lacks stays in memory until it is rewritten.
	for _, op := range ops {
		switch {
		case op.put == nil:
			delete(l.live, op.key)
			l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return w.key == op.key })
		case err != nil:
			l.live.add(op.key, *op.put)
		default:
			l.live.add(op.key, op.put.loggedAt(at))
		}
		at += int64(len(op.frame))
	}
	if err != nil {
		return nil, err
	}
	l.trimLog()
	return nil, nil
}

// prepare finds what the operations supersede, and takes what has waited for a record of the same sandbox. It does not see that one
// operation supersedes another of the same batch. Such a record stays until the next one.
func (l *Ledger) prepare(ops []*operation) (waiting []*operation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	recorded := map[Key]bool{}
	for _, op := range ops {
		if op.put == nil {
			continue
		}
		recorded[op.key] = true
		if old, ok := l.live.superseded(op.key, *op.put); ok {
			op.superseded = append(op.superseded, recordKey(op.key, old.seq))
		}
	}
	l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool {
		if recorded[w.key] {
			waiting = append(waiting, w)
		}
		return recorded[w.key]
	})
	return waiting
}

// wait has a durable record go into the next transaction of its sandbox. What it supersedes need not go there any more. The caller
// holds mu, and files the record in live afterwards.
func (l *Ledger) wait(k Key, s stored) {
	op := &operation{key: k, put: &s, frame: s.frame}
	if old, ok := l.live.superseded(k, s); ok {
		op.superseded = [][]byte{recordKey(k, old.seq)}
		if at := slices.IndexFunc(l.waiting, func(w *operation) bool { return w.put.seq == old.seq }); at >= 0 {
			op.superseded = l.waiting[at].superseded
			l.waiting = slices.Delete(l.waiting, at, at+1)
		}
	}
	l.waiting = append(l.waiting, op)
}

var errClosed = fmt.Errorf("the ledger is closed: %w", errdefs.ErrFailedPrecondition)
