package plugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/api/types"
	containerd "github.com/containerd/containerd/v2/client"
	shims "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/plugins/services"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/typeurl/v2"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/history"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/snapshot/remapping"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
	"github.com/podfsm/podfsm/userns"
)

// Controller is containerd's sandbox controller "podfsm". Its methods may be called by many goroutines.
type Controller struct {
	stock    *stockConfig
	limits   timeouts
	policies policies
	lowest   uint32 // host id that a pod may be mapped to
	node     *node
	ledger   *journal.Ledger
	engine   *lifecycle.Engine
	past     *history.File // of the sandboxes that have ended
	meters   *meters
	remapper remapper // podfsm's own snapshotter; nil where it is disabled
	herald   *herald
	exchange eventExchange // containerd's events
	tasks    podTasks
	checks   checks
	exam     examination
	looks    looks
	drain    drain

	passing atomic.Uint64 // pods of other controllers that have passed the front

	refusalMu sync.Mutex
	refusal   error // why no sandbox can be run; nil when all is well
}

var (
	_ sandbox.Controller = (*Controller)(nil)
	_ cri.Sandboxes      = (*Controller)(nil)
)

// initController makes the controller. It never fails: an error here would take the whole CRI down, so a controller that
// can't work refuses pods, with the reason.
func initController(ic *plugin.InitContext) (any, error) {
	c := &Controller{stock: &stockConfig{}}
	c.meters = newMeters(c)
	c.opened(func() error { return c.open(ic) })
	c.callDoctor(ic)
	if c.refusal != nil {
		log.G(ic.Context).WithError(c.refusal).Error("podfsm: no pod of its handlers will be run")
	}
	if err := prometheus.Register(c.meters); err != nil {
		log.G(ic.Context).WithError(err).Warn("podfsm: there will be no metrics of it")
	}
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
	stock, err := readStockConfig(ic)
	if err != nil {
		return err
	}
	c.stock = stock // from here on the handlers are known, and their pods refused if anything below fails
	if err := stock.checkHandlers(); err != nil {
		return err
	}
	if err := c.drain.open(ic.Properties[plugins.PropertyRootDir]); err != nil {
		return err
	}
	config, err := optionsOf(ic.Config)
	if err != nil {
		return err
	}
	if loaded := ic.Plugins().Get(plugins.SnapshotPlugin, Name); loaded != nil {
		if _, err := snapshotterOptionsOf(loaded.Config); err != nil {
			return err
		}
	}
	if c.limits, err = config.timeouts(); err != nil {
		return err
	}
	gc, err := config.gc()
	if err != nil {
		return err
	}
	if c.lowest, err = config.lowest(); err != nil {
		return err
	}
	if c.policies, err = config.policies(stock); err != nil {
		return err
	}
	client, err := containerd.New("", containerd.WithDefaultPlatform(platforms.Default()), containerd.WithInMemoryServices(ic))
	if err != nil {
		return fmt.Errorf("failed to connect to containerd's services: %w", err)
	}
	if loaded, err := ic.GetByID(plugins.SnapshotPlugin, Name); err == nil {
		c.remapper = loaded.(*remapping.Snapshotter)
	}
	events, err := ic.GetSingle(plugins.EventPlugin)
	if err != nil {
		return fmt.Errorf("failed to find containerd's events: %w", err)
	}
	c.exchange = events.(eventExchange)
	c.herald = &herald{publisher: c.exchange}
	if c.ledger, err = journal.Open(ic.Properties[plugins.PropertyRootDir], ic.Properties[plugins.PropertyStateDir]); err != nil {
		return fmt.Errorf("failed to open the ledger: %w", err)
	}
	for _, damage := range c.ledger.Damage() {
		log.G(ic.Context).WithField("file", damage.File).Errorf("podfsm: the ledger is damaged: %s", damage.Reason)
	}
	groups, err := cni.OpenGroups(ic.Properties[plugins.PropertyStateDir])
	if err != nil {
		return err
	}
	c.node = newNode(c.stock, client, groups, c.limits, c.meters.ran)
	c.node.policies = c.policies
	c.node.tasks = taskEvents{c.exchange}
	pool, err := config.openPool(c.policies, ic.Properties[plugins.PropertyRootDir])
	if err != nil {
		return err
	}
	c.node.ids = userns.New(idHost{c}, pool)
	if c.past, err = history.Open(filepath.Join(ic.Properties[plugins.PropertyRootDir], history.FileName)); err != nil {
		log.G(ic.Context).WithError(err).Warn("podfsm: what became of earlier sandboxes can't be looked up")
	}
	engine, err := lifecycle.New(lifecycle.Config{
		Steps: change(c.node.list()), Process: StartPause, Journal: timedLedger{c.ledger, c.meters}, Backoff: lifecycle.DefaultBackoff,
		Release: thisRelease(), Observe: c.observe, Meter: c.meters,
	})
	if err != nil {
		return fmt.Errorf("failed to make the engine: %w", err)
	}
	c.engine = engine
	if err := c.openProcesses(ic, config); err != nil {
		return err
	}
	if err := c.recover(ic.Context, client, gc); err != nil {
		return fmt.Errorf("failed to take up the sandboxes of the last run: %w", err)
	}
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
	c.checks.close()
	c.exam.close()
	if c.engine != nil {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		c.engine.Close(ctx)
		c.herald.settle(ctx)
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

// closeTimeout is how long a stop of containerd waits for what is under way: the front has ended its creations by then, and they roll
// back; what takes longer goes on after the next start.
const closeTimeout = 10 * time.Second

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

// Ours says whether a runtime handler's pods are podfsm's.
func (c *Controller) Ours(name string) (bool, error) {
	if len(c.stock.Containerd.Runtimes) == 0 {
		return false, nil // containerd's configuration couldn't be read, so its own service decides
	}
	h, err := c.stock.handler(name)
	return h.Sandboxer == Name, err
}

// untrustedWorkload is an annotation of containerd's from before there were runtime handlers.
const untrustedWorkload = "io.kubernetes.cri.untrusted-workload"

// Admit refuses a pod before anything is made for it: InvalidArgument for what can never run, FailedPrecondition for what
// the node lacks, Unavailable for what is to come.
func (c *Controller) Admit(ctx context.Context, handlerName string, config *runtime.PodSandboxConfig) error {
	if err := c.takesPods(); err != nil {
		return err
	}
	if config.GetAnnotations()[untrustedWorkload] == "true" {
		return fmt.Errorf("pod %q is annotated %s, for which containerd picks a handler of its own; name a handler instead: %w",
			records.PodName(config), untrustedWorkload, errdefs.ErrInvalidArgument)
	}
	spec, err := c.specFor(handlerName, config, sandbox.Sandbox{}, "")
	if err != nil {
		return err
	}
	handlerName = c.stock.handlerName(handlerName)
	if err := checkCgroup(spec, handlerName, c.stock.Containerd.Runtimes[handlerName].systemdCgroup()); err != nil {
		return err
	}
	if err := c.admitIDs(ctx, spec); err != nil {
		return fmt.Errorf("pod %q can't have its ids: %w", records.PodName(config), err)
	}
	if spec.OnNodeNetwork() {
		return nil
	}
	if _, _, err := cni.PodArgs("", spec.Config); err != nil {
		return fmt.Errorf("pod %q can't be told to CNI plugins: %w", records.PodName(config), err)
	}
	if err := c.networkReady(ctx, spec); err != nil {
		return fmt.Errorf("pod %q has no network to be attached to: %w", records.PodName(config), err)
	}
	return nil
}

// Create accepts a sandbox. Nothing of it is made yet.
func (c *Controller) Create(ctx context.Context, info sandbox.Sandbox, opts ...sandbox.CreateOpt) (err error) {
	call := cri.FromContext(ctx)
	defer func() {
		if err != nil && call != nil {
			call.Err = err
		}
	}()
	if err := c.well(); err != nil {
		return err
	}
	left, err := c.drain.enter()
	if err != nil {
		return err
	}
	defer left()
	var options sandbox.CreateOptions
	for _, opt := range opts {
		if err := opt(&options); err != nil {
			return fmt.Errorf("failed to read the options of sandbox %q: %w", info.ID, err)
		}
	}
	config, handlerName, err := requested(ctx, info, options)
	if err != nil {
		return err
	}
	spec, err := c.specFor(handlerName, config, info, options.NetNSPath)
	if err != nil {
		return err
	}
	if err := checkCgroup(spec, c.stock.handlerName(handlerName), spec.SystemdCgroup()); err != nil {
		return err
	}
	key, err := keyOf(ctx, info.ID)
	if err != nil {
		return err
	}
	if err := c.engine.Create(inCallersTrace(ctx), key, request(key, spec)); err != nil {
		return err
	}
	if call != nil {
		call.SandboxID = info.ID
	}
	return nil
}

// request is what the engine gets for a sandbox.
func request(key journal.Key, spec *Spec) lifecycle.Request {
	return lifecycle.Request{
		Name:       nameOf(key.Namespace, spec.Config.GetMetadata()),
		Pod:        records.PodName(spec.Config),
		Spec:       spec,
		Attributes: append(cri.Attributes(spec.Config, spec.Handler), tracing.SandboxID.String(key.ID)),
	}
}

// nameOf is the name that a pod's attempt has in a containerd namespace. The parts are those of containerd's own names, which it forgets
// over a restart.
func nameOf(namespace string, metadata *runtime.PodSandboxMetadata) string {
	return fmt.Sprintf("%s/%s_%s_%s_%d", namespace, metadata.GetName(), metadata.GetNamespace(), metadata.GetUid(), metadata.GetAttempt())
}

// requested is the true configuration and the handler: beside the request where it came through the front, else inside it.
func requested(ctx context.Context, info sandbox.Sandbox, options sandbox.CreateOptions) (*runtime.PodSandboxConfig, string, error) {
	if call := cri.FromContext(ctx); call != nil && call.Config != nil {
		return call.Config, call.Handler, nil
	}
	if options.Options == nil {
		return nil, "", fmt.Errorf("sandbox %q was created without a runtime.v1.PodSandboxConfig in its options: %w", info.ID, errdefs.ErrInvalidArgument)
	}
	config := &runtime.PodSandboxConfig{}
	if err := typeurl.UnmarshalTo(options.Options, config); err != nil {
		return nil, "", fmt.Errorf("the options of sandbox %q are no runtime.v1.PodSandboxConfig: %w: %w", info.ID, err, errdefs.ErrInvalidArgument)
	}
	return config, "", nil
}

// Start runs the creation path.
func (c *Controller) Start(ctx context.Context, id string) (_ sandbox.ControllerInstance, err error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	call := cri.FromContext(ctx)
	if call != nil {
		ctx = call.Caller
	} else {
		var span trace.Span
		ctx, span = tracing.Start(ctx, tracing.SpanRun, c.attributes(key)...)
		defer func() { tracing.End(span, err) }()
	}
	defer func() {
		if err != nil && call != nil {
			call.Err = err
		}
	}()
	if err := c.engine.Start(ctx, key); err != nil {
		return sandbox.ControllerInstance{}, err
	}
	if call == nil {
		c.engine.Claim(ctx, key, lifecycle.Taken) // the caller has it
	}
	started, err := c.instance(ctx, key)
	if err != nil {
		// Nobody else undoes a start that failed.
		return started, errors.Join(err, c.engine.Remove(context.WithoutCancel(ctx), key))
	}
	return started, nil
}

// instance is what containerd's service keeps of a sandbox that was started.
func (c *Controller) instance(ctx context.Context, key journal.Key) (sandbox.ControllerInstance, error) {
	view, err := c.engine.Get(key)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	container, err := c.node.containers.Get(ctx, key.ID)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	return instance(view, container)
}

// Stop ends pause. Through the front that is all, because containerd's service tells NRI next and the front goes on after
// that; any other caller gets the sandbox stopped whole.
func (c *Controller) Stop(ctx context.Context, id string, _ ...sandbox.StopOpt) (err error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return err
	}
	if cri.FromContext(ctx) != nil {
		return c.engine.Halt(ctx, key)
	}
	ctx, span := tracing.Start(ctx, tracing.SpanStop, c.attributes(key)...)
	defer func() { tracing.End(span, err) }()
	if err := c.engine.Halt(ctx, key); err != nil {
		return err
	}
	return c.engine.Stop(ctx, key)
}

// Shutdown removes the sandbox. It is idempotent; an unknown id is success.
func (c *Controller) Shutdown(ctx context.Context, id string) (err error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return err
	}
	if cri.FromContext(ctx) == nil {
		var span trace.Span
		ctx, span = tracing.Start(c.inCreationTrace(ctx, key), tracing.SpanRemove, c.attributes(key)...)
		defer func() { tracing.End(span, err) }()
	}
	return c.engine.Remove(ctx, key)
}

