package plugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	shims "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/plugins/services"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/history"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/snapshot/remapping"
	"github.com/podfsm/podfsm/userns"
)

// Controller is containerd's sandbox controller "podfsm". Its methods may be called by many goroutines.
type Controller struct {
	stock      *stockConfig
	limits     timeouts
	policies   policies
	lowest     uint32 // host id that a pod may be mapped to
	gc         bool   // of networks
	node       *node
	ledger     *journal.Ledger
	engine     *lifecycle.Engine
	ended      *ended
	meters     *meters
	remapper   remapper // podfsm's own snapshotter; nil where it is disabled
	publishing *relay[sandboxEvent]
	exchange   eventExchange // containerd's events
	tasks      podTasks
	doctor     *doctor.Doctor // of the node
	background background
	looks      looks
	drain      drain

	passing atomic.Uint64 // pods of other controllers that have passed the front

	refusalMu sync.Mutex
	refusal   error // why no sandbox can be run; nil when all is well
}

// initController makes the controller. It never fails: an error here would take the whole CRI down, so a controller that
// can't work refuses pods, with the reason.
func initController(ic *plugin.InitContext) (any, error) {
	c := &Controller{stock: &stockConfig{}}
	c.meters = newMeters(c)
	c.opened(func() error { return c.open(ic) })
	c.callDoctor(ic)
	c.startBackground()
	if c.refusal != nil {
		log.G(ic.Context).WithError(c.refusal).Error("podfsm: no pod of its handlers will be run")
	}
	if err := prometheus.Register(c.meters); err != nil {
		log.G(ic.Context).WithError(err).Warn("podfsm: there will be no metrics of it")
	}
	completeNRI(c.completePod) // before containerd's CRI service, which comes next, lets NRI plugins connect
	return c, nil
}

// opened opens the controller. When that fails, or panics, the controller has no engine and refuses pods: an engine that doesn't know all
// sandboxes would let containerd's service forget the others.
func (c *Controller) opened(open func() error) {
	err := lifecycle.Protect(open)
	if err == nil {
		return
	}
	c.refuse(err)
	if c.engine != nil {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		c.engine.Close(ended) // without a wait for what it has begun
		c.engine = nil
	}
}

// open connects the controller to containerd, the ledger and the engine.
func (c *Controller) open(ic *plugin.InitContext) error {
	config, err := c.configure(ic)
	if err != nil {
		return err
	}
	client, err := c.connect(ic)
	if err != nil {
		return err
	}
	if err := c.openLedger(ic); err != nil {
		return err
	}
	if err := c.openNode(ic, config, client); err != nil {
		return err
	}
	if err := c.openEngine(); err != nil {
		return err
	}
	if err := c.openProcesses(ic, config); err != nil {
		return err
	}
	c.background.release = c.engine.Hold()
	if err := c.recover(ic.Context, client, c.gc); err != nil {
		return fmt.Errorf("failed to take up the sandboxes of the last run: %w", err)
	}
	return nil
}

// configure reads containerd's configuration and podfsm's own.
func (c *Controller) configure(ic *plugin.InitContext) (*Config, error) {
	stock, err := readStockConfig(ic)
	if err != nil {
		return nil, err
	}
	c.stock = stock // from here on the handlers are known, and their pods refused if anything below fails
	if err := stock.checkHandlers(); err != nil {
		return nil, err
	}
	if err := c.drain.open(ic.Properties[plugins.PropertyRootDir]); err != nil {
		return nil, err
	}
	config, err := optionsOf(ic.Config)
	if err != nil {
		return nil, err
	}
	if loaded := ic.Plugins().Get(plugins.SnapshotPlugin, Name); loaded != nil {
		if _, err := snapshotterOptionsOf(loaded.Config); err != nil {
			return nil, err
		}
	}
	if c.limits, err = config.timeouts(); err != nil {
		return nil, err
	}
	if c.gc, err = config.gc(); err != nil {
		return nil, err
	}
	if c.lowest, err = config.lowest(); err != nil {
		return nil, err
	}
	if err := config.checkPrefix(); err != nil {
		return nil, err
	}
	c.policies, err = config.policies(stock)
	return config, err
}

// connect finds the services and plugins of this containerd.
func (c *Controller) connect(ic *plugin.InitContext) (*containerd.Client, error) {
	client, err := containerd.New("", containerd.WithDefaultPlatform(platforms.Default()), containerd.WithInMemoryServices(ic))
	if err != nil {
		return nil, fmt.Errorf("failed to connect to containerd's services: %w", err)
	}
	if loaded, err := ic.GetByID(plugins.SnapshotPlugin, Name); err == nil {
		c.remapper = loaded.(*remapping.Snapshotter)
	}
	events, err := ic.GetSingle(plugins.EventPlugin)
	if err != nil {
		return nil, fmt.Errorf("failed to find containerd's events: %w", err)
	}
	c.exchange = events.(eventExchange)
	c.publishing = newPublishing(c.exchange)
	return client, nil
}

