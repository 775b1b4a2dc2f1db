package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/podfsm/podfsm/snapshot/remapping"
)

// series is the cost of a method for one of its pods, by round.
type series struct {
	name  string
	costs []cost
}

// measure measures all methods on an image in a directory, one after the other, in several rounds.
func measure(ctx context.Context, dir string, img image, rounds int) (all []series, err error) {
	s, err := newSite(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	err = s.with(remapping.IDMap, func(sn *remapping.Snapshotter) error {
		if err := empty(ctx, sn); err != nil {
			return err
		}
		return img.unpack(ctx, sn, s.merge)
	})
	if err != nil {
		return nil, err
	}
	for _, m := range methods {
		for _, pod := range m.pods {
			all = append(all, series{name: m.name + pod})
		}
	}
	for round := range rounds {
		next := 0
		for _, m := range methods {
			costs, err := m.measure(ctx, s)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", m.name, err)
			}
			for _, c := range costs {
				fmt.Printf("%s, round %d/%d, %s: %s\n", img.name, round+1, rounds, all[next].name, seconds(c.wall))
				all[next].costs = append(all[next].costs, c)
				next++
			}
		}
	}
	return all, nil
}

// empty makes a layer without files for the warm-up.
func empty(ctx context.Context, sn *remapping.Snapshotter) error {
	key := layerKey(0) + "-empty"
	if _, err := sn.Prepare(ctx, key+"-active", ""); err != nil {
		return err
	}
	return sn.Commit(ctx, key, key+"-active")
}

func (s series) wall() time.Duration {
	return median(s.costs, func(c cost) time.Duration { return c.wall })
}
func (s series) cpu() time.Duration {
	return median(s.costs, func(c cost) time.Duration { return c.cpu })
}

func median(costs []cost, of func(cost) time.Duration) time.Duration {
	var sorted []time.Duration
	for _, c := range costs {
		sorted = append(sorted, of(c))
	}
	slices.Sort(sorted)
	return sorted[len(sorted)/2]
}

func (s series) best() time.Duration {
	return slices.MinFunc(s.costs, func(a, b cost) int { return int(a.wall - b.wall) }).wall
}
