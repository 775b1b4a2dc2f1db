package plugin

import (
	"context"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

const (
	// checkParallel is how many adopted sandboxes are checked at a time.
	checkParallel = 2
	// pinInterval is the time between two looks at the pins of network namespaces.
	pinInterval = 10 * time.Second
)

// checkAdopted asks of all ready sandboxes, once, whether they are as they were made.
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
		log.G(ctx).Infof("podfsm: checked %d adopted sandboxes in %s", adopted, time.Since(begun).Round(time.Millisecond))
	}
}

// check checks one sandbox, and rests for as long as that took: what the pods want of the node comes first. The engine keeps and logs
// what is wrong.
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

// watchPins has the pins that are gone made again: a pin tells nobody when it goes.
func (c *Controller) watchPins(ctx context.Context) {
	ticker := time.NewTicker(pinInterval)
	defer ticker.Stop()
	var failed map[journal.Key]pinTries
	for {
		select {
		case <-ticker.C:
			failed = c.pinAgain(ctx, failed)
		case <-ctx.Done():
			return
		}
	}
}

// pinTries are the tries to pin one namespace again that have failed, and when the next one is due.
type pinTries struct {
	failed int
	next   time.Time
}

// pinAgain makes the missing pins of ready sandboxes again. A sandbox that is busy for longer is left to a later look. It returns what has
// failed, by sandbox: each is tried again, less and less often.
func (c *Controller) pinAgain(ctx context.Context, before map[journal.Key]pinTries) map[journal.Key]pinTries {
	failed := map[journal.Key]pinTries{}
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

// unpinned says whether the pin of a ready sandbox has to be made again.
func unpinned(view lifecycle.View) bool {
	pinned, ok := view.Step(CaptureNetNS).Result.(*NetNS)
	return ok && view.State == states.Ready && view.Spec.(*Spec).NetNSPath == "" && !isPinned(pinned)
}
