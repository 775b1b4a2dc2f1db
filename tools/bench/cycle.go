package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podfsm/podfsm/integration/harness"
)

// times are the durations of one pod, in seconds.
type times struct{ start, stop, remove float64 }

// life is the life of a pod of a side or of the floor. Each method returns its duration.
type life interface {
	start(ctx context.Context) (float64, error)
	stop(ctx context.Context) (float64, error)
	remove(ctx context.Context) (float64, error)
}

// cri is a pod that is run over CRI.
type cri struct {
	side *side
	kind kind
	pod  *harness.Pod
}

func (s *side) newLife(_ context.Context, k kind) (life, error) { return s.newPod(k), nil }

func (s *side) newPod(k kind) *cri { return &cri{side: s, kind: k} }

func (c *cri) start(ctx context.Context) (took float64, err error) {
	config := c.side.node.PodConfig(fmt.Sprint("pod-", c.side.pods.Add(1)), c.kind.options...)
	return timed(func() (err error) {
		c.pod, err = c.side.node.RunPod(ctx, c.side.handler, config)
		return err
	})
}

func (c *cri) stop(ctx context.Context) (float64, error) {
	return timed(func() error { return c.pod.Stop(ctx) })
}

func (c *cri) remove(ctx context.Context) (float64, error) {
	return timed(func() error { return c.pod.Remove(ctx) })
}

// withContainers is a side whose pods have one container each. The container starts and ends with
// the pod.
type withContainers struct{ *side }

func (w withContainers) newLife(_ context.Context, k kind) (life, error) {
	return &criWithContainer{cri: w.newPod(k)}, nil
}

type criWithContainer struct {
	*cri
	container *harness.Container
}

func (c *criWithContainer) start(ctx context.Context) (float64, error) {
	return timed(func() (err error) {
		if _, err := c.cri.start(ctx); err != nil {
			return err
		}
		c.container, err = c.pod.StartContainer(ctx, "busybox")
		return err
	})
}

// stop has no grace period: CRI-O would wait for it to pass, because the container ignores SIGTERM.
func (c *criWithContainer) stop(ctx context.Context) (float64, error) {
	return timed(func() error {
		if err := c.container.Stop(ctx, 0); err != nil {
			return err
		}
		return c.pod.Stop(ctx)
	})
}

func timed(f func() error) (float64, error) {
	start := time.Now()
	err := f()
	return time.Since(start).Seconds(), err
}

// runner is a side or the floor.
type runner interface {
	newLife(ctx context.Context, k kind) (life, error)
}

// cycle runs, stops and removes one pod.
func cycle(ctx context.Context, r runner, k kind) (t times, err error) {
	l, err := r.newLife(ctx, k)
	if err != nil {
		return t, err
	}
	if t.start, err = l.start(ctx); err != nil {
		return t, err
	}
	if t.stop, err = l.stop(ctx); err != nil {
		return t, err
	}
	t.remove, err = l.remove(ctx)
	return t, err
}

// burst has the durations of many concurrent pods.
type burst struct {
	each []times
	wall times // from the first call to the last answer
}

// crowd runs, stops and removes many pods, each phase for all of them concurrently.
func crowd(ctx context.Context, r runner, k kind, pods int) (b burst, err error) {
	lives := make([]life, pods)
	for i := range lives {
		if lives[i], err = r.newLife(ctx, k); err != nil {
			return b, err
		}
	}
	b.each = make([]times, pods)
	phase := func(wall *float64, one func(life, *times) error) error {
		took, err := timed(func() error {
			all, _ := errgroup.WithContext(ctx)
			for i, l := range lives {
				all.Go(func() error { return one(l, &b.each[i]) })
			}
			return all.Wait()
		})
		*wall = took
		return err
	}
	if err := phase(&b.wall.start, func(l life, t *times) (err error) { t.start, err = l.start(ctx); return err }); err != nil {
		return b, err
	}
	if err := phase(&b.wall.stop, func(l life, t *times) (err error) { t.stop, err = l.stop(ctx); return err }); err != nil {
		return b, err
	}
	err = phase(&b.wall.remove, func(l life, t *times) (err error) { t.remove, err = l.remove(ctx); return err })
	return b, err
}

// inTurns calls f for each item, n times, and rotates the order each time.
func inTurns[T any](n int, all []T, f func(round int, one T) error) error {
	for round := range n {
		for i := range all {
			if err := f(round, all[(i+round)%len(all)]); err != nil {
				return err
			}
		}
	}
	return nil
}
