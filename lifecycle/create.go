package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"go.opentelemetry.io/otel/trace"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// This file has the creation path. Read it in this order, which is that of the functions below:
//
//	goroutine      function        what it does
//	of the caller  Engine.Start    queues start, and waits for the answer
//	of the queue   start           begins a creation
//	               proceed         takes the next step; after the last step or a failure: finishCreation
//	               launch          marks the step as running, and starts a goroutine for it
//	of the step    execute, do      Reserve, the record of the intent, Do; queues stepEnded with the result
//	of the queue   stepEnded       takes the result, and calls proceed again
//	               takeResult      calls the three below
//	                 conclude      writes the record that the step is done, with the transition
//	                 keepResult    keeps the result in memory, ends the span, tells the meter
//	                 fire          moves the state, and tells the observer
//	               finishCreation  answers the caller; before that, rolls a failed creation back
//
// A step on demand uses execute, conclude and keepResult, too, see [Engine.Demand].

// creation is one run of the creation path. It belongs to the queue's goroutine.
type creation struct {
	ctx    context.Context
	cancel context.CancelFunc
	reply  func(error)
	err    error    // the first reason of its failure
	then   []func() // requests that wait for its end
}

// fail ends the creation once the running step has returned.
func (c *creation) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	c.cancel()
}

// start handles the request to run the creation path.
func (s *sandbox) start(ctx context.Context, reply func(error)) {
	if s.state() != states.New || s.creation != nil || s.restored {
		reply(fmt.Errorf("sandbox %q is %s and can't be started again: %w", s.key.ID, s.state(), errdefs.ErrFailedPrecondition))
		return
	}
	runCtx, cancel := context.WithCancel(ctx)
	s.creation = &creation{ctx: runCtx, cancel: cancel, reply: reply}
	s.proceed()
}

// proceed launches the next step of the path. After the last step or a failure, it ends the
// creation.
func (s *sandbox) proceed() {
	if s.creation.err == nil {
		for _, step := range s.engine.steps {
			if step.Declaration().OnDemand {
				continue
			}
			if s.steps[step.Declaration().Name].status == StepPending {
				s.launch(step)
				return
			}
		}
	}
	s.finishCreation()
}

// launch runs step in a goroutine of its own, so that the queue handles other events meanwhile. The
// result comes back as an event.
func (s *sandbox) launch(step Step) {
	s.setRunning(step)
	ctx := s.creation.ctx
	s.engine.work.Add(1) // never races with Wait: the queue that is being handled is counted in
	go func() {
		defer s.engine.work.Done()
		out := s.execute(ctx, step)
		s.queue.add(func() { s.stepEnded(step, out) }, s.engine.stay)
	}()
}

func (s *sandbox) setRunning(step Step) {
	name := step.Declaration().Name
	s.mu.Lock()
	defer s.mu.Unlock()
	rec := s.steps[name]
	s.begin(name)
	rec.status, rec.started, rec.ended, rec.err, rec.interrupted = StepRunning, time.Now(), time.Time{}, nil, false
	rec.release = s.engine.release
	rec.operation, rec.operationSince = OperationDo, rec.started
	s.tries.begin(name, OperationDo, rec.started)
}

// stepResult is the result of a step's Do.
type stepResult struct {
	stepData
	ctx            context.Context // of the step's span; keepResult ends the span
	touched        bool
	started, ended time.Time // the times of its records, if there are any
	err            error
}

// execute reserves, records the intent, and does the step. The result counts once
// [sandbox.conclude] has recorded it.
func (s *sandbox) execute(ctx context.Context, step Step) (out stepResult) {
	out.ctx, out.started = ctx, time.Now()
	out.err = Protect(func() error { return s.do(step, &out) })
	out.end()
	return out
}

func (s *sandbox) do(step Step, out *stepResult) (err error) {
	d := step.Declaration()
	var span trace.Span
	out.ctx, span = tracing.Start(out.ctx, tracing.Step(string(d.Name)), s.req.Attributes...)
	ctx, cancel := within(out.ctx, d.Deadline)
	defer cancel()
	ctx = log.WithLogger(ctx, s.log(ctx).WithField(tracing.LogStep, d.Name))
	r := s.newRun(step)
	defer func() { out.notes = r.Notes() }()

	if out.plan, err = step.Reserve(ctx, r); err != nil {
		return err
	}
	out.touched = out.plan != nil // the step may have reserved what the plan names, and a failed write may be on record
	r.steps[d.Name] = out.stepData
	intent := s.engine.intent(d)
	intent.Durable, intent.CanWait = d.Lasting && out.plan != nil, true
	if err := s.append(ctx, intent, out.plan); err != nil {
		return err
	}
	out.touched, out.started = true, intent.At

	if out.result, err = step.Do(ctx, r); err != nil {
		return late(ctx, err)
	}
	if out.skipped() {
		span.SetAttributes(tracing.StepSkipped.Bool(true))
	}
	return nil
}