// Wait blocks until pause exits.
func (c *Controller) Wait(ctx context.Context, id string) (sandbox.ExitStatus, error) {
	if c.engine == nil {
		// Nobody knows; an answer would make containerd's service take every sandbox for ended.
		<-ctx.Done()
		return sandbox.ExitStatus{}, ctx.Err()
	}
	key, err := c.known(ctx, id)
	if err != nil {
		return sandbox.ExitStatus{}, err
	}
	exit, err := c.engine.Wait(ctx, key)
	if err != nil {
		return sandbox.ExitStatus{}, err
	}
	return sandbox.ExitStatus{ExitStatus: exit.Code, ExitedAt: exit.At}, nil
}

// Status is the sandbox's state in the CRI's words, with everything known of it when verbose.
func (c *Controller) Status(ctx context.Context, id string, verbose bool) (sandbox.ControllerStatus, error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return sandbox.ControllerStatus{}, err
	}
	view, err := c.engine.Get(key)
	if err != nil {
		return sandbox.ControllerStatus{}, err
	}
	return status(ctx, c.node, view, verbose)
}

// Platform is the node's.
func (c *Controller) Platform(context.Context, string) (imagespec.Platform, error) {
	return platforms.DefaultSpec(), nil
}

// Update has nothing to do: what containerd's service updates of a sandbox is in its own record.
func (c *Controller) Update(context.Context, string, sandbox.Sandbox, ...string) error { return nil }

