package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// WriteOff is an undo that was given up. What it would have removed stays, and no other undo waits
// for it any more.
type WriteOff struct {
	Step   states.Event
	Part   string // of the step; "" for the whole step
	By     Author
	Reason string
	Err    error // of the last try
	At     time.Time
}

// Author is the author of a write-off.
type Author string

const (
	ByOperator Author = "operator"
	ByReboot   Author = "reboot" // podfsm, at the limit of retries after a reboot
)

// givingUp says which undos are written off if they fail.
type givingUp struct {
	by     Author
	reason string
	steps  []states.Event // those that an operator gives up: their undo had failed before
	gone   states.Event   // the step of the process, if a reboot has ended it; "" for none
	kept   []states.Event // those that can't be written off; filled during the try
}

// covers says whether a step's undo that failed with cause may be written off. podfsm itself gives
// up only Foreign undos. An operator may also give up a step that holds no other: the resources of
// a held step may be in use. Once a reboot has ended the process, the process's step holds nothing.
func (g *givingUp) covers(d Declaration, cause error) bool {
	if errors.As(cause, new(InUse)) {
		return false
	}
	return d.Foreign || g.by == ByOperator && (len(d.Holds) == 0 || d.Name == g.gone)
}

// meant says whether a step is to be given up. An operator has not decided about an undo that fails
// for the first time, so that is pending.
func (g *givingUp) meant(d Declaration) bool {
	return g.by == ByReboot || slices.Contains(g.steps, d.Name)
}

// explained adds to err the undos that can't be written off.
func (g *givingUp) explained(err error) error {
	if g == nil || len(g.kept) == 0 {
		return err
	}
	return fmt.Errorf("%w; the undo of %q can't be written off, because processes may still use what it would free", err, g.kept)
}

// Retry tries a pending cleanup now, and returns what is still pending afterwards.
//
// Errors: NotFound for an unknown sandbox, FailedPrecondition for a sandbox without a pending
// cleanup, a *PendingError. If ctx ends first, a try that has begun continues, and no other begins.
func (e *Engine) Retry(ctx context.Context, key ledger.Key) error {
	return e.withPending(ctx, key, func(s *sandbox) error { return s.tryPending(nil) })
}

// WriteOff gives up a pending cleanup, and goes on towards its goal. With a part, it writes off
// that part alone, without another try. Without a part, it tries the cleanup once more. Each undo
// that had failed before and fails again is then written off. A write-off is on record, and
// outlives a kill and a reboot.
//
// WriteOff never frees what a process, a mount or a snapshot may use. It doesn't write off the end
// of a process, an undo that fails with [InUse], or the undo of a step that holds others, unless it
// is [Declaration.Foreign].
//
// Errors: those of [Engine.Retry]; InvalidArgument without a reason; NotFound for a part that isn't
// pending, with a list of the pending parts.
func (e *Engine) WriteOff(ctx context.Context, key ledger.Key, part, reason string) error {
	if strings.TrimSpace(reason) == "" {
		return fmt.Errorf("failed to write off the cleanup of sandbox %q: the reason is empty: %w", key.ID, errdefs.ErrInvalidArgument)
	}
	return e.withPending(ctx, key, func(s *sandbox) error {
		if part == "" {
			giving := &givingUp{by: ByOperator, reason: reason, steps: s.failedUndos()}
			if s.findings.outside.Rebooted {
				giving.gone = e.process.Declaration().Name
			}
			return s.tryPending(giving)
		}
		if err := s.writeOffPart(s.background(), part, reason); err != nil {
			return err
		}
		return s.tryPending(nil)
	})
}

// PendingError says that a cleanup was tried and is still pending because of Err.
type PendingError struct{ Err error }

func (e *PendingError) Error() string { return e.Err.Error() }

func (e *PendingError) Unwrap() error { return e.Err }

