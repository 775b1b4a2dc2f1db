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

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// WriteOff is an undo that was given up: whatever it would have taken back stays, and no other step waits for it any more.
type WriteOff struct {
	Step   states.Event
	Part   string // of the step; "" for all of it
	By     Author
	Reason string
	Err    error // of the last try
	At     time.Time
}

// Author says who has written a cleanup off.
type Author string

const (
	ByOperator Author = "operator"
	ByReboot   Author = "reboot" // nobody: the bound of the tries after a reboot
)

// givingUp says which undos are written off if they fail, by whom and why; nil for none.
type givingUp struct {
	by     Author
	reason string
	steps  []states.Event // that an operator gives up: those whose undo had failed by then
	gone   states.Event   // the step of a process that a reboot has ended; "" for none
	kept   []states.Event // those that may still be in use
}

// covers says whether an undo of a step that failed with cause is written off. After a reboot, podfsm gives up only what isn't its own to
// take back. A step that holds others keeps its processes, mounts and snapshots from losing what they use, so nobody gives that up. A process
// is gone after a reboot.
func (g *givingUp) covers(d Declaration, cause error) bool {
	if errors.As(cause, new(InUse)) {
		return false
	}
	return d.Foreign || g.by == ByOperator && (len(d.Holds) == 0 || d.Name == g.gone)
}

// meant says whether a step is among those that are given up. What fails for the first time is pending, and nobody has decided about it.
func (g *givingUp) meant(d Declaration) bool {
	return g.by == ByReboot || slices.Contains(g.steps, d.Name)
}

// explained adds to err which undos the write-off left pending.
func (g *givingUp) explained(err error) error {
	if g == nil || len(g.kept) == 0 {
		return err
	}
	return fmt.Errorf("%w; the undo of %q can't be written off, because processes may still use what it would free", err, g.kept)
}

// Retry tries a pending cleanup now, and returns what is still pending afterwards.
//
// Errors: NotFound for an unknown sandbox, FailedPrecondition for one without a pending cleanup, a *PendingError. When ctx ends first, a
// try that has begun continues, and no other begins.
func (e *Engine) Retry(ctx context.Context, key journal.Key) error {
	return e.withPending(ctx, key, func(s *sandbox) error { return s.tryPending(nil) })
}