// Metrics reads the pod's parent cgroup.
func (c *Controller) Metrics(ctx context.Context, id string) (*types.Metric, error) {
	key, err := c.known(ctx, id)
	if err != nil {
		return nil, err
	}
	view, err := c.engine.Get(key)
	if err != nil {
		return nil, err
	}
	return podMetrics(id, view.Spec.(*Spec).Config.GetLinux().GetCgroupParent())
}

// PauseImage is the reference of the pause image, as containerd's configuration pins it.
func (c *Controller) PauseImage() string { return c.stock.pauseImage() }

// Pod is a sandbox of ours that came by CRI, for the front.
func (c *Controller) Pod(id string) (cri.Pod, bool) {
	if c.engine == nil {
		return cri.Pod{}, false
	}
	view, ok := c.engine.Find(inFront(id))
	if !ok {
		return cri.Pod{}, false
	}
	return podOf(view), true
}

// CreatedAt is when a sandbox was begun, for the front.
func (c *Controller) CreatedAt(id string) time.Time {
	if c.engine == nil {
		return time.Time{}
	}
	return c.engine.Created(inFront(id))
}

// Named is the sandbox of a pod's attempt, for the front.
func (c *Controller) Named(metadata *runtime.PodSandboxMetadata) (cri.Pod, bool) {
	if c.engine == nil {
		return cri.Pod{}, false
	}
	view, ok := c.engine.Named(nameOf(cri.Namespace, metadata))
	if !ok {
		return cri.Pod{}, false
	}
	return podOf(view), true
}