// tryPending tries the pending cleanup, and writes off what giving says.
func (s *sandbox) tryPending(giving *givingUp) error {
	err := s.retryPending(giving)
	if err == nil && s.pending() {
		err = fmt.Errorf("a part of the cleanup of sandbox %q waits for its removal; remove the pod: %w", s.key.ID, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		return nil
	}
	return &PendingError{giving.explained(err)}
}

// withPending handles a request for a sandbox with a pending cleanup. Unlike a stop, it doesn't end
// a creation that is under way. If ctx ends before the queue comes to the request, the request
// isn't begun.
func (e *Engine) withPending(ctx context.Context, key ledger.Key, f func(*sandbox) error) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	var taken atomic.Bool // the queue has begun the request, or the caller has gone
	done := s.ask(func(reply func(error)) {
		if taken.Swap(true) {
			return
		}
		if !s.pending() {
			reply(fmt.Errorf("sandbox %q is %s and has no pending cleanup: %w", key.ID, s.state(), errdefs.ErrFailedPrecondition))
			return
		}
		reply(f(s))
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		if taken.Swap(true) {
			return fmt.Errorf("request for sandbox %q continues after its caller's deadline: %w", key.ID, context.Cause(ctx))
		}
		return fmt.Errorf("sandbox %q is busy, the request was not begun: %w", key.ID, context.Cause(ctx))
	}
}

// pending is [View.Pending] for the queue, where no try is under way. Recovery resumes a try that a
// restart interrupted.
func (s *sandbox) pending() bool {
	return s.state() == states.CleanupOwed || s.state() == states.Quarantined && len(s.pendingSteps()) > 0
}

// pendingSteps returns the steps whose undo is pending, in the order of their undos.
func (s *sandbox) pendingSteps() []states.Event {
	order := slices.DeleteFunc(s.order(), func(name states.Event) bool { return s.steps[name].status != StepCleanupPending })
	slices.Reverse(order)
	return order
}

// failedUndos returns the steps whose undo was tried and failed.
func (s *sandbox) failedUndos() []states.Event {
	return slices.DeleteFunc(s.pendingSteps(), func(name states.Event) bool { return !s.steps[name].failedToUndo() })
}

// writeOffPart finds the pending step that has parts, and has it write the part off.
func (s *sandbox) writeOffPart(ctx context.Context, part, reason string) error {
	for _, name := range s.pendingSteps() {
		step, ok := s.stepNamed(name).(Parted)
		if !ok {
			continue
		}
		r := s.newRun(step)
		parts, err := step.WriteOff(ctx, r, part, reason)
		s.mu.Lock()
		s.steps[name].notes = r.Notes()
		cause := s.steps[name].undoErr
		s.mu.Unlock()
		for _, written := range parts {
			s.wroteOff(ctx, WriteOff{Step: name, Part: written, By: ByOperator, Reason: reason, Err: cause, At: time.Now()})
		}
		return err
	}
	return fmt.Errorf("no pending step of sandbox %q has a part %q: %w", s.key.ID, part, errdefs.ErrNotFound)
}

// giveUp writes off a step whose undo has failed, if s.givingUp or lastTry says so. It returns
// false if the undo is pending. If the write-off can't be recorded, the undo is pending, because a
// restart would retry it.
func (s *sandbox) giveUp(ctx context.Context, d Declaration, cause error) bool {
	giving := cmp.Or(s.givingUp, s.lastTry(s.steps[d.Name]))
	if giving == nil || !giving.meant(d) {
		return false
	}
	if !giving.covers(d, cause) {
		giving.kept = append(giving.kept, d.Name)
		return false
	}
	w := WriteOff{Step: d.Name, By: giving.by, Reason: giving.reason, Err: cause, At: time.Now()}
	record := &ledger.Record{Kind: ledger.Undone, Step: string(d.Name), Durable: true, At: w.At, WrittenOff: w.Reason, Error: cause.Error()}
	if err := s.append(ctx, record, nil); err != nil {
		s.logPanics(func() { s.log(ctx).WithError(err).Error("failed to write off cleanup, will retry") })
		return false
	}
	s.mu.Lock()
	s.steps[d.Name].status = StepUndone
	s.tries.writeOff(d.Name, w.At, cause, w.Reason)
	s.mu.Unlock()
	s.wroteOff(ctx, w)
	return true
}

// wroteOff logs and reports a write-off that is on record.
func (s *sandbox) wroteOff(ctx context.Context, w WriteOff) {
	s.logPanics(func() {
		entry := s.log(ctx).WithError(w.Err).WithFields(log.Fields{tracing.LogStep: w.Step, tracing.LogReason: w.Reason})
		if w.Part != "" {
			entry = entry.WithField(tracing.LogPlugin, w.Part)
		}
		entry.Warn("cleanup written off")
	})
	s.logPanics(func() { s.engine.writtenOff(s.view(), w) })
}

const (
	// retriedFor, retriedTimes and retriedHere are the least that a cleanup is retried after a
	// reboot. The agent of a CNI plugin, which is often a pod itself, needs some minutes to start.
	// retriedTimes and retriedHere count in this process alone, because the agent may also have
	// been down during a restart.
	retriedFor   = time.Hour
	retriedTimes = 10
	retriedHere  = 10 * time.Minute
)

// lastTry returns a write-off if the failed try at a step's undo was the last one after a reboot;
// otherwise nil. The tries of all callers count, because the kubelet may retry so often that the
// timer never fires. Restarts don't postpone the last try.
func (s *sandbox) lastTry(rec *stepState) *givingUp {
	if !s.findings.outside.Rebooted || s.failing.IsZero() || s.failedTries < retriedTimes || time.Since(s.failing) < retriedHere {
		return nil
	}
	if rec.pendingSince.IsZero() || min(time.Since(rec.pendingSince), s.engine.uptime()) < retriedFor {
		return nil
	}
	return &givingUp{by: ByReboot, reason: fmt.Sprintf("the node was rebooted, and the cleanup failed for more than %s", retriedFor)}
}

// uptime returns the time since the kernel booted, including suspended time; 0 if it is unknown.
func uptime() time.Duration {
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
		return 0
	}
	return time.Duration(since.Nano())
}
