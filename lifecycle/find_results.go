package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// Finder is a step that can find its result on the host if its records are missing.
type Finder interface {
	// Find returns what Do returned for a sandbox that was ready. Find proves that what it finds is the sandbox's, and
	// changes nothing. r has the results of the steps before it. It fails with NotFound if there is nothing, or no proof.
	Find(ctx context.Context, r *Run) (result any, err error)
}

const (
	// findParallel is how many sandboxes recovery looks for on the host at a time.
	findParallel = 16
	// findTimeout bounds all looks of one restart, and lookTimeout each one.
	findTimeout = 2 * lookTimeout
)

// findAll looks on the host for the sandboxes that may run although their records are missing.
func findAll(ctx context.Context, all []*sandbox) {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	var group sync.WaitGroup
	defer group.Wait()
	free := make(chan struct{}, findParallel)
	for _, s := range all {
		if !s.evidence().mayLive() {
			continue
		}
		free <- struct{}{}
		group.Go(func() {
			defer func() { <-free }()
			s.find(ctx)
		})
	}
}

// findAgain is the wait after a look that failed without an answer.
const findAgain = 100 * time.Millisecond

// find keeps the results of all steps that lead to Ready, if the host shows all of them. It retries a look that fails
// without an answer.
func (s *sandbox) find(ctx context.Context) {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, s.key.Namespace), lookTimeout)
	defer cancel()
	for {
		var found map[states.Event]any
		err := Protect(func() (err error) { found, err = s.findSteps(ctx); return err })
		entry := s.log(ctx).WithError(err)
		switch {
		case err == nil:
			s.findings.found = found
			s.log(ctx).Info("records are lost, sandbox found on the host")
			return
		case errdefs.IsNotFound(err):
			entry.Warn("records are lost, sandbox not found on the host")
			return
		}
		select {
		case <-time.After(findAgain):
		case <-ctx.Done():
			s.findings.unsure = err
			entry.Error("records are lost, cannot determine whether the sandbox is running")
			return
		}
	}
}

// findSteps returns the results of all steps that lead to Ready, and of the steps on demand that were done.
func (s *sandbox) findSteps(ctx context.Context) (map[states.Event]any, error) {
	found := map[states.Event]any{}
	for _, step := range s.engine.steps {
		d := step.Declaration()
		result, err := s.findStep(ctx, step, found)
		if d.OnDemand && errdefs.IsNotFound(err) {
			continue // no caller demanded the step
		}
		if err != nil {
			return nil, fmt.Errorf("failed to find what step %s made: %w", d.Name, err)
		}
		found[d.Name] = result
	}
	return found, nil
}

func (s *sandbox) findStep(ctx context.Context, step Step, found map[states.Event]any) (any, error) {
	switch rec := s.steps[step.Declaration().Name]; {
	case rec.status == StepDone, rec.status == StepSkipped:
		return rec.result, nil
	case rec.unknown != "":
		return nil, fmt.Errorf("%w: %w", s.unknownTo(step.Declaration().Name), errdefs.ErrNotFound)
	case rec.status != StepPending && rec.status != StepRunning && !errors.Is(rec.err, errRestarted):
		return nil, fmt.Errorf("the step is %s on record: %w", rec.status, errdefs.ErrNotFound)
	}
	finder, ok := step.(Finder)
	if !ok {
		return nil, fmt.Errorf("the step can't search the host: %w", errdefs.ErrNotFound)
	}
	r := s.newRun(step)
	for name, result := range found {
		r.steps[name] = stepData{plan: r.steps[name].plan, notes: r.steps[name].notes, result: result}
	}
	return finder.Find(ctx, r)
}

// rebuild puts the found results on record, as the creation path would have. The record that the sandbox is ready comes
// first, and once more at the end. If this daemon is killed between, the next one sees from the first that records are
// missing, and examines the host again.
func (s *sandbox) rebuild() error {
	path := s.engine.table.Path()
	last := path[len(path)-1]
	if err := s.assumeDone(last, stepState{}); err != nil {
		return err
	}
	for _, step := range s.engine.steps {
		if step.Declaration().Name == last {
			continue
		}
		if err := s.rebuildStep(step); err != nil {
			return err
		}
	}
	step, _ := s.engine.step(last)
	if err := s.rebuildStep(step); err != nil {
		return err
	}
	s.findings.onlyLasting, s.findings.whole = false, true
	return nil
}

func (s *sandbox) rebuildStep(step Step) error {
	d := step.Declaration()
	if _, ok := s.findings.found[d.Name]; !ok {
		return nil
	}
	intent, known := s.engine.intent(d), *s.steps[d.Name]
	intent.At, intent.Release = known.started, known.release
	if err := s.assume(intent, known.plan); err != nil {
		return err
	}
	return s.assumeDone(d.Name, known)
}

// assumeDone records a step as done with the found result, and the transition of a step of the creation path. known is
// what was on record of the step.
func (s *sandbox) assumeDone(name states.Event, known stepState) error {
	done := &ledger.Record{Kind: ledger.Done, Step: string(name), At: known.ended, Release: known.release}
	if i := slices.Index(s.engine.table.Path(), name); i >= 0 {
		through := s.engine.table.PathStates()
		done.From, done.Event, done.State = string(through[i]), string(name), string(through[i+1])
	}
	return s.assume(done, s.findings.found[name])
}
