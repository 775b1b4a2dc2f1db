package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// keepTransitions bounds the history that is kept of one sandbox. Where it has more transitions, the first of them stay, because
// they say how all began, and the last.
const (
	keepTransitions      = 64
	keepFirstTransitions = 16
)

// stepRecord is what the engine knows of one step of one sandbox.
type stepRecord struct {
	recorded
	status         StepStatus
	touched        bool      // its intent is on record, so it may have acted
	undoing        time.Time // when its undo was begun, where that is on record
	release        string    // that has recorded it
	unknown        string    // the type of its data that this release doesn't know; "" for none
	holds          []states.Event
	atStop         bool    // by its intent, like holds
	acting         ActKind // what is being done with it now; "" for nothing
	actingSince    time.Time
	started, ended time.Time
	err            error // of Do
	undoErr        error // of the last undo
	checkErr       error // of the last check, of what is done
	attempts       int   // failed undos
	owedSince      time.Time
	interrupted    bool // an earlier daemon's undo has no end on record
}

// took is how long the step's Do has taken; 0 where that isn't known, and where the wall clock was set back between two records.
func (r *stepRecord) took() time.Duration {
	if r.ended.IsZero() {
		return 0
	}
	return max(0, r.ended.Sub(r.started))
}

// sandbox is one sandbox and its queue. The fields behind mu are written only by the goroutine that handles the queue, or
// before the sandbox is known to anyone; mu makes them readable for others.
type sandbox struct {
	engine  *Engine
	key     journal.Key
	req     Request
	machine *states.Machine
	exited  chan struct{} // closed when the process has ended, or never will run

	exitOnce sync.Once    // closes exited
	claim    atomic.Int32 // a Claim

	queue queue

	creation *creation   // the run of the creation path that is under way; of the queue's goroutine alone
	restored bool        // it is an earlier daemon's; set before the sandbox is known to anyone
	dossier  dossier     // of a restored one, set likewise
	ended    bool        // the process was ended by us; of the queue's goroutine alone
	alone    bool        // what is under way is for nobody who has asked for the sandbox's end; of the queue's goroutine alone
	givingUp *givingUp   // an operator's write-off that is under way, or nil; of the queue's goroutine alone
	timer    *time.Timer // the next try at what is owed; behind mu

	mu          sync.Mutex
	traceParent string                       // of the span the sandbox was created under
	created     time.Time                    // by the wall clock, but never before another sandbox of the pod; doesn't change once others know the sandbox
	entered     time.Time                    // when its state was
	steps       map[states.Event]*stepRecord // those of this release, and those on record
	begun       []states.Event               // the steps on record, in the order in which they were begun
	unread      []string                     // what this release doesn't know of the records
	seq         uint64
	transitions []Transition
	acts        acts
	goal        states.State // what is being stopped for, or what the pending cleanup leads to; "" for neither
	attempts    int
	failing     time.Time // since when, by this process
	nextTry     time.Time
	lastErr     error
	failure     error // why it was rolled back
	exit        *Exit
}

func newSandbox(e *Engine, key journal.Key, req Request) *sandbox {
	now := time.Now()
	s := &sandbox{
		engine: e, key: key, req: req, machine: e.table.NewMachine(),
		exited:  make(chan struct{}),
		created: now.Round(0),
		entered: now,
		steps:   map[states.Event]*stepRecord{},
	}
	s.queue.handle, s.queue.left = s.aside, e.work.Done
	for _, name := range e.table.Steps() {
		s.steps[name] = &stepRecord{status: StepPending}
	}
	return s
}

// state is the sandbox's state now.
func (s *sandbox) state() states.State { return s.machine.Current() }

// accept puts the sandbox on record.
func (s *sandbox) accept(ctx context.Context) error {
	return s.append(ctx, &journal.Record{Kind: journal.Begun, Durable: true, At: s.created}, s.req.Spec)
}

// unacceptTimeout bounds the wait for the ledger to forget a sandbox that was not accepted.
const unacceptTimeout = 5 * time.Second

// unaccept takes back what an error of accept may have left on record.
func (s *sandbox) unaccept(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unacceptTimeout)
	defer cancel()
	s.aside(func() {
		if err := s.engine.journal.Forget(ctx, s.key); err != nil {
			s.log(ctx).WithError(err).Warn("sandbox: it was not accepted, and may be in the ledger until the next start")
		}
	})
}

