package lifecycle

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
)

// Demand does a step on demand (Facts.OnDemand) for a ready sandbox, and waits until it is done. A failure is undone at once, and leaves
// the sandbox ready: it is the caller's alone.
//
// Errors: NotFound for an unknown sandbox, FailedPrecondition for one that isn't ready, a *StepError. When ctx ends first, the request
// continues after its caller's deadline.
func (e *Engine) Demand(ctx context.Context, key journal.Key, name states.Event) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) { reply(s.demand(context.WithoutCancel(ctx), name)) })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("step %s of sandbox %q continues after its caller's deadline: %w", name, key.ID, context.Cause(ctx))
	}
}

func (s *sandbox) demand(ctx context.Context, name states.Event) error {
	if state := s.state(); state != states.Ready {
		return fmt.Errorf("sandbox %q is %s, a container needs one that is %s: %w", s.key.ID, state, states.Ready, errdefs.ErrFailedPrecondition)
	}
	for _, step := range s.engine.steps {
		if facts := step.Facts(); facts.Name == name && facts.OnDemand {
			return s.doNow(ctx, step)
		}
	}
	return fmt.Errorf("there is no step %q on demand: %w", name, errdefs.ErrInvalidArgument)
}

func (s *sandbox) doNow(ctx context.Context, step Step) error {
	s.setRunning(step)
	out := s.execute(ctx, step)
	s.keepOutcome(ctx, step, out, false)
	if out.err == nil {
		return nil
	}
	failed := &StepError{Step: step.Facts().Name, Pod: s.req.Pod, Err: out.err}
	if out.touched {
		if err := s.undo(ctx, step); err != nil { // the stop of the sandbox tries again
			s.log(ctx).WithError(err).Warn("sandbox: a step on demand failed, and so did its undo; the stop of the sandbox tries again")
		}
	}
	return failed
}
