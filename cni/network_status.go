package cni

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"

	"github.com/podfsm/podfsm/tracing"
)

const (
	// statusTimeout bounds the STATUS of all plugins of one network together.
	statusTimeout = 10 * time.Second
	// statusAge is how long an answer counts: about as long as containerd's answer about its own
	// network.
	statusAge = 5 * time.Second
)

// answers are the answers of networks to STATUS. They are safe for concurrent use.
type answers struct {
	asking singleflight.Group

	mu    sync.Mutex
	known map[string]answer // by the key of the question
}

type answer struct {
	at  time.Time
	err error
}

// Status asks the plugins of networks whether they accept pods now (CNI specification 1.1, STATUS).
// Networks of an older version are skipped. An answer, also a failure, counts for 5 seconds, and
// concurrent callers share one.
//
// Errors: Unavailable, naming the network and the plugin; FailedPrecondition when a plugin is
// missing; the cause of ctx.
func (d *Driver) Status(ctx context.Context, config Config, networks []Network) error {
	for _, network := range networks {
		key := pathOf(config.BinDirs) + "\x00" + string(network.Conflist)
		if err := d.answers.get(ctx, key, func() error { return d.status(ctx, config, network) }); err != nil {
			return err
		}
	}
	return nil
}

// get returns the known answer, or asks and waits for the answer as long as ctx lasts.
func (a *answers) get(ctx context.Context, key string, ask func() error) error {
	if known, ok := a.fresh(key); ok {
		return known.err
	}
	asked := a.asking.DoChan(key, func() (any, error) {
		if known, ok := a.fresh(key); ok {
			return nil, known.err // another caller has asked in between
		}
		err := ask()
		a.keep(key, err)
		return nil, err
	})
	select {
	case answered := <-asked:
		return answered.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (a *answers) fresh(key string) (answer, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	known, ok := a.known[key]
	return known, ok && time.Since(known.at) < statusAge
}

// keep stores an answer and drops expired ones.
func (a *answers) keep(key string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fresh := map[string]answer{key: {time.Now(), err}}
	for k, known := range a.known {
		if k != key && time.Since(known.at) < statusAge {
			fresh[k] = known
		}
	}
	a.known = fresh
}

// status asks one network. It outlives its caller, because other callers may wait for the same
// answer.
func (d *Driver) status(ctx context.Context, config Config, network Network) error {
	list, err := network.list()
	if err != nil {
		return fmt.Errorf("configuration of CNI network %q is invalid: %w: %w", network.Name, err, errdefs.ErrFailedPrecondition)
	}
	if known, err := since(list, "1.1.0"); err != nil || !known {
		return err
	}
	ctx, cancel := withTimeout(context.WithoutCancel(ctx), statusTimeout)
	defer cancel()
	for _, plugin := range list.Plugins {
		request := request{driver: d, list: list, plugin: plugin, binDirs: config.BinDirs}
		if err := request.run(ctx, tracing.SpanCNIStatus, "STATUS"); err != nil {
			if !errdefs.IsFailedPrecondition(err) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
			}
			return fmt.Errorf("CNI network %q accepts no pods now: %w", network.Name, err)
		}
	}
	return nil
}
