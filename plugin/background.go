package plugin

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/plugin"
)

// quietTime is the longest that background work waits for containerd's CRI service to serve.
const quietTime = time.Minute

// background is what the controller does for no caller: the cleanups that the last run left, a CNI CHECK of each adopted sandbox and an
// examination of the node. The work waits until containerd has taken up its own pods, for at most [quietTime]. Meanwhile it would take
// CPU from them, and a stock pod whose shim does not answer within 2 s at a restart is NotReady from then on
// (io.containerd.timeout.task.state in containerd's plugins/services/tasks).
type background struct {
	criLoaded bool          // containerd's CRI service says itself when it serves
	quiet     chan struct{} // closed when the wait is over
	end       func()        // closes quiet
	release   func()        // lets the engine begin its cleanups
	cancel    context.CancelFunc
	work      sync.WaitGroup
}

// startBackground begins the wait and, after it, the work.
func (c *Controller) startBackground() {
	b := &c.background
	b.quiet = make(chan struct{})
	b.end = sync.OnceFunc(func() { close(b.quiet) })
	var ctx context.Context
	ctx, b.cancel = context.WithCancel(context.Background())
	b.work.Go(func() {
		longest := time.NewTimer(quietTime)
		defer longest.Stop()
		select {
		case <-b.quiet:
		case <-longest.C:
		case <-ctx.Done():
			return
		}
		if c.engine != nil {
			b.release()
		}
		b.work.Go(func() { c.examineAtStart(ctx) })
		c.checkAdopted(ctx)
	})
}

// watching is the init context for containerd's CRI service, whose readiness ends the wait.
func (c *Controller) watching(ic *plugin.InitContext) *plugin.InitContext {
	watched := *ic
	watched.RegisterReadiness = func() func() {
		c.background.criLoaded = true
		ready := ic.RegisterReadiness()
		return func() {
			ready()
			c.background.end()
		}
	}
	return &watched
}

// loaded ends the wait where containerd has loaded all plugins and its CRI service is none of them.
func (b *background) loaded() {
	if !b.criLoaded {
		b.end()
	}
}

// close ends the work and waits for it.
func (b *background) close() {
	if b.cancel != nil {
		b.cancel()
	}
	b.work.Wait()
}
