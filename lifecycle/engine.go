// Package lifecycle is the engine that runs every sandbox as a state machine.
//
// A sandbox is a queue of events: requests, the results of steps, the exit of pause, retry timers. One goroutine at a time
// handles a sandbox's events, so nothing else changes its state; with an empty queue there is no goroutine. The steps of a creation
// run one after the other beside the queue, and their results come back as events. A step on demand is done inside the queue. What is
// undone is undone inside the queue, one step after the other, newest first. A check of a sandbox that is ready is an event, too, which
// ends as soon as another comes.
//
// Before a step acts, its intent and its plan are in the ledger. Its result is written inside the queue, and then the state moves.
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

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Journal is what the engine needs of the ledger.
type Journal interface {
	Append(ctx context.Context, r *journal.Record) error
	Forget(ctx context.Context, k journal.Key) error
}

// Backoff is the wait before the next try at an owed cleanup, after attempts failed ones (1 and more).
type Backoff func(attempts int) time.Duration

// DefaultBackoff doubles from one second to four minutes, plus up to a quarter: what has failed at one time is not tried again at one time.
func DefaultBackoff(attempts int) time.Duration {
	shortest := min(time.Second<<min(attempts-1, 16), 4*time.Minute)
	return shortest + rand.N(shortest/4)
}

// Engine owns all sandboxes. Its methods may be called by any number of goroutines.
type Engine struct {
	table      *states.Table
	steps      []Step
	process    Ender
	journal    Journal
	backoff    Backoff
	observe    Observer // nil for none
	writtenOff func(View, WriteOff)
	uptime     func() time.Duration // of the kernel
	release    string

	// paid is told of a removal; see [Engine.WhenPaid].
	paid func(context.Context, journal.Key)

	work  sync.WaitGroup // queues and steps that are running
	turns turns          // of the sandboxes that are being undone, or looked at, for nobody who waits
	meter Meter

	mu        sync.Mutex
	closed    bool
	sandboxes map[journal.Key]*sandbox
	names     map[string]*sandbox
	pods      map[string][]*sandbox // by the name of their pod, which has several where it was started again
}

// Observer is told of each transition, after it is on record: the last one of a view. Those of one sandbox are told in order; the
// sandbox waits for it, so it must return soon.
type Observer func(View)

// Config is what an engine is made of.
type Config struct {
	// Steps are those of the creation path, in its order, then those on demand.
	Steps []Step
	// Process names the step among them whose process is the sandbox's life. The step is an [Ender].
	Process states.Event
	Journal Journal
	Backoff Backoff
	// Release is the release of podfsm that runs. It is on every record.
	Release string
	// Observe, WrittenOff and Meter may be nil.
	Observe Observer
	// WrittenOff is told of each cleanup that is written off, after that is on record. It must return soon.
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
		table: table, steps: c.Steps, journal: c.Journal, backoff: c.Backoff, observe: c.Observe, writtenOff: c.WrittenOff, uptime: uptime, release: c.Release,
		paid:      func(context.Context, journal.Key) {},
		turns:     turns{free: resumeParallel},
		sandboxes: map[journal.Key]*sandbox{}, names: map[string]*sandbox{}, pods: map[string][]*sandbox{},
		meter: c.Meter,
	}
	process, _ := e.step(c.Process)
	ender, ok := process.(Ender)
	if !ok {
		return nil, fmt.Errorf("step %q has no process to end: %w", c.Process, errdefs.ErrInvalidArgument)
	}
	e.process = ender
	return e, nil
}

// declarations are what steps say of themselves to the table.
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

// step is the step of this release with a name.
func (e *Engine) step(name states.Event) (Step, bool) {
	i := slices.IndexFunc(e.steps, func(s Step) bool { return s.Declaration().Name == name })
	if i < 0 {
		return nil, false
	}
	return e.steps[i], true
}

