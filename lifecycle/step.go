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

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// Declaration is all that is said of a step in one place. It is fixed when the engine is made.
type Declaration struct {
	// Step is what the table and the documentation are made from. A step on demand is done by [Engine.Demand] for a ready sandbox. Its Do
	// is idempotent, and holds up the sandbox's queue.
	states.Step
	// Holds are the steps whose resources this step's resources may use: they are not undone before this one is. A process
	// holds its ids and its rootfs.
	Holds []states.Event
	// AtStop says that the step is undone when the sandbox stops, not only when it is removed.
	AtStop bool
	// Lasting says that the step leaves something that outlives a reboot, so its records have to, too, where it has a plan. The plan
	// does so from what Do announces on, or from its end: Do has to announce what will last before it makes it ([Run.Announce]).
	Lasting bool
	// Foreign says that the undo depends on programs that are not podfsm's. After a reboot, when nothing is left of the sandbox in the
	// kernel, an undo that keeps failing is written off: the program may never be there again. An operator may write it off at any time.
	Foreign bool
	// Deadline bounds Reserve and Do, UndoDeadline bounds Undo and Stop.
	Deadline, UndoDeadline time.Duration
}

// Step is one resource of a sandbox: how it is made, undone and found again. The engine serialises the calls for one sandbox,
// but a step is called for many sandboxes at once.
type Step interface {
	Declaration() Declaration
	// Reserve returns the plan: what Do will act on. It changes nothing on the host, but may set aside in this process what no other
	// sandbox may take meanwhile; Undo gives that back. The plan is recorded before Do is called, and Undo gets it as [Run.Plan], also
	// in another process after a crash. A nil plan is fine where the sandbox's id says it all, and nothing is set aside.
	Reserve(ctx context.Context, r *Run) (plan any, err error)
	// Do acts. A step that has nothing to do for this sandbox returns [Skipped].
	Do(ctx context.Context, r *Run) (result any, err error)
	// Undo takes back what Do did or may have half done. It is idempotent: nothing there is success.
	Undo(ctx context.Context, r *Run) error
	// Probe says whether anything of the step exists on this host. It is asked after the undo of what an earlier daemon made.
	Probe(ctx context.Context, r *Run) (bool, error)
}

// InUse marks an error of an Undo: a process may still use what the step has made, so the undo is never written off.
type InUse struct{ error }

// StillInUse marks err as an [InUse] error; nil stays nil.
func StillInUse(err error) error {
	if err == nil {
		return nil
	}
	return InUse{err}
}

// Unwrap returns the error that is marked.
func (e InUse) Unwrap() error { return e.error }

// Ender is the step whose process is the sandbox's life: pause.
type Ender interface {
	Step
	// Stop ends the process and returns how it ended. It is idempotent.
	Stop(ctx context.Context, r *Run) (Exit, error)
	// Exited says how a process that was started by an earlier daemon has ended; nil while it runs, and then its end is told from now
	// on, as that of a process that this daemon has started.
	Exited(ctx context.Context, r *Run) (*Exit, error)
}

// Checker is a step that can tell whether what it made is still as it should be. Its sandbox is ready, and stays so whatever it says.
type Checker interface {
	// Check looks, and makes nothing but what is missing of the step's own. It must return soon after ctx has ended: requests for the sandbox
	// wait for it.
	Check(ctx context.Context, r *Run) error
}

// Parted is a step of several parts, each of which can be written off for itself.
type Parted interface {
	Step
	// WriteOff notes that a part is never undone, and returns which parts those are: name may fit several. It changes nothing else. It
	// fails with NotFound, naming those that there are, if none is pending that name fits.
	WriteOff(ctx context.Context, r *Run, name, reason string) (parts []string, err error)
}

// Skipped is the result of a step that had nothing to do.
type Skipped struct {
	Reason string
}

// Exit is how the pause process ended. Code follows wait(2)'s shell convention: 128 + signal for a killed process.
type Exit struct {
	Code uint32
	At   time.Time
}

// cause is why a sandbox whose process has ended isn't ready.
func (e Exit) cause() error {
	return fmt.Errorf("pause exited with code %d: %w", e.Code, errdefs.ErrUnavailable)
}

func init() {
	typeurl.Register(&Skipped{}, tracing.Name, "lifecycle.Skipped")
	typeurl.Register(&Exit{}, tracing.Name, "lifecycle.Exit")
}

// Run is what a step sees of a sandbox: its specification and what it and the steps before it have recorded.
type Run struct {
	// Key is the sandbox's containerd namespace and id.
	Key journal.Key
	// Spec is what the sandbox was created with; it must not be changed.
	Spec any

	step  states.Event
	steps map[states.Event]recorded // those done before, a copy
	note  func(ctx context.Context, data any, canWait bool) error

	mu    sync.Mutex
	notes []any
}

// recorded is what the ledger knows of one step of one sandbox.
type recorded struct {
	plan   any
	notes  []any
	result any
}

// skipped says that the step had nothing to do.
func (r *recorded) skipped() bool {
	_, skipped := r.result.(*Skipped)
	return skipped
}

// Plan is what the step's own Reserve returned; nil before.
func (r *Run) Plan() any { return r.steps[r.step].plan }

// Result is what a step's Do returned; nil when it isn't done.
func (r *Run) Result(step states.Event) any { return r.steps[step].result }

// Notes are what the step's own Do noted, in order.
func (r *Run) Notes() []any {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.notes)
}

// Announce records what the step is about to do, for its Undo. When it returns, that, the plan and all notes before it are there after a
// kill, and for a lasting step after a reboot, too. An error means that it may not be on record: it must then not be done. It may be
// called by several goroutines.
func (r *Run) Announce(ctx context.Context, data any) error { return r.keep(ctx, data, false) }

// Note records what the step has done, for its Undo. When it returns, that is there after a kill; after a reboot, too, once the step
// announces something else, or its Do or Undo has ended or is owed. An error means that it may not be on record; an Undo gets none, and
// what it notes is there as long as this process is. It may be called by several goroutines.
func (r *Run) Note(ctx context.Context, data any) error { return r.keep(ctx, data, true) }

func (r *Run) keep(ctx context.Context, data any, canWait bool) error {
	if err := r.note(ctx, data, canWait); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// As the ledger does: however often an owed undo is tried, what it notes of that is bounded.
	r.notes = withLast(r.notes, data, func(note any) bool { return reflect.DeepEqual(note, data) })
	return nil
}
