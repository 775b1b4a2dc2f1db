package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Check has the steps of a ready sandbox look at what they have made: those that are named, or all. What they find wrong changes nothing
// but the sandbox's view, until the step is undone or looks again, and is logged. Any other event of the sandbox ends the look at once. A
// sandbox that isn't ready is not looked at. Check waits until the look has ended, or ctx has.
//
// It fails with NotFound for an unknown sandbox, and otherwise with what ended the look, or what was found.
func (e *Engine) Check(ctx context.Context, key journal.Key, named ...states.Event) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) { reply(s.check(ctx, named)) })
	return await(ctx, done, "the look at sandbox %q was ended", key.ID)
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
	r := s.run(step)
	bounded = log.WithLogger(bounded, s.log(ctx).WithField(tracing.LogStep, declared.Name))
	act := Act{Step: declared.Name, Kind: ActCheck, Started: time.Now()}
	err := Protect(func() error { return checker.Check(bounded, r) })
	if ctx.Err() != nil && err != nil {
		return err // it gave way, and says nothing of the step
	}
	act.Ended, act.Err = time.Now(), err
	if err != nil {
		err = fmt.Errorf("check of step %s of pod %q failed: %w", declared.Name, s.req.Pod, err)
	}
	s.acted(ctx, act, outcomeOf(act.Err))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps[declared.Name].checkErr = err
	return err
}
