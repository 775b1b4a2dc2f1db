package ledger

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// operation is one durable write: a record or a tombstone.
type operation struct {
	key    Key
	put    *stored // the record; nil for a tombstone
	frame  []byte  // of the record or the tombstone
	logged bool    // the log in the state directory has it
	done   chan error
}

// queue holds the operations that wait for the committer.
type queue struct {
	mu      sync.Mutex
	waiting []*operation
	closed  bool
	wake    chan struct{} // has a token if there may be a new operation
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

// close ends the queue. next still returns the waiting operations.
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

// next waits for operations or the timeout, and returns all waiting operations. open is false once
// the queue is closed.
func (q *queue) next(timeout <-chan time.Time) (ops []*operation, open bool) {
	for {
		q.mu.Lock()
		ops, open = q.waiting, !q.closed
		q.waiting = nil
		q.mu.Unlock()
		if len(ops) > 0 || !open {
			return ops, open
		}
		select {
		case <-q.wake:
		case <-timeout:
			return nil, true
		}
	}
}

// submit queues op and waits for its outcome. If ctx ends first, the operation may still be
// written.
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

const (
	// retryFirst and retryMost are the shortest and the longest wait before the next try at a
	// failed tombstone.
	retryFirst = time.Second
	retryMost  = time.Minute
)

// runCommitter commits all queued operations in one transaction after the other, until the queue is
// closed. While one transaction is synced, the next fills up. So concurrent writers share a sync,
// and a single writer doesn't wait for others. The callers of a transaction don't wait for the
// rewrite after it. Only callers that come during the rewrite do.
func (l *Ledger) runCommitter() {
	defer close(l.committerDone)
	backoff := retryFirst
	for open := true; open; {
		var retry <-chan time.Time
		if l.lacksTombstones() {
			retry = time.After(backoff)
		}
		var ops []*operation
		ops, open = l.queue.next(retry)
		failed, unlogged := l.commit(ops)
		outgrown := l.durable.outgrown()
		for _, op := range ops {
			op.done <- op.outcome(failed, unlogged)
		}
		if outgrown {
			l.trimDurable()
		}
		switch {
		case failed == nil:
			backoff = retryFirst
		case l.lacksTombstones():
			backoff = min(2*backoff, retryMost)
			log.L.WithError(failed).WithField("retry_in", backoff).Warn("failed to write to the ledger that sandboxes are forgotten, retrying")
		}
	}
}

// outcome returns the error for the caller of an operation. A tombstone never fails: the committer
// retries it.
func (op *operation) outcome(failed, unlogged error) error {
	switch {
	case op.put == nil:
		return nil
	case failed != nil:
		return failed
	}
	return unlogged
}

// commit writes the durable log first, and then the state directory's: see the package comment. It
// returns the errors of the two.
func (l *Ledger) commit(ops []*operation) (failed, unlogged error) {
	waiting := l.waitingFor(ops)
	ops = slices.Concat(waiting, ops)
	failed = l.writeDurable(ops)

	l.mu.Lock()
	defer l.mu.Unlock()
	if failed == nil {
		l.waitNoMore(waiting)
	}
	ops = slices.DeleteFunc(ops, func(op *operation) bool { return op.logged || op.put != nil && failed != nil })
	var frames []byte
	for _, op := range ops {
		frames = append(frames, op.frame...)
	}
	if len(frames) == 0 {
		return failed, nil
	}
	at, unlogged := l.appendLog(frames)
	// A restart would find these operations in the durable log. Those that this log lacks stay in
	// memory until it is rewritten.
	for _, op := range ops {
		op.logged = unlogged == nil
		switch {
		case op.put == nil:
			l.bury(op, failed != nil)
		case op.logged:
			l.live.add(op.key, op.put.loggedAt(at))
		default:
			l.live.add(op.key, *op.put)
		}
		at += int64(len(op.frame))
	}
	if unlogged == nil {
		l.trimLog()
	}
	return failed, unlogged
}

// bury removes a sandbox from memory. If the durable log lacks the tombstone, the tombstone waits
// for the next transaction. The caller holds mu.
func (l *Ledger) bury(op *operation, lacking bool) {
	_, known := l.live[op.key]
	delete(l.live, op.key)
	l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return w.put != nil && w.key == op.key })
	if known && lacking {
		l.waiting = append(l.waiting, op)
	}
}