// podOf is a sandbox as the front knows it.
func podOf(view lifecycle.View) cri.Pod {
	spec := view.Spec.(*Spec)
	pod := cri.Pod{
		ID: view.Key.ID, Config: spec.Config, Handler: spec.Handler, CreatedAt: view.Created, Ready: view.State == states.Ready,
		State: view.State, Claim: view.Claim, TraceParent: view.TraceParent,
	}
	if step, ok := view.Current(); ok {
		pod.Step, pod.Since = string(step.Name), step.Started
	}
	captured := view.Step(CaptureNetNS)
	if pinned, ok := captured.Result.(*NetNS); ok && captured.Status == lifecycle.StepDone {
		pod.NetNSPath = pinned.Path
	}
	if attached, ok := records.NetworkOf(view); ok {
		pod.IP, pod.AdditionalIPs = attached.IP, attached.AdditionalIPs
	}
	if attached, ok := view.Step(AttachNetwork).Result.(*Network); ok && attached.IP != "" {
		pod.HadIPs = append([]string{attached.IP}, attached.AdditionalIPs...)
	}
	pod.UserNS = chosenUserNS(view)
	return pod
}

// inFront is the key of a sandbox that came by CRI.
func inFront(id string) journal.Key { return journal.Key{Namespace: cri.Namespace, ID: id} }

