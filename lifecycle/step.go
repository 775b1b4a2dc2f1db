package lifecycle

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Declaration describes a step. It is fixed when the engine is made.
type Declaration struct {
	// Step is the source of the table and of the documentation. [Engine.Demand] does a step on
	// demand for a ready sandbox. The Do of such a step is idempotent, and the sandbox's queue
	// waits for it.
	states.Step
	// Holds are the steps whose resources this step's resources may use. They are undone after this
	// step: a process holds its ids and its rootfs.
	Holds []states.Event
	// AtStop says that the step is undone when the sandbox stops, not only when it is removed.
	AtStop bool
	// Lasting says that the step makes something that outlives a reboot. If Reserve returns a
	// plan, the step's records outlive a reboot, too. They do so from the first [Run.Announce] on;
	// without one, from the end of Do on. So Do calls Announce before it makes such a thing.
	Lasting bool
	// Foreign says that the undo depends on programs that are not podfsm's. Such a program may
	// never come back. So after a reboot, when nothing of the sandbox is left in the kernel, an
	// undo that keeps failing is written off. An operator may write it off at any time.
	Foreign bool
	// Deadline bounds Reserve and Do, UndoDeadline bounds Undo and End.
	Deadline, UndoDeadline time.Duration
}

// Step makes, undoes and finds one resource of a sandbox. The engine calls a step for many
// sandboxes at once, but for one sandbox only one call at a time.
type Step interface {
	Declaration() Declaration
	// Reserve returns the plan: what Do will act on. It changes nothing on the host. It may reserve
	// in this process what other sandboxes must not take, and Undo releases that. The plan is on
	// record before Do is called. Undo gets it as [Run.Plan], also in another process after a
	// crash. The plan is nil if the sandbox's id suffices and nothing is reserved.
	Reserve(ctx context.Context, r *Run) (plan any, err error)
	// Do makes the resource. It returns [Skipped] if this sandbox doesn't need it.
	Do(ctx context.Context, r *Run) (result any, err error)
	// Undo removes what Do made, or may have made in part. It is idempotent: if nothing is there,
	// it succeeds.
	Undo(ctx context.Context, r *Run) error
	// Probe says whether anything of the step exists on this host. The engine calls it after the
	// undo of a step of an earlier daemon.
	Probe(ctx context.Context, r *Run) (bool, error)
}

// InUse marks an error of an Undo: a process may still use the step's resource, so the undo is
// never written off.
type InUse struct{ error }

// StillInUse marks err as an [InUse] error; nil stays nil.
func StillInUse(err error) error {
	if err == nil {
		return nil
	}
	return InUse{err}
}

// Unwrap returns the marked error.
func (e InUse) Unwrap() error { return e.error }

// Ender is the step that starts pause, the process that keeps the sandbox alive.
type Ender interface {
	Step
	// End ends the process and returns its exit. It is idempotent.
	End(ctx context.Context, r *Run) (Exit, error)
	// Exited returns the exit of a process that an earlier daemon started; nil while the process
	// runs. From then on, its exit is reported like that of a process of this daemon.
	Exited(ctx context.Context, r *Run) (*Exit, error)
}

// Checker is a step that can check what it made. The sandbox is ready, and a failed check doesn't
// change that.
type Checker interface {
	// Check checks the step's resource. It may repair what is missing of it, and changes nothing
	// else. It must return soon after ctx has ended, because requests for the sandbox wait for it.
	Check(ctx context.Context, r *Run) error
}

// Parted is a step of several parts. Each part can be written off.
type Parted interface {
	Step
	// WriteOff notes that the parts with a name are never undone, and returns them. It changes
	// nothing else. If no pending part has the name, it fails with NotFound, and the error lists
	// the pending parts.
	WriteOff(ctx context.Context, r *Run, name, reason string) (parts []string, err error)
}

// Skipped is the result of a step that had nothing to do.
type Skipped struct {
	Reason string
}

// StepError is the failure of a step of a sandbox, or of its undo. Its text adds nothing that
// changes from try to try: the kubelet aggregates events by their text.
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

// Exit is the exit of the pause process. Code is that of a shell: 128 + signal for a killed
// process.
type Exit struct {
	Code uint32
	At   time.Time
}

// cause returns the cause of the transition from Ready.
func (e Exit) cause() error {
	return fmt.Errorf("pause exited with code %d: %w", e.Code, errdefs.ErrUnavailable)
}

func init() {
	typeurl.Register(&Skipped{}, tracing.Name, "lifecycle.Skipped")
	typeurl.Register(&Exit{}, tracing.Name, "lifecycle.Exit")
}

// Run is what a step sees of a sandbox: the specification, and the records of the step and of the
// steps before it.
type Run struct {
	// Key is the sandbox's containerd namespace and id.
	Key ledger.Key
	// Spec is the specification of the sandbox. The step must not change it.
	Spec any

	step  states.Event
	steps map[states.Event]stepData // a copy
	note  func(ctx context.Context, data any, canWait bool) error

	mu    sync.Mutex
	notes []any
}

// stepData is what the ledger has of one step of one sandbox.
type stepData struct {
	plan   any
	notes  []any
	result any
}

// skipped says that the step had nothing to do.
func (r *stepData) skipped() bool {
	_, skipped := r.result.(*Skipped)
	return skipped
}

// Plan returns the plan of the step's own Reserve; nil before.
func (r *Run) Plan() any { return r.steps[r.step].plan }

// Result returns the result of a step's Do; nil if the step isn't done.
func (r *Run) Result(step states.Event) any { return r.steps[step].result }

// Notes returns the notes of the step itself, in order.
func (r *Run) Notes() []any {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.notes)
}

// Announce records what the step is about to do, for its Undo. When it returns nil, data, the plan
// and all notes before are on record: they outlive a kill, and for a lasting step a reboot, too. If
// it fails, the step must not do what it announced. Several goroutines may call it.
func (r *Run) Announce(ctx context.Context, data any) error { return r.keep(ctx, data, false) }

// Note records what the step has done, for its Undo. When it returns nil, data outlives a kill.
// data outlives a reboot once the step announces something else, or once its Do or Undo has ended
// or is pending. In an Undo, Note never fails: data that can't be recorded is kept in this process.
// Several goroutines may call it.
func (r *Run) Note(ctx context.Context, data any) error { return r.keep(ctx, data, true) }

func (r *Run) keep(ctx context.Context, data any, canWait bool) error {
	if err := r.note(ctx, data, canWait); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// As in the ledger: an undo that is retried often must not add ever more notes.
	r.notes = withLast(r.notes, data, func(note any) bool { return reflect.DeepEqual(note, data) })
	return nil
}
