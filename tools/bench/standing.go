package main

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/tools/page"
)

// fillers is the number of pods that are started or ended concurrently when that isn't measured.
const fillers = 8

// crowdOf is a side with pods that keep running.
type crowdOf struct {
	*side
	kind       kind
	containers int // per pod
	lives      []*cri
}

// standing measures daemons that have pods already. The pods with user namespaces come last and end
// with their nodes; the others stop at the second number.
func standing(ctx context.Context, b *bench) error {
	if err := b.stand(ctx, onHost, b.standing[:min(2, len(b.standing))]); err != nil {
		return err
	}
	for _, s := range b.sides {
		if err := s.empty(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return b.stand(ctx, userNS, b.standing)
}

// stand adds more and more pods to each side, and measures the effect.
func (b *bench) stand(ctx context.Context, k kind, numbers []int) error {
	crowds := make([]*crowdOf, len(b.sides))
	for i, s := range b.sides {
		crowds[i] = &crowdOf{side: s, kind: k}
	}
	for i, pods := range numbers {
		for _, c := range crowds {
			if err := c.fill(ctx, pods); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if err := b.resident(c, pods); err != nil {
				return err
			}
		}
		progress("  %d %s on each side, load %s", pods, k.name, page.Load())
		if i == 1 {
			if err := b.amidst(ctx, k, pods); err != nil {
				return err
			}
		}
		if i > 0 {
			if err := b.lists(ctx, crowds, pods); err != nil {
				return err
			}
		}
	}
	few, many := numbers[0], numbers[len(numbers)-1]
	b.memoryPerPod(k, few, many)
	return b.restarts(ctx, crowds, many)
}

// amidst starts and stops pods beside those that keep running.
func (b *bench) amidst(ctx context.Context, k kind, standing int) error {
	sides := b.daemons(func(s *side) runner { return s })
	with := withPods(standing)
	if err := b.oneByOne(ctx, sides, k, b.fewer(50), "alone"+with); err != nil {
		return err
	}
	return b.atATime(ctx, sides, k, b.parallel[0], with)
}

// withPods is the end of the name of a row about daemons that have pods already.
func withPods(pods int) string { return fmt.Sprintf(", with %d pods", pods) }

// fill starts pods with their containers up to this number.
func (c *crowdOf) fill(ctx context.Context, pods int) error {
	var all errgroup.Group
	all.SetLimit(fillers)
	for range pods - len(c.lives) {
		l := c.newPod(c.kind)
		c.lives = append(c.lives, l)
		all.Go(func() error {
			if _, err := l.start(ctx); err != nil {
				return err
			}
			for i := range c.containers {
				if _, err := l.pod.StartContainer(ctx, fmt.Sprint("container-", i)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return all.Wait()
}

// empty stops and removes all pods of a side.
func (s *side) empty(ctx context.Context) error {
	list, err := s.node.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var all errgroup.Group
	all.SetLimit(fillers)
	for _, pod := range list.GetItems() {
		all.Go(func() error { return s.node.FindPod(pod.GetId(), nil).StopAndRemove(ctx) })
	}
	return all.Wait()
}

// resident records the memory of a side.
func (b *bench) resident(c *crowdOf, pods int) error {
	daemon, all, err := c.node.Resident()
	if err != nil {
		return err
	}
	b.results.add(metric(residentMemory+withPods(pods), c.kind), c.name, 0, all)
	b.results.add(metric(residentOfDaemon+withPods(pods), c.kind), c.name, 0, daemon)
	return nil
}

// memoryPerPod records the growth of the memory of each side per pod.
func (b *bench) memoryPerPod(k kind, few, many int) {
	if few == many {
		return
	}
	for _, what := range []string{residentMemory, residentOfDaemon} {
		for _, s := range b.sides {
			first := b.results.p50(metric(what+withPods(few), k), s.name)
			last := b.results.p50(metric(what+withPods(many), k), s.name)
			b.results.add(metric(what+perPod, k), s.name, 0, (last-first)/float64(many-few))
		}
	}
}

// lists measures the kubelet's list calls.
func (b *bench) lists(ctx context.Context, crowds []*crowdOf, pods int) error {
	return inTurns(b.rounds*3, crowds, func(round int, c *crowdOf) error {
		took, err := timed(func() error {
			list, err := c.node.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
			if err == nil && len(list.GetItems()) != pods {
				err = fmt.Errorf("%s lists %d pods", c.name, len(list.GetItems()))
			}
			return err
		})
		if err != nil {
			return err
		}
		b.results.add(metric("ListPodSandbox"+withPods(pods), c.kind), c.name, round, took)
		took, err = timed(func() error {
			_, err := c.lives[round%len(c.lives)].pod.Status(ctx)
			return err
		})
		b.results.add(metric("PodSandboxStatus"+withPods(pods), c.kind), c.name, round, took)
		return err
	})
}

// restarts measures the time from the start of a daemon to its first answer.
func (b *bench) restarts(ctx context.Context, crowds []*crowdOf, pods int) error {
	return inTurns(b.fewer(15), crowds, func(round int, c *crowdOf) error {
		if err := c.node.Stop(ctx); err != nil {
			return err
		}
		took, err := timed(func() error { return c.node.Start(ctx) })
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		b.results.add(metric(fmt.Sprintf("restart with %d pods", pods), c.kind), c.name, round, took)
		list, err := c.node.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{
			Filter: &runtime.PodSandboxFilter{State: &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}},
		})
		if err == nil && len(list.GetItems()) != pods {
			err = fmt.Errorf("%s has %d ready pods after a restart", c.name, len(list.GetItems()))
		}
		return err
	})
}