// WriteOff gives up a pending cleanup, and goes on towards its goal. With a part, that part alone is written off, without another try.
// Without one, the cleanup is tried once more, and each undo that had failed before and fails again is written off. What is written off
// stays so after a kill and after a reboot. What a process, a mount or a snapshot may use is never freed: the end of a process is never
// written off, nor is the undo of a step that holds others, unless it is [Declaration.Foreign], nor one that fails with [InUse].
//
// Errors: those of [Engine.Retry]; InvalidArgument without a reason; NotFound, naming those that there are, for a part that isn't pending.
func (e *Engine) WriteOff(ctx context.Context, key journal.Key, part, reason string) error {
	if strings.TrimSpace(reason) == "" {
		return fmt.Errorf("a cleanup is written off for a reason: %w", errdefs.ErrInvalidArgument)
	}
	return e.withPending(ctx, key, func(s *sandbox) error {
		if part == "" {
			giving := &givingUp{by: ByOperator, reason: reason, steps: s.failedUndos()}
			if s.dossier.outside.Rebooted {
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

// PendingError says that a cleanup was tried, and is still pending because of Err.
type PendingError struct{ Err error }

func (e *PendingError) Error() string { return e.Err.Error() }

func (e *PendingError) Unwrap() error { return e.Err }

// tryPending tries the pending cleanup, and writes off what an operator gives up; nil for nothing.
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

// withPending handles a request for a sandbox that has a pending cleanup. Unlike a stop, it doesn't end a creation that is under way, and
// isn't begun once its caller has gone.
func (e *Engine) withPending(ctx context.Context, key journal.Key, f func(*sandbox) error) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	var taken atomic.Bool // by the queue, or by a caller that gives up
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

// pending is as [View.Pending] for what handles the queue: no try is under way. What a restart has interrupted is taken up by itself.
func (s *sandbox) pending() bool {
	return s.state() == states.CleanupOwed || s.state() == states.Quarantined && len(s.owed()) > 0
}

// owed are the steps whose undo is owed, in the order in which they are undone.
func (s *sandbox) owed() []states.Event {
	order := slices.DeleteFunc(s.order(), func(name states.Event) bool { return s.steps[name].status != StepOwed })
	slices.Reverse(order)
	return order
}

// failedUndos are the steps whose undo was tried, and has failed.
func (s *sandbox) failedUndos() []states.Event {
	return slices.DeleteFunc(s.owed(), func(name states.Event) bool { return !s.steps[name].failedToUndo() })
}

// writeOffPart has the step that has such a part note that the part is written off.
func (s *sandbox) writeOffPart(ctx context.Context, part, reason string) error {
	for _, name := range s.owed() {
		step, ok := s.stepNamed(name).(Parted)
		if !ok {
			continue
		}
		r := s.run(step)
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
	return fmt.Errorf("no step of sandbox %q is pending that has a part %q: %w", s.key.ID, part, errdefs.ErrNotFound)
}

// giveUp writes a step off whose undo has failed, if that is what is to become of it; else the undo is owed. So is one whose write-off
// isn't on record: after a restart it would be tried again.
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
	record := &journal.Record{Kind: journal.Undone, Step: string(d.Name), Durable: true, At: w.At, WrittenOff: w.Reason, Error: cause.Error()}
	if err := s.append(ctx, record, nil); err != nil {
		s.aside(func() { s.log(ctx).WithError(err).Error("sandbox: failed to write off a cleanup, will retry") })
		return false
	}
	s.mu.Lock()
	s.steps[d.Name].status = StepUndone
	s.acts.writeOff(d.Name, w.At, cause, w.Reason)
	s.mu.Unlock()
	s.wroteOff(ctx, w)
	return true
}

// wroteOff tells of a write-off that is on record.
func (s *sandbox) wroteOff(ctx context.Context, w WriteOff) {
	s.aside(func() {
		entry := s.log(ctx).WithError(w.Err).WithFields(log.Fields{tracing.LogStep: w.Step, tracing.LogReason: w.Reason})
		if w.Part != "" {
			entry = entry.WithField(tracing.LogPlugin, w.Part)
		}
		entry.Warn("sandbox: cleanup written off")
	})
	s.aside(func() { s.engine.writtenOff(s.view(), w) })
}

const (
	// retriedFor, retriedTimes and retriedHere bound the tries at what a reboot has left: an agent that a CNI plugin talks to, a pod
	// itself, needs some minutes to be there again. The tries and retriedHere are of this process: a restart may have kept it away, too.
	retriedFor   = time.Hour
	retriedTimes = 10
	retriedHere  = 10 * time.Minute
)

// lastTry says that the try under way is the last one at the undo of a step, after a reboot; nil if it isn't. Whoever makes it counts: the
// kubelet may try so often that the timer never comes. Restarts don't put it off.
func (s *sandbox) lastTry(rec *stepRecord) *givingUp {
	if !s.dossier.outside.Rebooted || s.failing.IsZero() || s.attempts < retriedTimes || time.Since(s.failing) < retriedHere {
		return nil
	}
	if rec.owedSince.IsZero() || min(time.Since(rec.owedSince), s.engine.uptime()) < retriedFor {
		return nil
	}
	return &givingUp{by: ByReboot, reason: fmt.Sprintf("the node was rebooted, and the cleanup failed for more than %s", retriedFor)}
}

// uptime is how long ago the kernel was booted, suspended time included; 0 if that is unknown.
func uptime() time.Duration {
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
		return 0
	}
	return time.Duration(since.Nano())
}
