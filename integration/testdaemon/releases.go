package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// stepsFileEnv names a file with a word, which selects the steps of a release that marks pods.
//
//   - "early" marks a pod before its pause starts, "late" right before it is ready.
//   - "renamed" is "late" under another name.
//   - Any other word is this release.
const stepsFileEnv = "PODFSM_STEPS_FILE"

// ofRelease returns the steps of the release in a file.
func ofRelease(steps []lifecycle.Step, file string) []lifecycle.Step {
	word, err := os.ReadFile(file)
	if err != nil {
		panic(err)
	}
	mark := &markPod{dir: filepath.Dir(file), name: "mark_pod", state: "Marked"}
	at := func(name states.Event) int {
		return slices.IndexFunc(steps, func(s lifecycle.Step) bool { return s.Declaration().Name == name })
	}
	switch strings.TrimSpace(string(word)) {
	case "early":
		return slices.Insert(steps, at("start_pause"), lifecycle.Step(mark))
	case "late":
		return slices.Insert(steps, at("declare_ready"), lifecycle.Step(mark))
	case "renamed":
		mark.name, mark.state = "tag_pod", "Tagged"
		return slices.Insert(steps, at("declare_ready"), lifecycle.Step(mark))
	default:
		return steps
	}
}

// markPod leaves a file for each pod.
type markPod struct {
	dir   string
	name  states.Event
	state states.State
}

func (s *markPod) Declaration() lifecycle.Declaration {
	return lifecycle.Declaration{
		Step: states.Step{
			Name:    s.name,
			Done:    "The pod was marked.",
			State:   s.state,
			Meaning: "The pod has its mark.",
		},
		Holds:    []states.Event{"allocate_ids"},
		Deadline: time.Minute, UndoDeadline: time.Minute,
	}
}

func (s *markPod) file(r *lifecycle.Run) string { return filepath.Join(s.dir, r.Key.ID) }

func (s *markPod) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *markPod) Do(_ context.Context, r *lifecycle.Run) (any, error) {
	return nil, os.WriteFile(s.file(r), nil, 0o600)
}

func (s *markPod) Undo(_ context.Context, r *lifecycle.Run) error {
	if err := os.Remove(s.file(r)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *markPod) Probe(_ context.Context, r *lifecycle.Run) (bool, error) {
	_, err := os.Stat(s.file(r))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
