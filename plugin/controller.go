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
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
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
	lowest     uint32 // host id that pods may be mapped to
	gc         bool   // of networks
	node       *node
	ledger     *ledger.Ledger
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
	recovery   recoveryOutcomes
	started    time.Time
	drain      drain

	passing atomic.Uint64 // numbers the pods of other controllers

	refusalMu sync.Mutex
	refusal   error // why podfsm is degraded; nil if it is not
}

// initController makes the controller. It never fails, because an error here would take down CRI
// for all pods. A degraded controller refuses new pods, with the reason. It still serves the running
// ones if it could open its ledger and recover from it.
func initController(ic *plugin.InitContext) (any, error) {
	c := &Controller{stock: &stockConfig{}, started: time.Now()}
	c.meters = newMeters(c)
	c.opened(func() error { return c.open(ic) })
	c.callDoctor(ic)
	c.startBackground()
	if c.refusal != nil {
		log.G(ic.Context).WithError(c.refusal).Error("podfsm is degraded")
	}
	if err := prometheus.Register(c.meters); err != nil {
		log.G(ic.Context).WithError(err).Warn("failed to register metrics")
	}
	completeNRI(c.completePod) // before containerd's CRI service, which comes next, lets NRI plugins connect
	return c, nil
}

// opened opens the controller. If that fails or panics, it drops the engine, and the controller can
// serve no pod at all: an engine that doesn't know all sandboxes would make containerd's service
// forget the others.
func (c *Controller) opened(open func() error) {
	err := lifecycle.Protect(open)
	if err == nil {
		return
	}
	c.refuse(err)
	if c.engine != nil {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		c.engine.Close(ended) // does not wait for work under way
		c.engine = nil
	}
}

// open connects the controller to containerd, the ledger and the engine. It fails only if running
// pods can't be served. What only new pods need makes podfsm refuse those.
func (c *Controller) open(ic *plugin.InitContext) error {
	if err := c.configureStock(ic); err != nil {
		return err
	}
	config := c.configure(ic)
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
	if err := c.openProcesses(ic); err != nil {
		return err
	}
	c.background.release = c.engine.Hold()
	if err := c.recovery.time(func() error { return c.recover(ic.Context, client, c.gc) }); err != nil {
		return fmt.Errorf("failed to recover the sandboxes of the last run: %w", err)
	}
	if c.degradedError() == nil { // else nothing is started
		c.refuse(c.prepareStarts(config))
	}
	return nil
}

// configureStock reads containerd's own configuration. Without it, podfsm doesn't know where the
// files of its pods are.
func (c *Controller) configureStock(ic *plugin.InitContext) error {
	stock, err := readStockConfig(ic)
	if err != nil {
		return err
	}
	c.stock = stock // if podfsm is degraded, new pods of these handlers are refused
	c.refuse(stock.checkHandlers())
	return nil
}

// configure reads podfsm's options. If they can't be used, it returns safe ones for the running
// pods, and new pods are refused.
func (c *Controller) configure(ic *plugin.InitContext) *Config {
	c.refuse(c.drain.open(ic.Properties[plugins.PropertyRootDir]))
	if loaded := ic.Plugins().Get(plugins.SnapshotPlugin, Name); loaded != nil {
		_, err := snapshotterOptionsOf(loaded.Config)
		c.refuse(err)
	}
	config, err := optionsOf(ic.Config)
	if err == nil {
		err = c.use(config)
	}
	if err != nil {
		c.refuse(err)
		config = safeConfig()
		c.refuse(c.use(config))
	}
	return config
}

