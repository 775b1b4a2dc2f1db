package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/podfsm/podfsm/integration/harness"
)

// The columns of the table.
const (
	floorSide      = "floor"
	unmodifiedSide = "unmodified containerd"
	stockSide      = "its handler in our binary"
	podfsmSide     = "podfsm"
)

// namespace is the containerd namespace of the CRI.
const namespace = "k8s.io"

// settings make the daemons log and collect garbage as containerd does by default: the harness has both set for tests.
const settings = `debug.level = 'info'
[plugins.'io.containerd.gc.v1.scheduler']
  deletion_threshold = 0
  pause_threshold = 0.02
`

// kind is what pods have in common.
type kind struct {
	name    string
	options []harness.PodOption
}

var (
	userNS = kind{"userns", nil}
	onHost = kind{"host users", []harness.PodOption{harness.HostUsers()}}
)

// side is a daemon and one of its handlers.
type side struct {
	name    string
	handler string
	node    *harness.Node
	group   cgroup
	pods    atomic.Int64
}

func newSide(ctx context.Context, name, handler string, config harness.Config) (*side, error) {
	config.TOML = settings + config.TOML
	n, err := harness.NewNode(ctx, config)
	if err != nil {
		return nil, err
	}
	s := &side{name: name, handler: handler, node: n}
	if s.group, err = newCgroup(n); err != nil {
		return nil, errors.Join(err, n.Close(context.WithoutCancel(ctx)))
	}
	return s, nil
}

// start starts a daemon a side, and one for the floor's model pods.
func (b *bench) start(ctx context.Context) error {
	for _, c := range []struct {
		name, handler string
		daemon        harness.Daemon
	}{
		{unmodifiedSide, harness.StockHandler, harness.Stock},
		{stockSide, harness.StockHandler, harness.Podfsm},
		{podfsmSide, harness.PodfsmHandler, harness.Podfsm},
	} {
		s, err := newSide(ctx, c.name, c.handler, harness.Config{Daemon: c.daemon})
		if err != nil {
			return err
		}
		b.sides = append(b.sides, s)
	}
	n, err := harness.NewNode(ctx, harness.Config{TOML: settings})
	if err != nil {
		return err
	}
	if b.floor, err = newFloor(ctx, n); err != nil {
		return errors.Join(err, n.Close(context.WithoutCancel(ctx)))
	}
	return b.warmUp(ctx, b.sides...)
}

// warmUp runs what the first pod alone has to pay for: the bridge, the programs in the page cache.
func (b *bench) warmUp(ctx context.Context, sides ...*side) error {
	for _, s := range sides {
		for _, k := range []kind{userNS, onHost} {
			if _, err := s.cycle(ctx, k); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	for _, k := range []kind{userNS, onHost} {
		if _, err := b.floor.cycle(ctx, k); err != nil {
			return fmt.Errorf("%s: %w", floorSide, err)
		}
	}
	return nil
}

func (b *bench) close(ctx context.Context) error {
	var errs []error
	for _, s := range b.sides {
		errs = append(errs, s.node.Close(ctx))
	}
	if b.floor != nil {
		errs = append(errs, b.floor.node.Close(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		progress("trying again: %v", err) // hundreds of pods can take longer than a node gives itself
		return harness.Sweep(ctx)
	}
	return nil
}
