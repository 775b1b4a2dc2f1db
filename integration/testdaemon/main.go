// Command testdaemon is containerd-podfsm with fault points around everything that a step does. It is
// for tests only.
//
// The points are STEP.do.before, STEP.do.after, STEP.undo.before, STEP.undo.after, STEP.stop.before
// and STEP.stop.after, where STEP is the name of a step in the ledger. start_pause.exited.before and
// .after are around the look at a pause of an earlier daemon. Within them, STEP.do@POD.before and so
// on are the points of one pod by its name. Likewise, leases.create, sandboxes.create, .update and
// .delete, and snapshotter.prepare and .remove are around containerd's own stores, and remap.PHASE
// is in the making of a layer by podfsm's snapshotter (package remapping).
//
// The environment variable PODFSM_BOOT_ID_FILE names a file with the boot id, so that a test can
// simulate a reboot. PODFSM_STEPS_FILE names a file that selects the steps of another release
// (releases.go).
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd/command"

	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"
	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/integration/faults"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/plugin"
	"github.com/podfsm/podfsm/snapshot/remapping"
)

func main() {
	plugin.ChangeSteps(func(steps []lifecycle.Step) []lifecycle.Step {
		if file := os.Getenv(stepsFileEnv); file != "" {
			steps = ofRelease(steps, file)
		}
		for i, step := range steps {
			steps[i] = withFaults(step)
		}
		return steps
	})
	wrapStores()
	remapping.AtPhase = func(ctx context.Context, phase string) error { return faults.Hit(ctx, "remap."+phase) }
	if file := os.Getenv("PODFSM_BOOT_ID_FILE"); file != "" {
		ledger.BootIDFile = file
	}
	if err := command.App().Run(context.Background(), os.Args); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "testdaemon:", err)
		os.Exit(1)
	}
}

// withFaults adds the points to a step, and keeps its optional interfaces.
func withFaults(step lifecycle.Step) lifecycle.Step {
	faulty := &faultyStep{step}
	if ender, ok := step.(lifecycle.Ender); ok {
		return &faultyEnder{faulty, ender}
	}
	if checker, ok := step.(lifecycle.Checker); ok {
		return &faultyChecker{faulty, checker}
	}
	return faulty
}

type faultyStep struct{ lifecycle.Step }

func (s *faultyStep) Do(ctx context.Context, r *lifecycle.Run) (result any, err error) {
	err = s.between(ctx, r, "do", func() (err error) {
		result, err = s.Step.Do(ctx, r)
		return err
	})
	return result, err
}

func (s *faultyStep) Undo(ctx context.Context, r *lifecycle.Run) error {
	return s.between(ctx, r, "undo", func() error { return s.Step.Undo(ctx, r) })
}

// Find calls that of the step, if the step has it.
func (s *faultyStep) Find(ctx context.Context, r *lifecycle.Run) (any, error) {
	finder, ok := s.Step.(lifecycle.Finder)
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	return finder.Find(ctx, r)
}

// between runs act between the points before and after it, both those of all pods and, within them,
// those of one pod.
func (s *faultyStep) between(ctx context.Context, r *lifecycle.Run, what string, act func() error) error {
	point := string(s.Declaration().Name) + "." + what
	return between(ctx, point, func() error { return between(ctx, point+"@"+podName(r), act) })
}

// podName returns the name of the pod for which a step is called, "" if its specification is lost.
func podName(r *lifecycle.Run) string {
	spec, _ := r.Spec.(*records.Spec)
	if spec == nil {
		return ""
	}
	return spec.Config.GetMetadata().GetName()
}

type faultyEnder struct {
	*faultyStep
	ender lifecycle.Ender
}

func (s *faultyEnder) End(ctx context.Context, r *lifecycle.Run) (exit lifecycle.Exit, err error) {
	err = s.between(ctx, r, "stop", func() (err error) {
		exit, err = s.ender.End(ctx, r)
		return err
	})
	return exit, err
}

func (s *faultyEnder) Exited(ctx context.Context, r *lifecycle.Run) (exit *lifecycle.Exit, err error) {
	err = s.between(ctx, r, "exited", func() (err error) {
		exit, err = s.ender.Exited(ctx, r)
		return err
	})
	return exit, err
}

type faultyChecker struct {
	*faultyStep
	checker lifecycle.Checker
}

func (s *faultyChecker) Check(ctx context.Context, r *lifecycle.Run) error {
	return s.checker.Check(ctx, r)
}

// WriteOff is the step's own: the network's, which is the one that can be checked.
func (s *faultyChecker) WriteOff(ctx context.Context, r *lifecycle.Run, name, reason string) ([]string, error) {
	return s.checker.(lifecycle.Parted).WriteOff(ctx, r, name, reason)
}
