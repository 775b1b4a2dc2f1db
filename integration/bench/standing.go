package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fillers are how many pods are started at a time where nobody measures that.
const fillers = 8

// crowdOf is a side with pods that stand.
type crowdOf struct {
	*side
	lives []*cri
}

// standing looks at daemons with more and more pods. The pods end with their nodes.
func standing(ctx context.Context, b *bench) error {
	crowds := make([]*crowdOf, len(b.sides))
	for i, s := range b.sides {
		crowds[i] = &crowdOf{side: s}
	}
	if err := b.restarts(ctx, crowds, 0); err != nil {
		return err
	}
	for i, pods := range b.standing {
		for _, c := range crowds {
			if err := c.fill(ctx, pods); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if err := b.hold(ctx, c, pods); err != nil {
				return err
			}
		}
		progress("  %d pods stand on each side, load %s", pods, loadAverage())
		if i == 0 {
			continue
		}
		if err := b.lists(ctx, crowds, pods); err != nil {
			return err
		}
		if err := b.restarts(ctx, crowds, pods); err != nil {
			return err
		}
	}
	b.slopes(b.standing[0], b.standing[len(b.standing)-1])
	return nil
}

// fill starts pods until there are so many.
func (c *crowdOf) fill(ctx context.Context, pods int) error {
	var all errgroup.Group
	all.SetLimit(fillers)
	for range pods - len(c.lives) {
		l := &cri{side: c.side, kind: userNS}
		c.lives = append(c.lives, l)
		all.Go(func() error {
			_, err := l.start(ctx)
			return err
		})
	}
	return all.Wait()
}

// hold files what a daemon holds.
func (b *bench) hold(ctx context.Context, c *crowdOf, pods int) error {
	held, err := c.node.Memory(ctx)
	if err != nil {
		return err
	}
	rss, err := residentBytes(c.node.Pid())
	if err != nil {
		return err
	}
	with := fmt.Sprintf(" with %d pods", pods)
	b.results.add(metric(heapBytes+with, userNS), c.name, 0, float64(held.Heap))
	b.results.add(metric(rssBytes+with, userNS), c.name, 0, rss)
	b.results.add(metric(goroutines+with, userNS), c.name, 0, float64(held.Goroutines))
	b.results.add(metric(descriptors+with, userNS), c.name, 0, float64(held.Files))
	return nil
}

// slopes files what a daemon holds for a sandbox: the difference between few pods and many, by their number.
func (b *bench) slopes(few, many int) {
	if few == many {
		return
	}
	for _, what := range []string{heapBytes, rssBytes, goroutines, descriptors} {
		for _, s := range b.sides {
			first := b.results.p50(metric(fmt.Sprintf("%s with %d pods", what, few), userNS), s.name)
			last := b.results.p50(metric(fmt.Sprintf("%s with %d pods", what, many), userNS), s.name)
			b.results.add(metric(what+" a sandbox", userNS), s.name, 0, (last-first)/float64(many-few))
		}
	}
}

// residentBytes are the memory of a process (proc_pid_status(5)).
func residentBytes(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, found := strings.Cut(string(text), "\nVmRSS:")
	if !found {
		return 0, errors.New("the kernel doesn't tell the memory of a process")
	}
	kib, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	return kib * 1024, err
}

// lists measures how long the kubelet waits for an answer about pods.
func (b *bench) lists(ctx context.Context, crowds []*crowdOf, pods int) error {
	with := fmt.Sprintf(" with %d pods", pods)
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
		b.results.add(metric("ListPodSandbox"+with, userNS), c.name, round, took)
		took, err = timed(func() error {
			_, err := c.lives[round%len(c.lives)].pod.Status(ctx)
			return err
		})
		b.results.add(metric("PodSandboxStatus"+with, userNS), c.name, round, took)
		return err
	})
}

// restarts measures how long a daemon takes from its start to its first answer.
func (b *bench) restarts(ctx context.Context, crowds []*crowdOf, pods int) error {
	return inTurns(b.fewer(25), crowds, func(round int, c *crowdOf) error {
		if err := c.node.Stop(ctx); err != nil {
			return err
		}
		took, err := timed(func() error { return c.node.Start(ctx) })
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		b.results.add(metric(fmt.Sprintf("restart with %d pods", pods), userNS), c.name, round, took)
		return nil
	})
}
