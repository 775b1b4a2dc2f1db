package lifecycle

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Demand does a step on demand (Declaration.OnDemand) for a ready sandbox, and waits until the step is done. A failure leaves the sandbox
// ready: the failure is the caller's alone. What a failed step may have half done is undone at once, and at the stop of the sandbox if
// that undo fails, too. A step that is done already is done once more, and then a failure undoes nothing: what stands may be in use.
//
// Errors: NotFound for an unknown sandbox, FailedPrecondition for one that isn't ready, a *StepError. When ctx ends first, the request
// continues after its caller's deadline.
func (e *Engine) Demand(ctx context.Context, key journal.Key, name states.Event) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) { reply(s.demand(context.WithoutCancel(ctx), name)) })
	return await(ctx, done, "step %s of sandbox %q continues after its caller's deadline", name, key.ID)
}

func (s *sandbox) demand(ctx context.Context, name states.Event) error {
	if state := s.state(); state != states.Ready {
		return fmt.Errorf("step %s needs sandbox %q to be %s, but it is %s: %w", name, s.key.ID, states.Ready, state, errdefs.ErrFailedPrecondition)
	}
	if declared, ok := s.engine.table.Step(name); !ok || !declared.OnDemand {
		return fmt.Errorf("there is no step %q on demand: %w", name, errdefs.ErrInvalidArgument)
	}
	if s.steps[name].unknown != "" {
		return &StepError{Step: name, Pod: s.req.Pod, Err: s.unknownTo(name)}
	}
	step, _ := s.engine.step(name)
	if status := s.steps[name].status; status == StepDone || status == StepSkipped {
		return s.doAgain(ctx, step)
	}
	return s.doNow(ctx, step)
}

// doNow does a step inside the queue, and undoes it at once if it fails.
func (s *sandbox) doNow(ctx context.Context, step Step) error {
	name := step.Declaration().Name
	s.setRunning(step)
	out := s.execute(ctx, step)
	if out.err == nil {
		out.err = s.conclude(step, &out)
	}
	s.keepResult(step, out, false)
	if out.err == nil {
		return nil
	}
	if out.touched {
		if err := s.undo(ctx, step); err != nil {
			s.record(ctx, failedUndo(name, err), nil)
			s.setStatus(name, StepFailed) // the stop of the sandbox tries again
		}
	}
	return &StepError{Step: name, Pod: s.req.Pod, Err: out.err}
}

// doAgain has a step that is done look after what it made. The ledger says already that there is something to undo.
func (s *sandbox) doAgain(ctx context.Context, step Step) error {
	declared := step.Declaration()
	ctx, cancel := within(ctx, declared.Deadline)
	defer cancel()
	ctx, span := tracing.Start(ctx, tracing.Step(string(declared.Name)), s.req.Attributes...)
	ctx = log.WithLogger(ctx, s.log(ctx).WithField(tracing.LogStep, declared.Name))
	act := Act{Step: declared.Name, Kind: ActDo, Started: time.Now()}
	s.setActing(act.Step, act.Kind, act.Started)
	err := Protect(func() error {
		_, err := step.Do(ctx, s.run(step))
		return err
	})
	if err != nil {
		err = late(ctx, err)
	}
	s.aside(func() { tracing.End(span, err) })
	act.Ended, act.Err = time.Now(), err
	s.setActing(act.Step, "", time.Time{})
	s.acted(ctx, act, outcomeOf(err))
	if err != nil {
		return &StepError{Step: declared.Name, Pod: s.req.Pod, Err: err}
	}
	return nil
}

func (s *sandbox) setActing(name states.Event, kind ActKind, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].acting, s.steps[name].actingSince = kind, since
}
