package plugin

import (
	"context"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

const (
	// checkParallel is how many adopted sandboxes are checked at a time.
	checkParallel = 2
	// pinInterval is the time between two looks at the pins of network namespaces.
	pinInterval = 10 * time.Second
)

// checkAdopted runs the checks of each ready sandbox once.
func (c *Controller) checkAdopted(ctx context.Context) {
	begun, adopted := time.Now(), 0
	var group errgroup.Group
	group.SetLimit(checkParallel)
	for _, view := range c.engine.List() {
		if view.State == states.Ready {
			adopted++
			group.Go(func() error {
				c.check(ctx, view)
				return nil
			})
		}
	}
	_ = group.Wait()
	if adopted > 0 && ctx.Err() == nil {
		log.G(ctx).Infof("checked %d adopted sandboxes in %s", adopted, time.Since(begun).Round(time.Millisecond))
	}
}

// check checks one sandbox, and then pauses for as long as the check took, so that pods get the CPU
// first. The engine records and logs what is wrong.
func (c *Controller) check(ctx context.Context, view lifecycle.View) {
	if ctx.Err() != nil {
		return
	}
	begun := time.Now()
	_ = c.engine.Check(ctx, view.Key)
	rest := time.NewTimer(time.Since(begun))
	defer rest.Stop()
	select {
	case <-rest.C:
	case <-ctx.Done():
	}
}

// watchPins restores missing pins of network namespaces. It polls, because the kernel reports no
// event when a pin is unmounted.
func (c *Controller) watchPins(ctx context.Context) {
	ticker := time.NewTicker(pinInterval)
	defer ticker.Stop()
	var failed map[ledger.Key]pinTries
	for {
		select {
		case <-ticker.C:
			failed = c.pinAgain(ctx, failed)
		case <-ctx.Done():
			return
		}
	}
}

// pinTries counts the failed tries to pin one namespace again, and says when the next try is due.
type pinTries struct {
	failed int
	next   time.Time
}

// pinAgain restores the missing pins of ready sandboxes. It leaves a busy sandbox to the next call.
// It returns the failed tries by sandbox, which are repeated with backoff.
func (c *Controller) pinAgain(ctx context.Context, before map[ledger.Key]pinTries) map[ledger.Key]pinTries {
	failed := map[ledger.Key]pinTries{}
	for _, view := range c.engine.List() {
		if !unpinned(view) {
			continue
		}
		tries := before[view.Key]
		if !time.Now().Before(tries.next) {
			bounded, cancel := context.WithTimeout(ctx, probeTimeout)
			err := c.engine.Check(bounded, view.Key, CaptureNetNS)
			cancel()
			if err == nil {
				continue
			}
			tries.failed++
			tries.next = time.Now().Add(lifecycle.DefaultBackoff(tries.failed))
		}
		failed[view.Key] = tries
	}
	return failed
}

// unpinned reports whether a ready sandbox has lost its pin.
func unpinned(view lifecycle.View) bool {
	pinned, ok := view.Step(CaptureNetNS).Result.(*NetNS)
	return ok && view.State == states.Ready && view.Spec.(*Spec).NetNSPath == "" && !isPinned(pinned)
}
