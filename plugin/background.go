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

// background is the work that no caller waits for. It completes the cleanups that the last run left,
// runs CNI CHECK for each adopted sandbox, and examines the node. Then it looks at the pins of
// network namespaces periodically. The work starts when containerd's CRI service serves, at the latest after
// [quietTime]. Earlier, it would compete with containerd for CPU: a stock pod whose shim does not
// answer within 2 s at a restart becomes NotReady (io.containerd.timeout.task.state in containerd's
// plugins/services/tasks).
type background struct {
	criLoaded bool          // containerd's CRI service is loaded and will report its readiness
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
		b.work.Go(func() { protected("examination of the node", func() { c.examineAtStart(ctx) }) })
		if c.engine == nil {
			return
		}
		b.release()
		b.work.Go(func() { protected("watch over network namespaces", func() { c.watchPins(ctx) }) })
		protected("check of adopted sandboxes", func() { c.checkAdopted(ctx) })
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

// protected runs do and logs a panic, since no caller waits for the error.
func protected(what string, do func()) {
	if err := lifecycle.Protect(func() error { do(); return nil }); err != nil {
		log.L.WithError(err).Errorf("background work failed: %s", what)
	}
}

// watching returns the init context for containerd's CRI service. The readiness of that service
// ends the wait.
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

// loaded ends the wait if all plugins are loaded and containerd's CRI service is not among them.
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
