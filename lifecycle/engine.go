// Package lifecycle is the engine that runs every sandbox as a state machine.
//
// A sandbox has a queue of events: requests, step results, the exit of pause, retry timers. One
// goroutine at a time handles the events of a sandbox, so nothing else changes its state. An empty
// queue has no goroutine.
//
// The steps of a creation run one after the other beside the queue, and their results come back as
// events. Steps on demand run inside the queue. So do undos, one after the other, newest first. A
// check of a ready sandbox is an event, too, but it ends as soon as another event comes.
//
// The ledger has a step's intent and plan before the step acts. The queue records the step's
// result, and then moves the state.
package lifecycle

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel/attribute"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Ledger is what the engine needs of the ledger.
type Ledger interface {
	Append(ctx context.Context, r *ledger.Record) error
	Forget(ctx context.Context, k ledger.Key) error
}

// Backoff is the wait before the next try at a pending cleanup, after a number of failed tries (1 and more).
type Backoff func(failed int) time.Duration

// DefaultBackoff doubles from one second to four minutes, plus up to a quarter, so that cleanups that failed together
// aren't retried together.
func DefaultBackoff(failed int) time.Duration {
	shortest := min(time.Second<<min(failed-1, 16), 4*time.Minute)
	return shortest + rand.N(shortest/4)
}

// Engine owns all sandboxes. Its methods may be called by any number of goroutines.
type Engine struct {
	table      *states.Table
	steps      []Step
	process    Ender
	ledger     Ledger
	backoff    Backoff
	observe    Observer // nil for none
	writtenOff func(View, WriteOff)
	uptime     func() time.Duration // of the kernel
	release    string

	// removalCompleted is set by [Engine.WhenRemovalCompletes].
	removalCompleted func(context.Context, ledger.Key)

	work  sync.WaitGroup // queues and steps that are running
	limit limiter        // of events without a waiting caller: cleanups after a restart, retries, checks of pause
	meter Meter

	mu        sync.Mutex
	closed    bool
	sandboxes map[ledger.Key]*sandbox
	names     map[string]*sandbox
	pods      map[string][]*sandbox // by pod; a pod that was started again has several
}

// Observer is called after each transition is on record. The transition is the last one of the view. The calls for one
// sandbox are in order. The sandbox waits for the call, so it must return soon.
type Observer func(View)

// Config is the configuration of an engine.
type Config struct {
	// Steps are those of the creation path, in its order, then those on demand.
	Steps []Step
	// Process names the step whose process keeps the sandbox alive. The step is an [Ender].
	Process states.Event
	Ledger  Ledger
	Backoff Backoff
	// Release is the running release of podfsm. It is on every record.
	Release string
	// Observe, WrittenOff and Meter may be nil.
	Observe Observer
	// WrittenOff is called after the write-off of a cleanup is on record. It must return soon.
	WrittenOff func(View, WriteOff)
	Meter      Meter
}

// New makes an engine. It fails with InvalidArgument for steps that don't fit together.
func New(c Config) (*Engine, error) {
	if c.Meter == nil {
		c.Meter = unmetered{}
	}
	if c.WrittenOff == nil {
		c.WrittenOff = func(View, WriteOff) {}
	}
	declared, err := declarations(c.Steps)
	if err != nil {
		return nil, err
	}
	table, err := states.NewTable(declared)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		table: table, steps: c.Steps, ledger: c.Ledger, backoff: c.Backoff, observe: c.Observe, writtenOff: c.WrittenOff, uptime: uptime, release: c.Release,
		removalCompleted: func(context.Context, ledger.Key) {},
		limit:            limiter{free: resumeParallel},
		sandboxes:        map[ledger.Key]*sandbox{}, names: map[string]*sandbox{}, pods: map[string][]*sandbox{},
		meter: c.Meter,
	}
	process, _ := e.step(c.Process)
	ender, ok := process.(Ender)
	if !ok {
		return nil, fmt.Errorf("step %q is not an Ender: %w", c.Process, errdefs.ErrInvalidArgument)
	}
	e.process = ender
	return e, nil
}

// declarations returns the steps' declarations for the table, in their order. It fails with InvalidArgument.
func declarations(steps []Step) (declared []states.Step, err error) {
	var before []states.Event
	for _, step := range steps {
		d := step.Declaration()
		for _, held := range d.Holds {
			if !slices.Contains(before, held) {
				return nil, fmt.Errorf("step %q refers to %q, which does not come before it: %w", d.Name, held, errdefs.ErrInvalidArgument)
			}
		}
		if d.Deadline <= 0 || d.UndoDeadline <= 0 {
			return nil, fmt.Errorf("step %q has no deadline: %w", d.Name, errdefs.ErrInvalidArgument)
		}
		before, declared = append(before, d.Name), append(declared, d.Step)
	}
	return declared, nil
}

// step returns this release's step with a name.
func (e *Engine) step(name states.Event) (Step, bool) {
	i := slices.IndexFunc(e.steps, func(s Step) bool { return s.Declaration().Name == name })
	if i < 0 {
		return nil, false
	}
	return e.steps[i], true
}

// intent is the record that a step is about to act. A stop ends the process even if its step is undone later.
func (e *Engine) intent(d Declaration) *ledger.Record {
	r := &ledger.Record{Kind: ledger.Intent, Step: string(d.Name), AtStop: d.AtStop || d.Name == e.process.Declaration().Name}
	for _, held := range d.Holds {
		r.Holds = append(r.Holds, string(held))
	}
	return r
}