// append writes one record of this sandbox to the ledger, with data in it. It sets the record's release where it has none, and its time,
// which has a monotonic clock: durations are measured by that, as long as this process knows both of their ends.
func (s *sandbox) append(ctx context.Context, r *journal.Record, data any) error {
	r.Key, r.Release, r.TraceParent = s.key, cmp.Or(r.Release, s.engine.release), tracing.Parent(ctx)
	if r.At.IsZero() {
		r.At = time.Now()
	}
	if data != nil {
		packed, err := journal.Marshal(data)
		if err != nil {
			return fmt.Errorf("failed to pack the %s record of sandbox %q: %w", r.Kind, s.key.ID, err)
		}
		r.Data = packed
	}
	if err := s.engine.journal.Append(ctx, r); err != nil {
		return fmt.Errorf("failed to write the %s record of sandbox %q to the ledger: %w", r.Kind, s.key.ID, err)
	}
	return nil
}

// record writes a record that nothing depends on: the sandbox goes on by what is in memory.
func (s *sandbox) record(ctx context.Context, r *journal.Record, data any) {
	s.aside(func() {
		if err := s.append(ctx, r, data); err != nil {
			s.log(ctx).WithError(err).Warnf("sandbox: a record is not in the ledger: %s", r.Kind)
		}
	})
}

// fire moves the state, keeps the transition and tells the log. The record that the transition rests on was written before, at
// the time at.
func (s *sandbox) fire(ctx context.Context, event states.Event, at time.Time, cause error) error {
	from := s.state()
	to, err := s.machine.Fire(ctx, event)
	if err != nil {
		return err
	}
	t := Transition{At: at, Event: event, From: from, To: to, Step: s.stepOf(event, cause), Err: cause, TraceID: tracing.TraceID(ctx)}
	if cause != nil {
		t.Class = tracing.Class(cause)
	}
	s.mu.Lock()
	t = s.keep(t)
	s.mu.Unlock()

	s.aside(func() { s.tell(ctx, t) })
	if s.engine.observe != nil {
		s.aside(func() { s.engine.observe(s.view()) })
	}
	return nil
}

// keep adds a transition to the history, as its next or by the number that it has. The caller holds mu, or is alone.
func (s *sandbox) keep(t Transition) Transition {
	s.seq = max(s.seq+1, t.Seq)
	t.Seq = s.seq
	if t.After == 0 {
		t.After = s.since(t.At)
	}
	s.entered = t.At
	shown := s.created
	if n := len(s.transitions); n > 0 {
		shown = s.transitions[n-1].At
	}
	if t.At.Round(0).Before(shown.Round(0)) {
		t.At = shown // the wall clock was set back
	}
	s.transitions = append(s.transitions, t)
	if over := len(s.transitions) - keepTransitions; over > 0 {
		s.transitions = slices.Delete(s.transitions, keepFirstTransitions, keepFirstTransitions+over)
	}
	if t.Err != nil {
		s.lastErr = t.Err
	}
	return t
}

// since is how long the sandbox had been in its state at a time; 0 where the wall clock was set back between two daemons.
func (s *sandbox) since(at time.Time) time.Duration { return max(0, at.Sub(s.entered)) }

// tell logs a transition: what goes as it should, or follows from what was logged already, in the debug log.
func (s *sandbox) tell(ctx context.Context, t Transition) {
	entry := s.log(ctx).WithFields(log.Fields{
		tracing.LogFrom: t.From, tracing.LogTo: t.To, tracing.LogSeconds: s.secondsOf(t),
	})
	if t.Step != "" {
		entry = entry.WithField(tracing.LogStep, t.Step)
	}
	if t.Err != nil {
		entry = entry.WithError(t.Err).WithField(tracing.LogErrorType, t.Class)
	}
	switch {
	case t.Event == states.Quarantine:
		entry.Errorf("sandbox: %s", t.Event)
	case t.Event == states.OweCleanup, expected(t.Err):
		entry.Debugf("sandbox: %s", t.Event)
	default:
		entry.Warnf("sandbox: %s", t.Event)
	}
}

// secondsOf is how long the step took that a transition says is done, else how long the sandbox was in the state before.
func (s *sandbox) secondsOf(t Transition) float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec, ok := s.steps[t.Event]; ok {
		return rec.took().Seconds()
	}
	return t.After.Seconds()
}

// stepOf is the step that a transition is about: the one that was done, or whose failure led to it.
func (s *sandbox) stepOf(event states.Event, cause error) states.Event {
	if _, ok := s.engine.table.Step(event); ok {
		return event
	}
	return failedStep(cause)
}

// failedStep is the step whose failure an error is of; "" for none.
func failedStep(err error) states.Event {
	var failed *StepError
	if errors.As(err, &failed) {
		return failed.Step
	}
	return ""
}

