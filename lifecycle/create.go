package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"go.opentelemetry.io/otel/trace"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// creation is one run of the creation path. It belongs to the queue's goroutine.
type creation struct {
	ctx    context.Context
	cancel context.CancelFunc
	reply  func(error)
	err    error    // why it failed, the first reason
	then   []func() // requests that wait for its end
}

// fail makes the creation end as soon as the step that is running has returned.
func (c *creation) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	c.cancel()
}

// StepError says which step of a sandbox failed, or whose undo. Its text stays the same from try to try as far as the step's does.
type StepError struct {
	Step states.Event
	Undo bool
	Pod  string
	Err  error
}

func (e *StepError) Error() string {
	if e.Undo {
		return fmt.Sprintf("undo of step %s of pod %q failed: %s", e.Step, e.Pod, e.Err)
	}
	return fmt.Sprintf("step %s of pod %q failed: %s", e.Step, e.Pod, e.Err)
}

func (e *StepError) Unwrap() error { return e.Err }

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

// proceed starts the next step of the path, and ends the creation after the last one or a failure.
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

// launch runs step beside the queue, which takes other events meanwhile; its result comes back as an event.
func (s *sandbox) launch(step Step) {
	s.setRunning(step)
	ctx := s.creation.ctx
	s.engine.work.Add(1) // the queue that is being handled keeps the group from being waited out
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
	rec.acting, rec.actingSince = ActDo, rec.started
	s.acts.begin(name, ActDo, rec.started)
}

// stepResult is how a step's work went.
type stepResult struct {
	recorded
	ctx            context.Context // of the step's span, which ends when the result is kept
	touched        bool
	started, ended time.Time // of its records, where there are any
	err            error
}

// execute reserves, records and does. What comes of it counts once [sandbox.conclude] has put it on record.
func (s *sandbox) execute(ctx context.Context, step Step) (out stepResult) {
	out.ctx, out.started = ctx, time.Now()
	out.err = Protect(func() error { return s.do(step, &out) })
	out.end()
	return out
}

func (s *sandbox) do(step Step, out *stepResult) (err error) {
	f := step.Declaration()
	var span trace.Span
	out.ctx, span = tracing.Start(out.ctx, tracing.Step(string(f.Name)), s.req.Attributes...)
	ctx, cancel := within(out.ctx, f.Deadline)
	defer cancel()
	ctx = log.WithLogger(ctx, s.log(ctx).WithField(tracing.LogStep, f.Name))
	r := s.run(step)
	defer func() { out.notes = r.Notes() }()

	if out.plan, err = step.Reserve(ctx, r); err != nil {
		return err
	}
	out.touched = out.plan != nil // what it names may be set aside already, or be on record in spite of an error
	r.steps[f.Name] = out.recorded
	intent := s.engine.intent(f)
	intent.Durable, intent.CanWait = f.Lasting && out.plan != nil, true
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

// end sets the end as far behind the beginning as the step has taken, so that the record of it says the same duration after a restart,
// whatever has become of the wall clock.
func (out *stepResult) end() { out.ended = out.started.Add(time.Since(out.started)) }

// conclude puts on record that a step has gone well, and where a step of the creation path leads.
func (s *sandbox) conclude(step Step, out *stepResult) error {
	f := step.Declaration()
	out.end()
	done := &journal.Record{Kind: journal.Done, Step: string(f.Name), At: out.ended, Durable: f.Lasting && out.plan != nil && !out.skipped()}
	if !f.OnDemand {
		if err := s.describe(done, f.Name, nil); err != nil {
			return err
		}
	}
	return Protect(func() error { return s.append(context.WithoutCancel(out.ctx), done, out.result) })
}

// within names the deadline in the cause of its end.
func within(ctx context.Context, deadline time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, deadline, fmt.Errorf("no answer within %s: %w", deadline, context.DeadlineExceeded))
}

// late gives the error of work whose time was up the class DeadlineExceeded, and the reason, if it doesn't say that itself: what a
// shim or a runtime says of it has lost both.
func late(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) || errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w: %w", cause, err)
}

// Protect turns a panic into an error, and logs where it came from: a daemon that runs a node's pods doesn't die of one of them.
func Protect(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
			logStack(err)
		}
	}()
	return f()
}

func logStack(err error) {
	defer func() { _ = recover() }() // the log may be what panics
	log.L.WithError(err).Errorf("podfsm: panic, please report it: %s", debug.Stack())
}

// aside does what nothing of a sandbox depends on: it tells the log, the meter or the observer. A panic there changes nothing.
func (s *sandbox) aside(tell func()) {
	nothing := func() error { tell(); return nil }
	if err := Protect(nothing); err != nil {
		tell = func() { s.log(s.background()).WithError(err).Error("sandbox: an event was not handled to its end") }
		_ = Protect(nothing) // the log may be what panics
	}
}

// stepEnded handles the result of a step.
func (s *sandbox) stepEnded(step Step, out stepResult) {
	if err := Protect(func() error { return s.takeResult(step, out) }); err != nil {
		s.creation.fail(err)
	}
	s.proceed()
}

// takeResult records and keeps how a step went, and moves the state. A step that ends after the creation has failed moves nothing any
// more, whatever it says: it is only undone.
func (s *sandbox) takeResult(step Step, out stepResult) error {
	name, canceled := step.Declaration().Name, s.creation.err != nil
	if out.err == nil && !canceled {
		out.err = s.conclude(step, &out)
	}
	if canceled {
		out.result = nil // it is on no record
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

// keepResult keeps how a step went, ends its span, and tells the meter. canceled says that the step had to end because the creation had
// failed already.
func (s *sandbox) keepResult(step Step, out stepResult, canceled bool) {
	s.aside(func() { tracing.End(trace.SpanFromContext(out.ctx), out.err) })
	name := step.Declaration().Name
	s.mu.Lock()
	rec := s.steps[name]
	rec.recorded, rec.touched, rec.err = out.recorded, out.touched, out.err
	rec.started, rec.ended, rec.acting = out.started, out.ended, ""
	s.acts.end(name, ActDo, out.started, out.ended, out.err)
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
	s.acted(out.ctx, Act{Step: name, Kind: ActDo, Started: out.started, Ended: out.ended, Err: out.err}, outcome)
}

// finishCreation answers the caller, after the rollback if there has to be one.
func (s *sandbox) finishCreation() {
	c := s.creation
	s.creation = nil
	defer c.cancel()
	if c.err == nil {
		c.reply(nil)
		return
	}
	err := c.err
	if owed := Protect(func() error { return s.rollback(context.WithoutCancel(c.ctx), c.err) }); owed != nil {
		err = errors.Join(c.err, fmt.Errorf("the cleanup is owed and will be tried again: %w", s.explained(owed)))
	}
	c.reply(err)
	for _, request := range c.then {
		request()
	}
}

// afterCreation handles a request that ends the sandbox. A creation that is under way fails because of the request, and the request
// waits until the creation has been rolled back.
func (s *sandbox) afterCreation(request func()) {
	if s.creation == nil {
		request()
		return
	}
	s.creation.then = append(s.creation.then, request)
	s.creation.fail(errEnded)
}

var errEnded = fmt.Errorf("the sandbox was stopped or removed before it was ready: %w", errdefs.ErrAborted)
