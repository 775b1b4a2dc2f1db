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

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// keepTransitions bounds the transitions that a sandbox keeps: the first keepFirstTransitions,
// which show how all began, and the newest.
const (
	keepTransitions      = 64
	keepFirstTransitions = 16
)

// stepState is what the engine knows about one step of one sandbox: what the ledger has of the step, and how it went.
type stepState struct {
	stepData
	status         StepStatus
	touched        bool      // its intent is on record, so it may have acted
	undoing        time.Time // when its undo began, if that is on record
	release        string    // the release that recorded the step
	unknown        string    // the type of its data, if this release doesn't know it; "" for none
	holds          []states.Event
	atStop         bool      // by its intent, like holds
	operation      Operation // the try under way; "" for none
	operationSince time.Time
	started, ended time.Time
	err            error // of Do
	undoErr        error // of the last undo
	checkErr       error // of the last check
	failedTries    int   // failed undos
	pendingSince   time.Time
	interrupted    bool // the result of an earlier daemon's undo is not on record
}

// took returns the duration of the step's Do. It is 0 if it is unknown, or if the wall clock was
// set back between the two records.
func (r *stepState) took() time.Duration {
	if r.ended.IsZero() {
		return 0
	}
	return max(0, r.ended.Sub(r.started))
}

// sandbox is one sandbox and its queue. Only the goroutine that handles the queue writes the fields
// behind mu, except before the engine has the sandbox. mu makes them readable for other goroutines.
type sandbox struct {
	engine  *Engine
	key     ledger.Key
	req     Request
	machine *states.Machine
	exited  chan struct{} // closed when the process has ended, or never will run

	exitOnce sync.Once    // closes exited
	claim    atomic.Int32 // a Claim

	queue queue

	// Set before the engine has the sandbox.
	restored bool     // from the records of an earlier daemon
	findings findings // of a restored sandbox

	// Of the goroutine that handles the queue.
	creation   *creation // under way; nil for none
	ended      bool      // this daemon ended the process
	unattended bool      // a cleanup is under way, and no caller waits for it
	givingUp   *givingUp // the operator's write-off under way; nil for none

	mu          sync.Mutex
	timer       *time.Timer                 // the next try of the pending cleanup
	traceParent string                      // of the span under which the sandbox was created
	created     time.Time                   // by the wall clock, but after the other sandboxes of the pod; then constant
	entered     time.Time                   // when the sandbox entered its state
	steps       map[states.Event]*stepState // of this release, and on record
	begun       []states.Event              // the steps on record, in the order in which they began
	unread      []string                    // the records that this release doesn't know
	seq         uint64
	transitions []Transition
	tries       tries
	goal        states.State // of the stop under way or of the pending cleanup; "" for neither
	failedTries int          // of the pending cleanup
	failing     time.Time    // the first failure of the pending cleanup in this process
	nextTry     time.Time
	lastErr     error
	failure     error // the cause of the rollback
	exit        *Exit
	recovery    Recovery // of a restored sandbox
}

func newSandbox(e *Engine, key ledger.Key, req Request) *sandbox {
	now := time.Now()
	s := &sandbox{
		engine: e, key: key, req: req, machine: e.table.NewMachine(),
		exited:  make(chan struct{}),
		created: now.Round(0),
		entered: now,
		steps:   map[states.Event]*stepState{},
	}
	s.queue.handle, s.queue.left = s.logPanics, e.work.Done
	for _, name := range e.table.Steps() {
		s.steps[name] = &stepState{status: StepPending}
	}
	return s
}

// state returns the sandbox's current state.
func (s *sandbox) state() states.State { return s.machine.Current() }

// accept puts the sandbox on record.
func (s *sandbox) accept(ctx context.Context) error {
	return s.append(ctx, &ledger.Record{Kind: ledger.Begun, Durable: true, At: s.created}, s.req.Spec)
}

// unacceptTimeout bounds the wait for the ledger to forget a sandbox that was not accepted.
const unacceptTimeout = 5 * time.Second

// unaccept removes what a failed accept may have left on record.
func (s *sandbox) unaccept(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unacceptTimeout)
	defer cancel()
	s.logPanics(func() {
		if err := s.engine.ledger.Forget(ctx, s.key); err != nil {
			s.log(ctx).WithError(err).Warn("failed to forget refused sandbox, its record may stay until the next start")
		}
	})
}

// append writes one record with data to the ledger. It sets the record's release and time if they
// are missing. The time has a monotonic clock reading, by which durations within this process are
// measured.
func (s *sandbox) append(ctx context.Context, r *ledger.Record, data any) error {
	r.Key, r.Release, r.TraceParent = s.key, cmp.Or(r.Release, s.engine.release), tracing.Parent(ctx)
	if r.At.IsZero() {
		r.At = time.Now()
	}
	if data != nil {
		packed, err := ledger.Marshal(data)
		if err != nil {
			return fmt.Errorf("failed to pack the %s record of sandbox %q: %w", r.Kind, s.key.ID, err)
		}
		r.Data = packed
	}
	if err := s.engine.ledger.Append(ctx, r); err != nil {
		return fmt.Errorf("failed to write the %s record of sandbox %q to the ledger: %w", r.Kind, s.key.ID, err)
	}
	return nil
}