// Settle waits for what is under way for a sandbox, for the front.
func (c *Controller) Settle(ctx context.Context, id string) error {
	return c.engine.Settle(ctx, inFront(id))
}

// Claim marks a sandbox as shown or taken, for the front.
func (c *Controller) Claim(ctx context.Context, id string, claim lifecycle.Claim) bool {
	return c.engine == nil || c.engine.Claim(ctx, inFront(id), claim)
}

// Discard marks a sandbox as discarded, for the front.
func (c *Controller) Discard(id string, most lifecycle.Claim) bool {
	return c.engine != nil && c.engine.Discard(inFront(id), most)
}

// Unclaimed are the finished sandboxes that nobody has claimed, for the front.
func (c *Controller) Unclaimed() []string {
	if c.engine == nil {
		return nil
	}
	var ids []string
	for _, view := range c.engine.List() {
		if finished(view) && view.Claim == lifecycle.Unclaimed && view.Key.Namespace == cri.Namespace {
			ids = append(ids, view.Key.ID)
		}
	}
	return ids
}

// finished says that a sandbox's creation has come to its end, and nobody has ended the sandbox yet.
func finished(view lifecycle.View) bool {
	return view.State == states.Ready || view.State == states.NotReady
}

// StopPod takes a sandbox off its network, for the front.
func (c *Controller) StopPod(ctx context.Context, id string) error {
	err := c.engine.Stop(ctx, inFront(id))
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// RemovePod undoes whatever there is of a sandbox, for the front.
func (c *Controller) RemovePod(ctx context.Context, id string) error {
	return c.engine.Remove(ctx, inFront(id))
}

// known is the key of a sandbox by the containerd namespace of ctx. Without an engine it fails with Unavailable: a NotFound would
// make containerd's service forget sandboxes that are on the ledger.
func (c *Controller) known(ctx context.Context, id string) (journal.Key, error) {
	if c.engine == nil {
		return journal.Key{}, c.well()
	}
	return keyOf(ctx, id)
}

func keyOf(ctx context.Context, id string) (journal.Key, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return journal.Key{}, err
	}
	return journal.Key{Namespace: namespace, ID: id}, nil
}

// inCallersTrace is ctx in the span of the front's request, where there is one: containerd's service puts a span between.
func inCallersTrace(ctx context.Context) context.Context {
	if call := cri.FromContext(ctx); call != nil {
		return trace.ContextWithSpan(ctx, trace.SpanFromContext(call.Caller))
	}
	return ctx
}

// attributes are those of the spans of a sandbox, as far as it is known.
func (c *Controller) attributes(key journal.Key) []attribute.KeyValue {
	view, ok := c.engine.Find(key)
	if !ok {
		return []attribute.KeyValue{tracing.SandboxID.String(key.ID)}
	}
	return request(key, view.Spec.(*Spec)).Attributes
}

// inCreationTrace is ctx in the trace of the sandbox's creation if it is in none: when NRI or the store fails a creation, containerd's
// service cleans up with a context of its own.
func (c *Controller) inCreationTrace(ctx context.Context, key journal.Key) context.Context {
	view, ok := c.engine.Find(key)
	if !ok || trace.SpanContextFromContext(ctx).IsValid() {
		return ctx
	}
	return trace.ContextWithRemoteSpanContext(ctx, tracing.FromParent(view.TraceParent))
}