// intent is the record that a step is about to act. The process ends with a stop even where its step is undone later.
func (e *Engine) intent(d Declaration) *journal.Record {
	r := &journal.Record{Kind: journal.Intent, Step: string(d.Name), AtStop: d.AtStop || d.Name == e.process.Declaration().Name}
	for _, held := range d.Holds {
		r.Holds = append(r.Holds, string(held))
	}
	return r
}

// WhenPaid sets what is called when an owed removal has succeeded with nobody waiting for it, right before the sandbox is forgotten: who
// asked for it was told that it had failed, and may have it on record. It must be set before there is any sandbox, and holds up the
// sandbox's queue.
func (e *Engine) WhenPaid(paid func(context.Context, journal.Key)) { e.paid = paid }

// Request is what a sandbox is created with.
type Request struct {
	// Name is what no two sandboxes may share at a time: a pod and its attempt. "" is no name.
	Name string
	// Pod is the pod's "namespace/name", for messages.
	Pod string
	// Spec is what the steps work from. Its type must be known to typeurl.
	Spec any
	// Attributes go on every span of the sandbox.
	Attributes []attribute.KeyValue
	// Created is when the sandbox was begun, for a restored one whose records don't say so.
	Created time.Time
}

// Create accepts a sandbox: it is on record from here on, and nothing of it exists yet.
// It fails with AlreadyExists for a key or a name that is in use.
func (e *Engine) Create(ctx context.Context, key journal.Key, req Request) error {
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

// Start runs the creation path. When it returns an error, what had been made is undone again, or is owed: the error says which
// step failed and whether anything is owed. A context that ends fails the step that is running; Start still waits for the
// rollback, which has deadlines of its own.
func (e *Engine) Start(ctx context.Context, key journal.Key) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	return <-s.ask(func(reply func(error)) { s.start(ctx, reply) })
}

// Halt ends the sandbox's process and leaves the rest for [Engine.Stop]. It is idempotent.
func (e *Engine) Halt(ctx context.Context, key journal.Key) error {
	return e.call(ctx, key, (*sandbox).halt)
}

// Stop ends the process and takes the sandbox off its network. A sandbox that was never ready is rolled back. It is idempotent.
func (e *Engine) Stop(ctx context.Context, key journal.Key) error {
	return e.call(ctx, key, (*sandbox).stop)
}

// Remove undoes all there is of the sandbox, whatever its state, and forgets it. It is idempotent; an unknown key is success.
// A sandbox with something owed stays, and Remove fails, until that is paid.
func (e *Engine) Remove(ctx context.Context, key journal.Key) error {
	err := e.call(ctx, key, (*sandbox).remove)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// PauseExited tells that the sandbox's process has ended. Unknown keys are ignored.
func (e *Engine) PauseExited(key journal.Key, exit Exit) {
	if s, err := e.lookup(key); err == nil {
		s.post(func() { s.pauseExited(exit) })
	}
}

// Wait returns how the sandbox's process ended, once it has. It fails with NotFound for a sandbox that is gone before its
// process ever ran.
func (e *Engine) Wait(ctx context.Context, key journal.Key) (Exit, error) {
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

// Get is the sandbox as it is now. A sandbox that is gone is NotFound: its last view was the [Observer]'s.
func (e *Engine) Get(key journal.Key) (View, error) {
	s, err := e.lookup(key)
	if err != nil {
		return View{}, err
	}
	return s.view(), nil
}

// Created is when the sandbox was begun, without the cost of a View; the zero time for one that is unknown or gone.
func (e *Engine) Created(key journal.Key) time.Time {
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

// List is every sandbox as it is now, in no order.
func (e *Engine) List() []View {
	all := e.all()
	views := make([]View, len(all))
	for i, s := range all {
		views[i] = s.view()
	}
	return views
}

// Keys are the keys of all sandboxes, in no order, without the cost of their views.
func (e *Engine) Keys() []journal.Key {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.sandboxes))
}

func (e *Engine) all() []*sandbox {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*sandbox, 0, len(e.sandboxes))
	for _, s := range e.sandboxes {
		all = append(all, s)
	}
	return all
}

