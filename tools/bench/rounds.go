package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/podfsm/podfsm/integration/harness"
)

// named is a runner with its column.
type named struct {
	name string
	runner
}

// daemons returns the sides without the floor, each as the runner of as.
func (b *bench) daemons(as func(*side) runner) []named {
	var all []named
	for _, s := range b.sides {
		all = append(all, named{s.name, as(s)})
	}
	return all
}

// all returns the floor and the sides.
func (b *bench) all() []named {
	return append([]named{{floorSide, b.floor}}, b.daemons(func(s *side) runner { return s })...)
}

// alone runs one pod at a time, each side in turn.
func alone(ctx context.Context, b *bench) error {
	for _, k := range kinds {
		err := b.spent(ctx, k, b.rounds, func() error { return b.oneByOne(ctx, b.all(), k, b.rounds, "alone") })
		if err != nil {
			return err
		}
	}
	return nil
}

// stockPods runs pods of containerd's own handler on the daemons that have it: podfsm must not slow
// them down.
func stockPods(ctx context.Context, b *bench) error {
	var with []*side
	var runners []named
	for _, s := range b.sides {
		if s.name != crioSide {
			stock := &side{name: s.name, handler: harness.StockHandler, node: s.node}
			with, runners = append(with, stock), append(runners, named{s.name, stock})
		}
	}
	for _, k := range kinds {
		if err := b.oneByOne(ctx, runners, k, b.rounds, stockHandlers); err != nil {
			return err
		}
		err := inTurns(b.rounds, with, func(round int, s *side) error {
			took, err := s.createContainer(ctx, k)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			b.results.add(metric("CreateContainer, "+stockHandlers, k), s.name, round, took)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// createContainer measures the first CreateContainer in a pod.
func (s *side) createContainer(ctx context.Context, k kind) (float64, error) {
	c := s.newPod(k)
	if _, err := c.start(ctx); err != nil {
		return 0, err
	}
	took, err := timed(func() error {
		_, err := c.pod.CreateContainer(ctx, "busybox")
		return err
	})
	if err != nil {
		return 0, err
	}
	return took, c.pod.StopAndRemove(ctx)
}

// inParallel runs many pods at a time, each side in turn.
func inParallel(ctx context.Context, b *bench) error {
	for _, pods := range b.parallel {
		for _, k := range kinds {
			if err := b.atATime(ctx, b.all(), k, pods, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// oneByOne runs pods one after the other and records their durations.
func (b *bench) oneByOne(ctx context.Context, runners []named, k kind, rounds int, how string) error {
	return inTurns(rounds, runners, func(round int, r named) error {
		t, err := cycle(ctx, r, k)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		b.file(k, how, r.name, round, t)
		return nil
	})
}

// atATime runs pods in bursts, and records the durations of the pods and the bursts. The suffix is
// a part of the names of the rows.
func (b *bench) atATime(ctx context.Context, runners []named, k kind, pods int, suffix string) error {
	how := fmt.Sprintf("%d at a time%s", pods, suffix)
	return inTurns(b.bursts(pods), runners, func(round int, r named) error {
		burst, err := crowd(ctx, r, k, pods)
		if err != nil {
			return fmt.Errorf("%s, %s: %w", r.name, how, err)
		}
		b.results.add(metric(startedPerSecond+", "+how, k), r.name, round, float64(pods)/burst.wall.start)
		b.results.add(metric(stoppedPerSecond+", "+how, k), r.name, round, float64(pods)/burst.wall.stop)
		for _, t := range burst.each {
			b.file(k, how, r.name, round, t)
		}
		return nil
	})
}

// bursts returns the number of bursts for a number of pods: out of 20 rounds, 8 of 8 pods, and 3 of
// 32.
func (b *bench) bursts(pods int) int { return b.fewer(max(15, min(40, 320/pods))) }

// file records the durations of one pod.
func (b *bench) file(k kind, how, side string, round int, t times) {
	b.results.add(metric("RunPodSandbox, "+how, k), side, round, t.start)
	b.results.add(metric("StopPodSandbox, "+how, k), side, round, t.stop)
	if side != floorSide {
		b.results.add(metric("RemovePodSandbox, "+how, k), side, round, t.remove)
	}
}

// withContainer starts pods with their first containers, alone and in bursts of the smallest size.
func withContainer(ctx context.Context, b *bench) error {
	runners := b.daemons(func(s *side) runner { return withContainers{s} })
	pods := b.parallel[0]
	for _, k := range kinds {
		err := inTurns(b.rounds, runners, func(round int, r named) error {
			t, err := cycle(ctx, r, k)
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			b.results.add(metric(withFirst+", alone", k), r.name, round, t.start)
			return nil
		})
		if err != nil {
			return err
		}
		how := fmt.Sprintf(", %d at a time", pods)
		err = inTurns(b.bursts(pods), runners, func(round int, r named) error {
			burst, err := crowd(ctx, r, k, pods)
			if err != nil {
				return fmt.Errorf("%s%s: %w", r.name, how, err)
			}
			b.results.add(metric(withFirstPerSecond+how, k), r.name, round, float64(pods)/burst.wall.start)
			for _, t := range burst.each {
				b.results.add(metric(withFirst+how, k), r.name, round, t.start)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// tracing is the kind of the rows about tracing.
var tracing = kind{name: "tracing"}

// traced measures the cost of tracing.
func traced(ctx context.Context, b *bench) (err error) {
	b.results.compare(tracing, "off", "sampled out", "on")
	modes := map[string]harness.Config{
		"off":         {},
		"sampled out": {Traces: true, Env: []string{"OTEL_TRACES_SAMPLER=traceidratio", "OTEL_TRACES_SAMPLER_ARG=0"}},
		"on":          {Traces: true},
	}
	var sides []*side
	defer func() {
		for _, s := range sides {
			err = errors.Join(err, s.node.Close(context.WithoutCancel(ctx)))
		}
	}()
	for _, mode := range slices.Sorted(maps.Keys(modes)) {
		s, err := newSide(ctx, mode, harness.PodfsmHandler, modes[mode])
		if err != nil {
			return err
		}
		sides = append(sides, s)
		if _, err := cycle(ctx, s, userNS); err != nil {
			return err
		}
	}
	return inTurns(b.fewer(75), sides, func(round int, s *side) error {
		t, err := cycle(ctx, s, userNS)
		if err != nil {
			return fmt.Errorf("tracing %s: %w", s.name, err)
		}
		b.results.add(metric("RunPodSandbox, podfsm, by tracing", tracing), s.name, round, t.start)
		b.results.add(metric("StopPodSandbox, podfsm, by tracing", tracing), s.name, round, t.stop)
		return nil
	})
}
