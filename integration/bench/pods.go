package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/podfsm/podfsm/integration/harness"
)

// named is a runner with its column.
type named struct {
	name string
	runner
}

// all are the sides and the floor.
func (b *bench) all() []named {
	all := []named{{floorSide, b.floor}}
	for _, s := range b.sides {
		all = append(all, named{s.name, s})
	}
	return all
}

// alone runs one pod at a time, each side in turn.
func alone(ctx context.Context, b *bench) error {
	for _, k := range []kind{userNS, onHost} {
		err := b.spent(ctx, k, b.rounds, func() error {
			return inTurns(b.rounds, b.all(), func(round int, r named) error {
				t, err := cycle(ctx, r, k)
				if err != nil {
					return fmt.Errorf("%s: %w", r.name, err)
				}
				b.file(k, "alone", r.name, round, t)
				return nil
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// file adds what one pod took.
func (b *bench) file(k kind, how, side string, round int, t times) {
	b.results.add(metric("RunPodSandbox, "+how, k), side, round, t.start)
	b.results.add(metric("StopPodSandbox, "+how, k), side, round, t.stop)
	if side != floorSide {
		b.results.add(metric("RemovePodSandbox, "+how, k), side, round, t.remove)
	}
}

// inParallel runs many pods at a time, each side in turn.
func inParallel(ctx context.Context, b *bench) error {
	for _, pods := range b.parallel {
		how := fmt.Sprint(pods, " at a time")
		rounds := max(1, b.rounds*5/(2*pods)) // 6 of 8 pods, 1 of 32, out of 20
		if pods > 8 && b.rounds > 1 {
			rounds = max(2, rounds)
		}
		for _, k := range []kind{userNS, onHost} {
			err := inTurns(rounds, b.all(), func(round int, r named) error {
				burst, err := crowd(ctx, r, k, pods)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", r.name, how, err)
				}
				for _, t := range burst.each {
					b.file(k, how, r.name, round, t)
				}
				b.results.add(metric("pods started a second, "+how, k), r.name, round, float64(pods)/burst.wall.start)
				b.results.add(metric("pods stopped a second, "+how, k), r.name, round, float64(pods)/burst.wall.stop)
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// withContainer runs a pod and its first container.
func withContainer(ctx context.Context, b *bench) error {
	return inTurns(b.fewer(50), b.sides, func(round int, s *side) error {
		l := &cri{side: s, kind: userNS}
		took, err := timed(func() error {
			if _, err := l.start(ctx); err != nil {
				return err
			}
			_, err := l.pod.StartContainer(ctx, "busybox")
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		b.results.add(metric("a pod and its first container, alone", userNS), s.name, round, took)
		return l.pod.StopAndRemove(ctx)
	})
}

// crunScript runs Debian 12's crun 1.8, which makes no userns pods of containerd's, knows version 1.0 of the OCI runtime specification only,
// and nothing of cgroup v2 beside v1. The script costs both sides the same.
const crunScript = `#!/bin/sh
for arg; do
	[ -f "$arg/config.json" ] && sed -i 's/"ociVersion":"[0-9.]*"/"ociVersion":"1.0.2"/' "$arg/config.json"
done
exec unshare --mount sh -c 'umount /sys/fs/cgroup/unified 2>/dev/null; exec crun "$@"' crun "$@"
`

// withCrun runs pods on host users by another OCI runtime.
func withCrun(ctx context.Context, b *bench) error {
	dir, err := os.MkdirTemp("", "podfsm-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	script := filepath.Join(dir, "crun")
	if err := os.WriteFile(script, []byte(crunScript), 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]
  runc.options = {BinaryName = %[1]q, Root = %[2]q}
  podfsm.options = {BinaryName = %[1]q, Root = %[2]q}
`, script, filepath.Join(dir, "root"))
	return b.extra(ctx, []extra{
		{unmodifiedSide, harness.StockHandler, harness.Config{Daemon: harness.Stock, TOML: config}},
		{podfsmSide, harness.PodfsmHandler, harness.Config{TOML: config}},
	}, func(sides []*side) error {
		return inTurns(b.fewer(50), sides, func(round int, s *side) error {
			t, err := cycle(ctx, s, onHost)
			if err != nil {
				return fmt.Errorf("%s with crun: %w", s.name, err)
			}
			b.file(onHost, "by crun, alone", s.name, round, t)
			return nil
		})
	})
}

// extra is a daemon for one section.
type extra struct {
	name, handler string
	config        harness.Config
}

// extra starts daemons, runs f, and ends them.
func (b *bench) extra(ctx context.Context, extras []extra, f func([]*side) error) (err error) {
	var sides []*side
	defer func() {
		for _, s := range sides {
			if closeErr := s.node.Close(context.WithoutCancel(ctx)); err == nil {
				err = closeErr
			}
		}
	}()
	for _, e := range extras {
		s, err := newSide(ctx, e.name, e.handler, e.config)
		if err != nil {
			return err
		}
		sides = append(sides, s)
		if _, err := s.cycle(ctx, onHost); err != nil {
			return err
		}
	}
	return f(sides)
}

// traced compares what tracing costs.
func traced(ctx context.Context, b *bench) error {
	modes := map[string]harness.Config{
		"off":         {},
		"sampled out": {Traces: true, Env: []string{"OTEL_TRACES_SAMPLER=traceidratio", "OTEL_TRACES_SAMPLER_ARG=0"}},
		"on":          {Traces: true},
	}
	var extras []extra
	for _, mode := range slices.Sorted(maps.Keys(modes)) {
		extras = append(extras, extra{mode, harness.PodfsmHandler, modes[mode]})
	}
	return b.extra(ctx, extras, func(sides []*side) error {
		return inTurns(b.fewer(75), sides, func(round int, s *side) error {
			t, err := cycle(ctx, s, userNS)
			if err != nil {
				return fmt.Errorf("tracing %s: %w", s.name, err)
			}
			b.results.add(metric(tracingStart, userNS), s.name, round, t.start)
			b.results.add(metric(tracingStop, userNS), s.name, round, t.stop)
			return nil
		})
	})
}
