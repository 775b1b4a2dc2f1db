package lifecycle

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	"github.com/podfsm/podfsm/states"
)

// Another release of podfsm may have other steps, other data, or another order of the steps. This
// release takes the records of another release as they are and guesses nothing. A ready sandbox
// stays ready. This release can't undo a step that it doesn't know, so the cleanup is pending until
// the other release runs again.

// Unknown is recorded data of a type that this release doesn't know. It is written again unchanged.
type Unknown struct {
	Type  string
	value []byte
}

var _ typeurl.Any = (*Unknown)(nil)

// GetTypeUrl implements typeurl.Any.
func (u *Unknown) GetTypeUrl() string { return u.Type }

// GetValue implements typeurl.Any.
func (u *Unknown) GetValue() []byte { return u.value }

// unknownStep is a recorded step that this release can't undo.
type unknownStep struct {
	declared Declaration
	skipped  bool // the sandbox didn't need the step
	reason   error
}

// unknownUndoDeadline bounds the undo of an unknownStep, which does nothing.
const unknownUndoDeadline = time.Minute

func (s *unknownStep) Declaration() Declaration { return s.declared }

func (s *unknownStep) Reserve(context.Context, *Run) (any, error) { return nil, s.reason }

func (s *unknownStep) Do(context.Context, *Run) (any, error) { return nil, s.reason }

func (s *unknownStep) Undo(context.Context, *Run) error {
	if s.skipped {
		return nil
	}
	return s.reason
}

func (s *unknownStep) Probe(context.Context, *Run) (bool, error) { return false, nil }

// stepNamed returns the step that undoes the recorded step with a name.
func (s *sandbox) stepNamed(name states.Event) Step {
	rec := s.steps[name]
	known, ok := s.engine.step(name)
	if ok && rec.unknown == "" {
		return known
	}
	unknown := &unknownStep{skipped: rec.skipped(), reason: s.unknownTo(name)}
	if ok {
		unknown.declared = known.Declaration()
	} else {
		unknown.declared = Declaration{Step: states.Step{Name: name}, Holds: rec.holds, AtStop: rec.atStop, UndoDeadline: unknownUndoDeadline}
	}
	return unknown
}

// unknownTo returns the error for a recorded step that this release can't undo. The error names the
// release that can.
func (s *sandbox) unknownTo(name states.Event) error {
	rec := s.steps[name]
	writer, this := releaseName(rec.release), releaseName(s.engine.release)
	what := "doesn't know that step"
	if rec.unknown != "" {
		what = fmt.Sprintf("can't read its data of type %q", rec.unknown)
	}
	return fmt.Errorf("%s recorded the step, and %s %s; install %s again: %w", writer, this, what, writer, errdefs.ErrFailedPrecondition)
}

func releaseName(release string) string { return "podfsm " + cmp.Or(release, "of an unknown release") }

// begin makes a step the newest on record.
func (s *sandbox) begin(name states.Event) {
	s.begun = append(slices.DeleteFunc(s.begun, func(e states.Event) bool { return e == name }), name)
}

// order returns all steps of the sandbox and of this release. Steps on record keep the order in
// which they began. Each other step comes right behind the step that precedes it in this release.
// Steps are undone in the reverse order. The caller holds mu, is the queue's goroutine, or is alone.
func (s *sandbox) order() []states.Event {
	order := slices.Clone(s.begun)
	after := 0 // the place of the next step that isn't on record
	for _, name := range s.engine.table.Steps() {
		at := slices.Index(order, name)
		if at < 0 {
			order, at = slices.Insert(order, after, name), after
		}
		after = at + 1
	}
	return s.holdersLast(order)
}

// holdersLast moves each step behind the steps that it holds. If records were lost, the recorded
// order may differ.
func (s *sandbox) holdersLast(order []states.Event) []states.Event {
	for range order { // each pass moves at least one step to its place
		for i, name := range order {
			last := i
			for _, held := range s.holds(name) {
				last = max(last, slices.Index(order, held))
			}
			if last > i {
				order = slices.Insert(slices.Delete(order, i, i+1), last, name)
				break
			}
		}
	}
	return order
}

// holds returns the steps that a step holds: by this release's declaration, or by the record of
// another release.
func (s *sandbox) holds(name states.Event) []states.Event {
	if known, ok := s.engine.step(name); ok {
		return known.Declaration().Holds
	}
	if rec, ok := s.steps[name]; ok {
		return rec.holds
	}
	return nil
}
