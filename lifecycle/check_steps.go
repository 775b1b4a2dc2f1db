package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Check has the steps of a ready sandbox check what they made: the named steps, or all. A check that fails is logged and
// shown in the sandbox's view until the step is undone or checked again. It changes nothing else. Any other event of the
// sandbox ends the check at once. Check does nothing for a sandbox that isn't ready.
//
// It fails with NotFound for an unknown sandbox, with the cause if the check was ended early, and with what the checks
// found.
func (e *Engine) Check(ctx context.Context, key ledger.Key, named ...states.Event) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) { reply(s.check(ctx, named)) })
	return await(ctx, done, "check of sandbox %q was interrupted", key.ID)
}

func (s *sandbox) check(ctx context.Context, named []states.Event) (err error) {
	if s.state() != states.Ready {
		return nil
	}
	s.queue.interruptibly(ctx, func(ctx context.Context) {
		ctx, span := tracing.StartLinked(ctx, tracing.SpanCheck, s.traceParent, s.req.Attributes...)
		defer func() { tracing.End(span, err) }()
		var errs []error
		for _, step := range s.engine.steps {
			name := step.Declaration().Name
			if len(named) > 0 && !slices.Contains(named, name) {
				continue
			}
			rec := s.steps[name]
			if checker, ok := step.(Checker); ok && rec.status == StepDone && rec.unknown == "" {
				errs = append(errs, s.checkStep(ctx, step, checker))
			}
		}
		err = errors.Join(errs...)
	})
	return err
}

func (s *sandbox) checkStep(ctx context.Context, step Step, checker Checker) error {
	declared := step.Declaration()
	bounded, cancel := context.WithTimeout(ctx, declared.Deadline)
	defer cancel()
	r := s.newRun(step)
	bounded = log.WithLogger(bounded, s.log(ctx).WithField(tracing.LogStep, declared.Name))
	try := Try{Step: declared.Name, Operation: OperationCheck, Started: time.Now()}
	err := Protect(func() error { return checker.Check(bounded, r) })
	if ctx.Err() != nil && err != nil {
		return err // another event interrupted the check: the error says nothing about the step
	}
	try.Ended, try.Err = time.Now(), err
	if err != nil {
		err = fmt.Errorf("check of step %s of pod %q failed: %w", declared.Name, s.req.Pod, err)
	}
	s.tried(ctx, try, outcomeOf(try.Err))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[declared.Name].checkErr = err
	return err
}