// use takes over the options.
func (c *Controller) use(config *Config) (err error) {
	if c.limits, err = config.timeouts(); err != nil {
		return err
	}
	if c.gc, err = config.gc(); err != nil {
		return err
	}
	if c.lowest, err = config.lowest(); err != nil {
		return err
	}
	if err := config.checkPrefix(); err != nil {
		return err
	}
	c.policies, err = config.policies(c.stock)
	return err
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

// openLedger opens the ledger, and the history of ended sandboxes.
func (c *Controller) openLedger(ic *plugin.InitContext) (err error) {
	rootDir := ic.Properties[plugins.PropertyRootDir]
	if c.ledger, err = ledger.Open(rootDir, ic.Properties[plugins.PropertyStateDir]); err != nil {
		return fmt.Errorf("failed to open the ledger: %w", err)
	}
	for _, damage := range c.ledger.Damage() {
		log.G(ic.Context).WithField("file", damage.File).Errorf("ledger is damaged: %s", damage.Reason)
	}
	file, err := history.Open(filepath.Join(rootDir, history.FileName))
	if err != nil {
		log.G(ic.Context).WithError(err).Warn("failed to read history of ended sandboxes")
	}
	c.ended = newEnded(file)
	return nil
}

// openNode makes the dependencies of the steps, and the id ranges.
func (c *Controller) openNode(ic *plugin.InitContext, config *Config, client *containerd.Client) error {
	groups, err := cni.OpenGroups(ic.Properties[plugins.PropertyStateDir])
	if err != nil {
		return err
	}
	c.node = newNode(c.stock, client, groups, c.limits, c.meters.ran)
	c.node.policies = c.policies
	c.node.pinPrefix = config.NetNSPrefix
	c.node.tasks = taskEvents{c.exchange}
	// Without the pool, running pods keep their ids: each is on record.
	pool, err := config.openPool(c.policies, ic.Properties[plugins.PropertyRootDir])
	c.refuse(err)
	c.node.ids = userns.New(idHost{c}, pool)
	return nil
}

func (c *Controller) openEngine() error {
	c.recovery.Meter = c.meters
	engine, err := lifecycle.New(lifecycle.Config{
		Steps: change(c.node.list()), Process: StartPause, Ledger: timedLedger{c.ledger, c.meters}, Backoff: lifecycle.DefaultBackoff,
		Release: thisRelease(), Observe: c.observe, WrittenOff: c.wroteOff, Meter: &c.recovery,
	})
	if err != nil {
		return fmt.Errorf("failed to make the engine: %w", err)
	}
	c.engine = engine
	return nil
}

// openProcesses prepares watching pauses and shims, and puts the pauses into containerd's task
// service.
func (c *Controller) openProcesses(ic *plugin.InitContext) (err error) {
	engine := c.engine
	exited := func(name string, exit pause.Exit) {
		if err := lifecycle.Protect(func() error { c.pauseExited(engine, name, exit); return nil }); err != nil {
			log.L.WithError(err).Errorf("failed to handle the exit of pause of %q", name)
		}
	}
	if c.node.pauses, err = pause.NewProcesses(exited); err != nil {
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
	if err := c.node.shims.FindStrays(ic.Context); err != nil { // after containerd has loaded the shims that it knows
		return err
	}
	service.(*taskService).of.Store(c)
	return nil
}

// prepareStarts loads what every new pause starts with.
func (c *Controller) prepareStarts(config *Config) (err error) {
	path := config.InitPath
	if path == "" {
		if path, err = pause.FindInit(); err != nil {
			return err
		}
	}
	if c.node.seccomp, err = pause.SeccompFilter(); err != nil {
		return err
	}
	return c.node.pauses.Load(path)
}

// Close ends the controller's work. containerd calls it when it stops. Unfinished work is in the
// ledger and continues after the next start.
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

// closeEngine ends the work under way, then flushes events and the history.
func (c *Controller) closeEngine() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	c.engine.Close(ctx)
	ctx, cancel = context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	c.publishing.flush(ctx)
	c.ended.writing.flush(ctx)
}

// closeTimeout is how long a stop of containerd waits for work under way. containerd closes the CRI
// service first, which ends the creations there and waits for their rollbacks. A rollback that takes
// longer than both waits continues after the next start.
const closeTimeout = 10 * time.Second

// flushTimeout is how long a stop of containerd waits for subscribers of events, and for the disk
// of the history. Later events and entries are dropped.
const flushTimeout = 2 * time.Second

// refuse makes the controller refuse every new pod because of err. nil changes nothing.
func (c *Controller) refuse(err error) {
	c.refusalMu.Lock()
	defer c.refusalMu.Unlock()
	c.refusal = errors.Join(c.refusal, err)
}

// degradedError returns the error of requests while podfsm is degraded, Unavailable with the reason; otherwise nil.
func (c *Controller) degradedError() error {
	if refusal := c.refused(); refusal != nil {
		return fmt.Errorf("podfsm is degraded: %s: %w", refusal, errdefs.ErrUnavailable) // not the class of the reason
	}
	return nil
}

// refused returns why podfsm is degraded, nil if it is not.
func (c *Controller) refused() error {
	c.refusalMu.Lock()
	defer c.refusalMu.Unlock()
	return c.refusal
}