// waitingFor returns the waiting tombstones, and the waiting records of the sandboxes in ops.
func (l *Ledger) waitingFor(ops []*operation) []*operation {
	l.mu.Lock()
	defer l.mu.Unlock()
	recorded := map[Key]bool{}
	for _, op := range ops {
		if op.put != nil {
			recorded[op.key] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(l.waiting), func(w *operation) bool { return w.put != nil && !recorded[w.key] })
}

// waitNoMore removes operations from those that wait. The caller holds mu.
func (l *Ledger) waitNoMore(ops []*operation) {
	l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return slices.Contains(ops, w) })
}

// wait adds a durable record to the next transaction of its sandbox, in place of a waiting record
// that it supersedes. The caller holds mu, and adds the record to live afterwards.
func (l *Ledger) wait(k Key, s stored) {
	if old, ok := l.live.superseded(k, s); ok {
		l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return w.put != nil && w.put.seq == old.seq })
	}
	l.waiting = append(l.waiting, &operation{key: k, put: &s, frame: s.frame, logged: true})
}

// tombstones returns the tombstones that the durable log lacks. The caller holds mu.
func (l *Ledger) tombstones() []*operation {
	return slices.DeleteFunc(slices.Clone(l.waiting), func(w *operation) bool { return w.put != nil })
}

func (l *Ledger) lacksTombstones() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.tombstones()) > 0
}

// writeDurable appends operations to the durable log in one transaction. It rewrites an unusable
// log first.
func (l *Ledger) writeDurable(ops []*operation) error {
	if len(ops) == 0 {
		return nil
	}
	if !l.durable.usable() {
		if err := l.rewriteDurable(); err != nil {
			return err
		}
	}
	var frames []byte
	for _, op := range ops {
		frames = append(frames, op.frame...)
	}
	_, err := l.durable.append(frames)
	return err
}

// trimDurable rewrites the durable log, which has outgrown the live records.
func (l *Ledger) trimDurable() {
	if err := l.rewriteDurable(); err != nil {
		l.durable.limit = l.durable.size + logSlack // don't retry after each transaction
		log.L.WithError(err).Warn("failed to rewrite the ledger, going on with the old one")
	}
}

// rewriteDurable replaces the durable log by one with the live records. It includes all waiting
// operations.
func (l *Ledger) rewriteDurable() error {
	l.mu.Lock()
	h, waited := l.header(), slices.Clone(l.waiting)
	l.mu.Unlock()
	records, inLog := l.copyLive()
	frame := func(s stored) ([]byte, error) {
		frame, err := inLog.frame(s)
		if err != nil { // the log was damaged since
			return l.otherFrame(s, waited, err)
		}
		return frame, nil
	}
	if _, _, err := l.durable.rewrite(logged{header: h, live: records.durable(), frame: frame}); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waitNoMore(waited)
	return nil
}

// otherFrame finds a record's frame among the waiting operations or in the durable log. If neither
// has the frame, it returns err.
func (l *Ledger) otherFrame(s stored, waited []*operation, err error) ([]byte, error) {
	for _, w := range waited {
		if w.put != nil && w.put.seq == s.seq {
			return w.frame, nil
		}
	}
	m := newImage(l.durable.path)
	scanLog(m, l.durable.read().bytes)
	for _, r := range m.records {
		if r.seq == s.seq {
			return m.content.frame(r.stored)
		}
	}
	return nil, err
}

var errClosed = fmt.Errorf("the ledger is closed: %w", errdefs.ErrFailedPrecondition)
