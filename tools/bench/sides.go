package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/podfsm/podfsm/integration/harness"
)

// The columns of the table.
const (
	floorSide      = "floor"
	unmodifiedSide = "unmodified containerd"
	crioSide       = "CRI-O"
	podfsmSide     = "podfsm"
)

// settings restore containerd's defaults for logging and garbage collection, which the harness
// changes for tests.
const settings = `debug.level = 'info'
[plugins.'io.containerd.gc.v1.scheduler']
  deletion_threshold = 0
  pause_threshold = 0.02
`

// kind is a kind of pods.
type kind struct {
	name    string
	userns  bool
	options []harness.PodOption
}

var (
	userNS = kind{name: "pods with user namespaces", userns: true}
	onHost = kind{name: "pods with the node's users", options: []harness.PodOption{harness.HostUsers()}}
	kinds  = []kind{userNS, onHost}
)

// title returns the name of a kind as a heading.
func (k kind) title() string { return strings.ToUpper(k.name[:1]) + k.name[1:] }

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
	if s.group, err = newCgroup(n); err == nil {
		err = s.group.addDaemon(n)
	}
	if err != nil {
		return nil, errors.Join(err, n.Close(context.WithoutCancel(ctx)))
	}
	return s, nil
}

// start starts a daemon per side, and makes the floor.
func (b *bench) start(ctx context.Context) error {
	for _, c := range []struct {
		name, handler string
		daemon        harness.Daemon
	}{
		{unmodifiedSide, harness.StockHandler, harness.Stock},
		{crioSide, harness.StockHandler, harness.CRIO},
		{podfsmSide, harness.PodfsmHandler, harness.Podfsm},
	} {
		s, err := newSide(ctx, c.name, c.handler, harness.Config{Daemon: c.daemon})
		if err != nil {
			return err
		}
		b.sides = append(b.sides, s)
	}
	f, err := newFloor(ctx)
	if err != nil {
		return err
	}
	b.floor = f
	return b.warmUp(ctx)
}

// warmUp runs a first pod, which makes the bridge and reads the programs into the page cache.
func (b *bench) warmUp(ctx context.Context) error {
	for _, r := range b.all() {
		for _, k := range kinds {
			if _, err := cycle(ctx, r, k); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
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
		progress("trying again: %v", err) // the removal of hundreds of pods can exceed the timeout of a node
		return harness.Sweep(ctx)
	}
	return nil
}