// Close stops retry timers, refuses new events and waits for those that are queued, as long as ctx lasts. What is unfinished is
// in the ledger.
func (e *Engine) Close(ctx context.Context) {
	e.mu.Lock()
	e.closed = true
	all := slices.Collect(maps.Values(e.sandboxes))
	e.mu.Unlock()
	for _, s := range all {
		s.stopTimer()
		s.queue.giveWay() // takes the lock of the queue, under which e.mu is taken elsewhere
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

// call runs one request and waits for it. When ctx ends first, the request continues after its caller's deadline.
func (e *Engine) call(ctx context.Context, key journal.Key, f func(s *sandbox, ctx context.Context) error) error {
	s, err := e.lookup(key)
	if err != nil {
		return err
	}
	done := s.ask(func(reply func(error)) {
		s.afterCreation(func() { reply(s.explained(Protect(func() error { return f(s, context.WithoutCancel(ctx)) }))) })
	})
	return await(ctx, done, "request for sandbox %q continues after its caller's deadline", key.ID)
}

func (e *Engine) add(s *sandbox) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosed
	}
	if _, ok := e.sandboxes[s.key]; ok {
		return fmt.Errorf("sandbox %q: %w", s.key.ID, errdefs.ErrAlreadyExists)
	}
	if name := s.req.Name; name != "" {
		if holder, ok := e.names[name]; ok {
			return fmt.Errorf("the name %q is reserved for sandbox %q: %w", name, holder.key.ID, errdefs.ErrAlreadyExists)
		}
		e.names[name] = s
	}
	for _, other := range e.pods[s.req.Pod] {
		if !other.created.Before(s.created) {
			s.created = other.created.Add(1) // the wall clock was set back, and the kubelet goes by it
		}
	}
	e.keepLocked(s)
	return nil
}

func (e *Engine) keepLocked(s *sandbox) {
	e.sandboxes[s.key] = s
	e.pods[s.req.Pod] = append(e.pods[s.req.Pod], s)
}

// addRestored takes a sandbox that is on record. Two with one name can only come of a ledger that was damaged, where one that has
// gone comes back: the newer one has the name then.
func (e *Engine) addRestored(s *sandbox) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.sandboxes[s.key]; ok {
		return fmt.Errorf("sandbox %q: %w", s.key.ID, errdefs.ErrAlreadyExists)
	}
	e.keepLocked(s)
	if s.req.Name != "" && (s.goal == "" || s.goal == states.Stopped) {
		e.names[s.req.Name] = s
	}
	return nil
}

func (e *Engine) drop(s *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.sandboxes, s.key)
	e.pods[s.req.Pod] = slices.DeleteFunc(e.pods[s.req.Pod], func(other *sandbox) bool { return other == s })
	if len(e.pods[s.req.Pod]) == 0 {
		delete(e.pods, s.req.Pod)
	}
	e.unnameLocked(s)
}

func (e *Engine) unnameLocked(s *sandbox) {
	if e.names[s.req.Name] == s {
		delete(e.names, s.req.Name)
	}
}

// unname lets another sandbox have the name.
func (e *Engine) unname(s *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unnameLocked(s)
}

func (e *Engine) lookup(key journal.Key) (*sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s, ok := e.sandboxes[key]
	if !ok {
		return nil, fmt.Errorf("sandbox %q: %w", key.ID, errdefs.ErrNotFound)
	}
	return s, nil
}

// enter counts a goroutine in, unless the engine is closed.
func (e *Engine) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.work.Add(1)
	return true
}

// stay counts a goroutine in for work that is counted in already, so it may also begin while the engine closes.
func (e *Engine) stay() bool {
	e.work.Add(1)
	return true
}

var errClosed = fmt.Errorf("the engine is closed: %w", errdefs.ErrUnavailable)