// openLedger opens what is on record, of the sandboxes that there are and of those that have ended.
func (c *Controller) openLedger(ic *plugin.InitContext) (err error) {
	rootDir := ic.Properties[plugins.PropertyRootDir]
	if c.ledger, err = journal.Open(rootDir, ic.Properties[plugins.PropertyStateDir]); err != nil {
		return fmt.Errorf("failed to open the ledger: %w", err)
	}
	for _, damage := range c.ledger.Damage() {
		log.G(ic.Context).WithField("file", damage.File).Errorf("podfsm: the ledger is damaged: %s", damage.Reason)
	}
	file, err := history.Open(filepath.Join(rootDir, history.FileName))
	if err != nil {
		log.G(ic.Context).WithError(err).Warn("podfsm: what became of earlier sandboxes can't be looked up")
	}
	c.ended = newEnded(file)
	return nil
}

// openNode gets ready what the steps work with, and the id ranges.
func (c *Controller) openNode(ic *plugin.InitContext, config *Config, client *containerd.Client) error {
	groups, err := cni.OpenGroups(ic.Properties[plugins.PropertyStateDir])
	if err != nil {
		return err
	}
	c.node = newNode(c.stock, client, groups, c.limits, c.meters.ran)
	c.node.policies = c.policies
	c.node.pinPrefix = config.NetNSPrefix
	c.node.tasks = taskEvents{c.exchange}
	pool, err := config.openPool(c.policies, ic.Properties[plugins.PropertyRootDir])
	if err != nil {
		return err
	}
	c.node.ids = userns.New(idHost{c}, pool)
	return nil
}

func (c *Controller) openEngine() error {
	engine, err := lifecycle.New(lifecycle.Config{
		Steps: change(c.node.list()), Process: StartPause, Journal: timedLedger{c.ledger, c.meters}, Backoff: lifecycle.DefaultBackoff,
		Release: thisRelease(), Observe: c.observe, WrittenOff: c.wroteOff, Meter: c.meters,
	})
	if err != nil {
		return fmt.Errorf("failed to make the engine: %w", err)
	}
	c.engine = engine
	return nil
}

// openProcesses gets ready to start and to watch pauses and shims, and to answer for them in containerd's task service.
func (c *Controller) openProcesses(ic *plugin.InitContext, config *Config) (err error) {
	path := config.InitPath
	if path == "" {
		if path, err = pause.FindInit(); err != nil {
			return err
		}
	}
	if c.node.seccomp, err = pause.SeccompFilter(); err != nil {
		return err
	}
	engine := c.engine
	exited := func(name string, exit pause.Exit) {
		if err := lifecycle.Protect(func() error { c.pauseExited(engine, name, exit); return nil }); err != nil {
			log.L.WithError(err).Errorf("podfsm: the exit of pause of %q was not handled to its end", name)
		}
	}
	if c.node.pauses, err = pause.NewProcesses(path, exited); err != nil {
		return err
	}
	manager, err := ic.GetByID(plugins.ShimPlugin, "manager")
	if err != nil {
		return fmt.Errorf("failed to find containerd's shim manager: %w", err)
	}
	c.node.shimDirs = shimDirs(ic)
	c.node.shims = pause.NewShims(manager.(*shims.ShimManager), c.node.shimDirs)
	service, err := ic.GetByID(plugins.ServicePlugin, services.TasksService)
	if err != nil {
		return fmt.Errorf("failed to find containerd's task service: %w", err)
	}
	if err := c.node.shims.FindStrays(ic.Context); err != nil { // containerd has loaded those that it knows
		return err
	}
	service.(*taskService).of.Store(c)
	return nil
}

// Close stops what the controller runs. containerd calls it at its own stop. What is unfinished is in the ledger.
func (c *Controller) Close() error {
	if c.meters != nil {
		prometheus.Unregister(c.meters)
	}
	if c.doctor != nil {
		c.doctor.Close()
	}
	c.background.close()
	if c.engine != nil {
		c.closeEngine()
	}
	var failed []error
	if c.node != nil && c.node.pauses != nil {
		failed = append(failed, c.node.pauses.Close())
	}
	if c.ledger != nil {
		failed = append(failed, c.ledger.Close())
	}
	return errors.Join(failed...)
}

// closeEngine ends what is under way, and then hands on what is left to tell of it.
func (c *Controller) closeEngine() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	c.engine.Close(ctx)
	flush, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	c.publishing.settle(flush)
	c.ended.writing.settle(flush)
}

// closeTimeout is how long a stop of containerd waits for what is under way: the front has ended its creations by then, and they roll
// back; what takes longer goes on after the next start.
const closeTimeout = 10 * time.Second

// flushTimeout is how long it waits for subscribers of events, and for the disk of the history. What takes longer is lost.
const flushTimeout = 2 * time.Second

// refuse makes the controller refuse every pod because of err.
func (c *Controller) refuse(err error) {
	c.refusalMu.Lock()
	defer c.refusalMu.Unlock()
	c.refusal = errors.Join(c.refusal, err)
}

// well fails with Unavailable while the controller refuses pods.
func (c *Controller) well() error {
	if refusal := c.refused(); refusal != nil {
		return fmt.Errorf("podfsm runs no pods: %s: %w", refusal, errdefs.ErrUnavailable) // whatever class the reason has
	}
	return nil
}

// refused is why no pod can be run; nil when all is well.
func (c *Controller) refused() error {
	c.refusalMu.Lock()
	defer c.refusalMu.Unlock()
	return c.refusal
}
