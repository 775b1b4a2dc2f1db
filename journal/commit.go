package journal

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// operation is one durable write: a record, or the end of a sandbox.
type operation struct {
	key    Key
	put    *stored // nil: forget the sandbox
	frame  []byte  // the record or the tombstone
	logged bool    // the log in the state directory has it
	done   chan error
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

// next blocks until there is something, or the time has come, and returns all that there is. It says whether more can come.
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

const (
	// retryFirst is how long a tombstone that the disk didn't take waits for the next try, retryMost how long after many.
	retryFirst = time.Second
	retryMost  = time.Minute
)

// runCommitter commits everything that is queued in one transaction after the other, until the queue is closed. While one
// is synced the next fills up, so concurrent writers share a sync and a lone one waits for nobody. Nobody waits for a rewrite
// either, but those who come while it is under way.
func (l *Ledger) runCommitter() {
	defer close(l.committerDone)
	backoff := retryFirst
	for open := true; open; {
		var retry <-chan time.Time
		if l.owesTombstones() {
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
		case l.owesTombstones():
			backoff = min(2*backoff, retryMost)
			log.L.WithError(failed).WithField("retry_in", backoff).Warn("failed to write to the ledger that sandboxes are forgotten, retrying")
		}
	}
}

// outcome is what the caller is told. A sandbox is forgotten whatever became of the logs: a tombstone that they lack follows.
func (op *operation) outcome(failed, unlogged error) error {
	switch {
	case op.put == nil:
		return nil
	case failed != nil:
		return failed
	}
	return unlogged
}

// commit writes the durable log first and the other one second: see the package comment. It returns the errors of the two.
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
	// A restart would find the operations, whatever became of this log. What that lacks stays in memory until it is rewritten.
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

// bury removes a sandbox from memory. If the durable log lacks the tombstone, that waits for the next transaction. The caller holds mu.
func (l *Ledger) bury(op *operation, lacking bool) {
	_, known := l.live[op.key]
	delete(l.live, op.key)
	l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return w.put != nil && w.key == op.key })
	if known && lacking {
		l.waiting = append(l.waiting, op)
	}
}

// waitingFor are the tombstones that wait, and what waits for a record of the same sandbox.
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

// waitNoMore takes operations off those that wait. The caller holds mu.
func (l *Ledger) waitNoMore(ops []*operation) {
	l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return slices.Contains(ops, w) })
}

// wait has a durable record go into the next transaction of its sandbox. What it supersedes need not go there any more. The caller
// holds mu, and files the record in live afterwards.
func (l *Ledger) wait(k Key, s stored) {
	if old, ok := l.live.superseded(k, s); ok {
		l.waiting = slices.DeleteFunc(l.waiting, func(w *operation) bool { return w.put != nil && w.put.seq == old.seq })
	}
	l.waiting = append(l.waiting, &operation{key: k, put: &s, frame: s.frame, logged: true})
}

// tombstones are those that the durable log lacks. The caller holds mu.
func (l *Ledger) tombstones() []*operation {
	return slices.DeleteFunc(slices.Clone(l.waiting), func(w *operation) bool { return w.put != nil })
}

func (l *Ledger) owesTombstones() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.tombstones()) > 0
}

// writeDurable appends operations to the durable log, in one transaction. A log that can't be trusted is rewritten before.
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

// trimDurable rewrites the durable log once it has outgrown what is live.
func (l *Ledger) trimDurable() {
	if err := l.rewriteDurable(); err != nil {
		l.durable.limit = l.durable.size + logSlack // do not try after each transaction
		log.L.WithError(err).Warn("failed to rewrite the ledger, going on with the old one")
	}
}

// rewriteDurable replaces the durable log by one of what is live. Nothing has to wait any more then.
func (l *Ledger) rewriteDurable() error {
	l.mu.Lock()
	h, waited := l.header(), slices.Clone(l.waiting)
	l.mu.Unlock()
	records, inLog := l.copyLive()
	frame := func(s stored) ([]byte, error) {
		frame, err := inLog.frame(s)
		if err != nil { // it was damaged meanwhile
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

// otherFrame looks for a record's frame elsewhere than in the log of the state directory: in what waits, and in the durable log. Failing
// that, it returns err.
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