// appendOrLog writes one record as append does, but logs a failure and goes on: nothing in this
// process depends on the record.
func (s *sandbox) appendOrLog(ctx context.Context, r *ledger.Record, data any) {
	s.logPanics(func() {
		if err := s.append(ctx, r, data); err != nil {
			s.log(ctx).WithError(err).Warnf("failed to write record: %s", r.Kind)
		}
	})
}

// fire moves the state, keeps and logs the transition, and tells the observer. The record of the
// transition is written already. at is the record's time.
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

	s.logPanics(func() { s.logTransition(ctx, t) })
	if s.engine.observe != nil {
		s.logPanics(func() { s.engine.observe(s.view()) })
	}
	return nil
}

// keep adds a transition to the history, and gives it the next number unless it has one. The caller
// holds mu, or is alone.
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

// since returns how long the sandbox had been in its state at a time. It is 0 if the wall clock was
// set back between two daemons.
func (s *sandbox) since(at time.Time) time.Duration { return max(0, at.Sub(s.entered)) }

// logTransition logs a transition: at debug level, unless it has a cause that is not in the log yet.
func (s *sandbox) logTransition(ctx context.Context, t Transition) {
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
		entry.Errorf("transition %s", t.Event)
	case t.Event == states.LeaveCleanupPending, expected(t.Err):
		entry.Debugf("transition %s", t.Event)
	default:
		entry.Warnf("transition %s", t.Event)
	}
}

// secondsOf returns the duration of the step that a transition completes. For any other transition,
// it returns how long the sandbox was in the state before.
func (s *sandbox) secondsOf(t Transition) float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec, ok := s.steps[t.Event]; ok {
		return rec.took().Seconds()
	}
	return t.After.Seconds()
}

// stepOf returns the step that a transition completes, or the step whose failure led to it; "" for
// neither.
func (s *sandbox) stepOf(event states.Event, cause error) states.Event {
	if _, ok := s.engine.table.Step(event); ok {
		return event
	}
	return failedStep(cause)
}

// failedStep returns the step of a [StepError]; "" for any other error.
func failedStep(err error) states.Event {
	var failed *StepError
	if errors.As(err, &failed) {
		return failed.Step
	}
	return ""
}

// setTransition sets the transition that the record r stands for: from the current state, by event.
// It doesn't move the state; fire does. It fails with FailedPrecondition if the table doesn't allow
// event now.
func (s *sandbox) setTransition(r *ledger.Record, event states.Event, cause error) error {
	from := s.state()
	to, ok := s.machine.Next(event)
	if !ok {
		return fmt.Errorf("sandbox %q is %s, event %s is not allowed: %w", s.key.ID, from, event, errdefs.ErrFailedPrecondition)
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

// move records a transition that is not the result of a step, and fires it. It fires even if the
// record can't be written. Such a transition only leads to cleanup, and a restart decides on that
// without the record, too.
func (s *sandbox) move(ctx context.Context, event states.Event, cause error) error {
	record := &ledger.Record{Kind: ledger.Moved, Goal: string(s.goal)}
	if err := s.setTransition(record, event, cause); err != nil {
		return err
	}
	s.appendOrLog(ctx, record, nil)
	return s.fire(ctx, event, record.At, cause)
}

// newRun returns what a step sees of the sandbox.
func (s *sandbox) newRun(step Step) *Run {
	d := step.Declaration()
	r := &Run{Key: s.key, Spec: s.req.Spec, step: d.Name, steps: make(map[states.Event]stepData, len(s.steps))}
	s.mu.Lock()
	for name, rec := range s.steps {
		r.steps[name] = rec.stepData
	}
	r.notes = r.steps[d.Name].notes
	s.mu.Unlock()
	r.note = func(ctx context.Context, data any, canWait bool) error { return s.append(ctx, d.noted(canWait), data) }
	return r
}

// noted returns the record for a note of the step.
func (d Declaration) noted(canWait bool) *ledger.Record {
	return &ledger.Record{Kind: ledger.Noted, Step: string(d.Name), Durable: d.Lasting, CanWait: canWait}
}

// forget removes the sandbox from the ledger first, and then from the engine.
func (s *sandbox) forget(ctx context.Context, event states.Event) error {
	if err := s.engine.ledger.Forget(ctx, s.key); err != nil {
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

// background returns the context of work that no caller waits for.
func (s *sandbox) background() context.Context {
	return namespaces.WithNamespace(context.Background(), s.key.Namespace)
}

func (s *sandbox) log(ctx context.Context) *log.Entry {
	return tracing.Log(ctx).WithField(tracing.LogSandbox, s.key.ID).WithField(tracing.LogPod, s.req.Pod)
}