// WhenRemovalCompletes sets a function that is called when a pending removal completes without a
// waiting caller, right before the engine forgets the sandbox. The caller of the removal got an
// error, and may still have the sandbox on record. Set the function before the first sandbox is
// created. The sandbox's queue waits for it.
func (e *Engine) WhenRemovalCompletes(f func(context.Context, ledger.Key)) {
	e.removalCompleted = f
}

// Request says how to create a sandbox.
type Request struct {
	// Name identifies a pod and its attempt. No two sandboxes share a name at a time. "" is no name.
	Name string
	// Pod is the pod's "namespace/name", for messages.
	Pod string
	// Spec is the specification for the steps. Its type must be known to typeurl.
	Spec any
	// Attributes go on every span of the sandbox.
	Attributes []attribute.KeyValue
	// Created is when the sandbox was begun, for a restored sandbox whose records don't have the time.
	Created time.Time
}

// Create puts a sandbox on record. Nothing of the sandbox exists yet. It fails with AlreadyExists for a key or a name
// in use.
func (e *Engine) Create(ctx context.Context, key ledger.Key, req Request) error {
	s := newSandbox(e, key, req)
	s.traceParent = tracing.Parent(ctx)
	if err := e.add(s); err != nil {
		return err
	}
	if err := Protect(func() error { return s.accept(ctx) }); err != nil {
		s.unaccept(ctx)
		e.drop(s)
		return err
	}
	return nil
}

// Start runs the creation path. When it returns an error, the rollback has ended. The error names the step that failed,
// and a cleanup that is still pending. If ctx ends, the running step fails. Start then still waits for the rollback,
// which has deadlines of its own.
func (e *Engine) Start(ctx context.Context, key ledger.Key) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	return <-s.ask(func(reply func(error)) { s.start(ctx, reply) })
}

// Halt ends the sandbox's process. [Engine.Stop] does the rest. It is idempotent.
func (e *Engine) Halt(ctx context.Context, key ledger.Key) error {
	return e.call(ctx, key, (*sandbox).halt)
}

// Stop ends the process and detaches the sandbox from its network. It rolls back a sandbox that was
// never ready. It is idempotent.
func (e *Engine) Stop(ctx context.Context, key ledger.Key) error {
	return e.call(ctx, key, (*sandbox).stop)
}

// Remove undoes all there is of the sandbox, whatever its state, and forgets it. It is idempotent; an unknown key is success.
// A sandbox with a pending cleanup stays, and Remove fails, until the cleanup completes.
func (e *Engine) Remove(ctx context.Context, key ledger.Key) error {
	err := e.call(ctx, key, (*sandbox).remove)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// PauseExited reports that the sandbox's process has ended. Unknown keys are ignored.
func (e *Engine) PauseExited(key ledger.Key, exit Exit) {
	if s, err := e.lookup(key); err == nil {
		s.post(func() { s.pauseExited(exit) })
	}
}

// Wait waits for the end of the sandbox's process and returns its exit. It fails with NotFound for a sandbox that is
// gone before its process ever ran.
func (e *Engine) Wait(ctx context.Context, key ledger.Key) (Exit, error) {
	s, err := e.lookup(key)
	if err != nil {
		return Exit{}, err
	}
	select {
	case <-s.exited:
		return s.exitStatus()
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

// Get returns the sandbox as it is now. A sandbox that is gone is NotFound: the [Observer] got its last view.
func (e *Engine) Get(key ledger.Key) (View, error) {
	s, err := e.lookup(key)
	if err != nil {
		return View{}, err
	}
	return s.view(), nil
}

// Created returns when the sandbox was begun, without the cost of a View; the zero time for an unknown key.
func (e *Engine) Created(key ledger.Key) time.Time {
	e.mu.Lock()
	s, ok := e.sandboxes[key]
	e.mu.Unlock()
	if !ok {
		return time.Time{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.created
}

// List returns every sandbox as it is now, in no order.
func (e *Engine) List() []View {
	all := e.all()
	views := make([]View, len(all))
	for i, s := range all {
		views[i] = s.view()
	}
	return views
}

// Keys returns the keys of all sandboxes, in no order, without the cost of their views.
func (e *Engine) Keys() []ledger.Key {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.sandboxes))
}

// Close stops retry timers, refuses new events and waits for the queued ones until ctx ends. The ledger has what is
// unfinished.
func (e *Engine) Close(ctx context.Context) {
	e.mu.Lock()
	e.closed = true
	all := slices.Collect(maps.Values(e.sandboxes))
	e.mu.Unlock()
	for _, s := range all {
		s.stopTimer()
		s.queue.giveWay() // takes the queue's lock, so not under e.mu: enter takes them in the other order
	}
	idle := make(chan struct{})
	go func() {
		e.work.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// call runs one request and waits for it. If ctx ends first, the request continues.
func (e *Engine) call(ctx context.Context, key ledger.Key, f func(s *sandbox, ctx context.Context) error) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) {
		s.afterCreation(func() { reply(s.explained(Protect(func() error { return f(s, context.WithoutCancel(ctx)) }))) })
	})
	return await(ctx, done, "request for sandbox %q continues after its caller's deadline", key.ID)
}
