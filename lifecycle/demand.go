package lifecycle

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Demand does a step on demand (Declaration.OnDemand) for a ready sandbox, and waits until the step is done. A failure
// leaves the sandbox ready. A failed step is undone at once. If that undo fails as well, the stop of the sandbox retries
// it. A step that is done already is done once more. A failure then undoes nothing, because the step's result may be in
// use.
//
// Errors: NotFound for an unknown sandbox, FailedPrecondition for a sandbox that isn't ready, a *StepError. If ctx ends
// first, the request continues.
func (e *Engine) Demand(ctx context.Context, key ledger.Key, name states.Event) error {
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
		return fmt.Errorf("unknown step on demand %q: %w", name, errdefs.ErrInvalidArgument)
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
		if err := s.undoStep(ctx, step); err != nil {
			s.appendOrLog(ctx, failedUndo(name, err), nil)
			s.setStatus(name, StepFailed) // the stop of the sandbox retries the undo
		}
	}
	return &StepError{Step: name, Pod: s.req.Pod, Err: out.err}
}

// doAgain repeats a step that is done already. It records nothing, because the ledger has the
// step's intent.
func (s *sandbox) doAgain(ctx context.Context, step Step) error {
	declared := step.Declaration()
	ctx, cancel := within(ctx, declared.Deadline)
	defer cancel()
	ctx, span := tracing.Start(ctx, tracing.Step(string(declared.Name)), s.req.Attributes...)
	ctx = log.WithLogger(ctx, s.log(ctx).WithField(tracing.LogStep, declared.Name))
	try := Try{Step: declared.Name, Operation: OperationDo, Started: time.Now()}
	s.setUnderWay(try.Step, try.Operation, try.Started)
	err := Protect(func() error {
		_, err := step.Do(ctx, s.newRun(step))
		return err
	})
	if err != nil {
		err = late(ctx, err)
	}
	s.logPanics(func() { tracing.End(span, err) })
	try.Ended, try.Err = time.Now(), err
	s.setUnderWay(try.Step, "", time.Time{})
	s.tried(ctx, try, outcomeOf(err))
	if err != nil {
		return &StepError{Step: declared.Name, Pod: s.req.Pod, Err: err}
	}
	return nil
}

func (s *sandbox) setUnderWay(name states.Event, operation Operation, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[name].operation, s.steps[name].operationSince = operation, since
}
