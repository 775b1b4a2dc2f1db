package plugin

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/plugin"

	"github.com/podfsm/podfsm/lifecycle"
)

// quietTime is the longest that background work waits for containerd's CRI service to serve.
const quietTime = time.Minute

// background is what the controller does for no caller: the cleanups that the last run left, a CNI CHECK of each adopted sandbox, an
// examination of the node, and from then on a look at the pins of network namespaces. The work waits until containerd has taken up its own pods, for at most [quietTime]. Meanwhile it would take
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
		if !b.wait(ctx) {
			return
		}
		b.work.Go(func() { protected("the examination of the node", func() { c.examineAtStart(ctx) }) })
		if c.engine == nil {
			return
		}
		b.release()
		b.work.Go(func() { protected("the watch over network namespaces", func() { c.watchPins(ctx) }) })
		protected("the checks of adopted sandboxes", func() { c.checkAdopted(ctx) })
	})
}

// wait returns false if the controller is closed before the wait is over.
func (b *background) wait(ctx context.Context) bool {
	longest := time.NewTimer(quietTime)
	defer longest.Stop()
	select {
	case <-b.quiet:
		return true
	case <-longest.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// protected logs a panic of work that has no caller to return it to.
func protected(what string, do func()) {
	if err := lifecycle.Protect(func() error { do(); return nil }); err != nil {
		log.L.WithError(err).Errorf("podfsm: %s ended", what)
	}
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