// end sets ended to started plus the measured duration. So the recorded times give the same
// duration after a restart, even if the wall clock was set.
func (out *stepResult) end() { out.ended = out.started.Add(time.Since(out.started)) }

// stepEnded handles a step's result and proceeds.
func (s *sandbox) stepEnded(step Step, out stepResult) {
	if err := Protect(func() error { return s.takeResult(step, out) }); err != nil {
		s.creation.fail(err)
	}
	s.proceed()
}

// takeResult records and keeps a step's result, and moves the state. If the creation has failed
// before, even a successful step moves no state: the rollback undoes it.
func (s *sandbox) takeResult(step Step, out stepResult) error {
	name, canceled := step.Declaration().Name, s.creation.err != nil
	if out.err == nil && !canceled {
		out.err = s.conclude(step, &out)
	}
	if canceled {
		out.result = nil // it is not on record
	}
	s.keepResult(step, out, canceled)
	switch {
	case out.err != nil:
		return &StepError{Step: name, Pod: s.req.Pod, Err: out.err}
	case canceled:
		return nil
	default:
		return s.fire(out.ctx, name, out.ended, nil)
	}
}

// conclude records that a step is done. For a step of the creation path, the record has the
// transition, too.
func (s *sandbox) conclude(step Step, out *stepResult) error {
	d := step.Declaration()
	out.end()
	done := &ledger.Record{Kind: ledger.Done, Step: string(d.Name), At: out.ended, Durable: d.Lasting && out.plan != nil && !out.skipped()}
	if !d.OnDemand {
		if err := s.setTransition(done, d.Name, nil); err != nil {
			return err
		}
	}
	return Protect(func() error { return s.append(context.WithoutCancel(out.ctx), done, out.result) })
}

// keepResult keeps a step's result, ends its span and tells the meter. canceled says that the
// creation had failed before the step ended.
func (s *sandbox) keepResult(step Step, out stepResult, canceled bool) {
	s.logPanics(func() { tracing.End(trace.SpanFromContext(out.ctx), out.err) })
	name := step.Declaration().Name
	s.mu.Lock()
	rec := s.steps[name]
	rec.stepData, rec.touched, rec.err = out.stepData, out.touched, out.err
	rec.started, rec.ended, rec.operation = out.started, out.ended, ""
	s.tries.end(name, OperationDo, out.started, out.ended, out.err)
	outcome := outcomeOf(out.err)
	switch {
	case out.err != nil:
		rec.status = StepFailed
	case out.skipped():
		rec.status, outcome = StepSkipped, OutcomeSkipped
	default:
		rec.status = StepDone
	}
	s.mu.Unlock()

	if out.err != nil && canceled {
		outcome = OutcomeCanceled
	}
	s.tried(out.ctx, Try{Step: name, Operation: OperationDo, Started: out.started, Ended: out.ended, Err: out.err}, outcome)
}

// finishCreation answers the caller. It rolls a failed creation back first.
func (s *sandbox) finishCreation() {
	c := s.creation
	s.creation = nil
	defer c.cancel()
	if c.err == nil {
		c.reply(nil)
		return
	}
	err := c.err
	if pending := Protect(func() error { return s.rollBack(context.WithoutCancel(c.ctx), c.err) }); pending != nil {
		err = WithPendingCleanup(c.err, s.explained(pending))
	}
	c.reply(err)
	for _, request := range c.then {
		request()
	}
}

// WithPendingCleanup adds to the error of a creation that its cleanup failed with pending.
func WithPendingCleanup(err, pending error) error {
	return errors.Join(err, fmt.Errorf("the cleanup is pending and will be retried: %w", pending))
}

// afterCreation handles a request that ends the sandbox. If a creation is under way, it fails
// because of the request. The request then waits for the rollback.
func (s *sandbox) afterCreation(request func()) {
	if s.creation == nil {
		request()
		return
	}
	s.creation.then = append(s.creation.then, request)
	s.creation.fail(errEnded)
}

var errEnded = fmt.Errorf("the sandbox was stopped or removed before it was ready: %w", errdefs.ErrAborted)

// within returns a context with a deadline. The cause of its end names the deadline.
func within(ctx context.Context, deadline time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, deadline, fmt.Errorf("no answer within %s: %w", deadline, context.DeadlineExceeded))
}

// late adds the cause of ctx's end to err if the deadline has passed. A shim or a runtime returns
// errors that have lost the class DeadlineExceeded.
func late(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) || errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w: %w", cause, err)
}