// describe puts on a record the transition that the record stands for. It fails with FailedPrecondition when event is illegal now.
func (s *sandbox) describe(r *journal.Record, event states.Event, cause error) error {
	from := s.state()
	to, ok := s.machine.Next(event)
	if !ok {
		return fmt.Errorf("sandbox %q is %s: it can't %s: %w", s.key.ID, from, event, errdefs.ErrFailedPrecondition)
	}
	r.From, r.Event, r.State, r.Nth = string(from), string(event), string(to), s.seq+1
	if r.At.IsZero() {
		r.At = time.Now()
	}
	r.After = s.since(r.At)
	if cause != nil {
		r.Error, r.Cause, r.Class = cause.Error(), string(failedStep(cause)), tracing.Class(cause)
	}
	return nil
}

// move records a transition that no step's result stands for, and fires it. The move is made even if the ledger can't take
// the record: it only ever leads towards undoing, which a restart would find out by itself.
func (s *sandbox) move(ctx context.Context, event states.Event, cause error) error {
	record := &journal.Record{Kind: journal.Moved, Goal: string(s.goal)}
	if err := s.describe(record, event, cause); err != nil {
		return err
	}
	s.record(ctx, record, nil)
	return s.fire(ctx, event, record.At, cause)
}

// run is what step sees of the sandbox now.
func (s *sandbox) run(step Step) *Run {
	f := step.Declaration()
	r := &Run{Key: s.key, Spec: s.req.Spec, step: f.Name, steps: make(map[states.Event]recorded, len(s.steps))}
	s.mu.Lock()
	for name, rec := range s.steps {
		r.steps[name] = rec.recorded
	}
	r.notes = r.steps[f.Name].notes
	s.mu.Unlock()
	r.note = func(ctx context.Context, data any, canWait bool) error { return s.append(ctx, f.noted(canWait), data) }
	return r
}

// noted is a record of what the step notes.
func (f Declaration) noted(canWait bool) *journal.Record {
	return &journal.Record{Kind: journal.Noted, Step: string(f.Name), Durable: f.Lasting, CanWait: canWait}
}

// pauseExited handles the end of the sandbox's process.
func (s *sandbox) pauseExited(exit Exit) {
	ctx := s.background()
	if s.state().Terminal() || !s.recordExit(ctx, exit) {
		return
	}
	defer s.announceExit()
	cause := exit.cause()
	if s.creation != nil {
		s.creation.fail(cause)
		return
	}
	if s.state() == states.Ready {
		if err := s.move(ctx, states.LosePause, cause); err != nil {
			s.log(ctx).WithError(err).Error("sandbox: lost pause")
		}
	}
}

// recordExit keeps how the process ended, the first time, also on record; it says whether it was.
func (s *sandbox) recordExit(ctx context.Context, exit Exit) bool {
	if !s.setExit(exit) {
		return false
	}
	s.record(ctx, &journal.Record{Kind: journal.Exited}, &exit)
	return true
}

// setExit keeps how the process ended, the first time; it says whether it was.
func (s *sandbox) setExit(exit Exit) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit != nil {
		return false
	}
	s.exit = &exit
	return true
}

// announceExit wakes who waits for the end of the process: when the state says so, too.
func (s *sandbox) announceExit() {
	s.exitOnce.Do(func() { close(s.exited) })
}

func (s *sandbox) exitStatus() (Exit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit == nil {
		return Exit{}, fmt.Errorf("sandbox %q never ran: %w", s.key.ID, errdefs.ErrNotFound)
	}
	return *s.exit, nil
}

// forget ends the sandbox: the ledger loses it first, then the engine.
func (s *sandbox) forget(ctx context.Context, event states.Event) error {
	if err := s.engine.journal.Forget(ctx, s.key); err != nil {
		return fmt.Errorf("failed to take sandbox %q off the ledger: %w", s.key.ID, err)
	}
	s.mu.Lock()
	s.lastErr = s.failure // no cleanup is pending any more
	s.mu.Unlock()
	if err := s.fire(ctx, event, time.Now(), nil); err != nil {
		return err
	}
	s.announceExit()
	s.engine.drop(s)
	return nil
}

// background is the context of what no caller waits for.
func (s *sandbox) background() context.Context {
	return namespaces.WithNamespace(context.Background(), s.key.Namespace)
}

func (s *sandbox) log(ctx context.Context) *log.Entry {
	return tracing.Log(ctx).WithField(tracing.LogSandbox, s.key.ID).WithField(tracing.LogPod, s.req.Pod)
}
