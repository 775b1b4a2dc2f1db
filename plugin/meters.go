package plugin

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/snapshot/remapping"
	"github.com/podfsm/podfsm/tracing"
)

// meters is the Prometheus collector of podfsm's metrics. It is in Prometheus' default registry,
// which containerd serves. The number of label values is bounded and independent of the pods.
// Gauges are computed from memory at each scrape, so nothing runs between scrapes.
type meters struct {
	controller *Controller
	stock      stockMeters
	failing    failingPods
	leaks      atomic.Pointer[int] // found by the last search; nil before the first

	steps      *prometheus.HistogramVec
	stepErrors *prometheus.CounterVec
	plugins    *prometheus.HistogramVec
	creations  *prometheus.HistogramVec
	retries    *prometheus.CounterVec
	unclaimed  prometheus.Counter
	recoveries *prometheus.HistogramVec
	remaps     *prometheus.CounterVec
	writes     *prometheus.HistogramVec
	writeOffs  *prometheus.CounterVec

	pluginNames pluginNames
}

// The metrics that are computed at each scrape.
var (
	buildInfoDesc = describe("build_info", "Always 1. The labels name the releases of podfsm, containerd and Go that the daemon is built with.",
		"version", "revision", "containerd_version", "go_version")
	degradedDesc    = describe("degraded", "Whether podfsm is degraded: 1 or 0. The log has the reason.")
	drainingDesc    = describe("draining", "Whether podfsm is draining and refuses new pods: 1 or 0.")
	checkFailedDesc = describe("doctor_check_failed", "Whether the last run of a doctor check failed: 1 or 0, by check.", "check")
	leaksDesc       = describe("leaks", "Leaked resources that the last podfsm leaks found. Absent until its first run after a start of containerd.")
	failingPodsDesc = describe("failing_pods",
		"Pods whose last creation failed within the last 10 minutes, by the step that failed.", "step")
	recoveryDesc = describe("recovery_pending",
		"Sandboxes found by the last restart of containerd whose recovery is not complete, by what it waits for.", "outcome")
	sandboxesDesc = describe("sandboxes", "Sandboxes by state.", "state")
	stepAgeDesc   = describe("unfinished_step_age_seconds",
		"Age of the oldest try under way, by step and operation. 0 if there is none.", "step", "operation")
	pendingDesc    = describe("pending_cleanups", "Undos that failed and are retried, by step.", "step")
	pendingAgeDesc = describe("pending_cleanup_age_seconds", "Age of the oldest pending cleanup, by step. 0 if there is none.", "step")
	rangesDesc     = describe("id_ranges", "Ranges of the pool of host ids, by state. Absent without a pool.", "state")
	ledgerDesc     = describe("ledger_size_bytes", "Size of the ledger, by file: durable outlives a reboot, log does not.", "file")
	layersDesc     = describe("remap_layers_total", "Layers that podfsm's snapshotter made to remap the owners of images, by strategy.", "strategy")
	inodesDesc     = describe("remap_inodes_total", "Inodes whose owners were remapped, by strategy.", "strategy")
	bytesDesc      = describe("remap_bytes_total", "Size of the files whose owners were remapped, by strategy. Strategy metacopy copies no content.", "strategy")
	remapSecDesc   = describe("remap_seconds_total", "Time spent on remapping owners, by strategy.", "strategy")

	scrapedDescs = []*prometheus.Desc{
		buildInfoDesc, degradedDesc, drainingDesc, checkFailedDesc, leaksDesc, failingPodsDesc, recoveryDesc, sandboxesDesc, stepAgeDesc,
		pendingDesc, pendingAgeDesc, rangesDesc, ledgerDesc, layersDesc, inodesDesc, bytesDesc, remapSecDesc,
	}
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("podfsm_"+name, help, labels, nil)
}

var (
	// secondsOfSteps are the buckets of step durations: from a step without work, over a CNI chain
	// of 50 ms, to deadlines of minutes.
	secondsOfSteps = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 180}
	// secondsOfWrites are the buckets of ledger writes: from an append on a tmpfs to an fsync on a
	// failing disk.
	secondsOfWrites = []float64{.00001, .000025, .0001, .00025, .001, .0025, .01, .025, .1, .25, 1, 5}
)

func newMeters(c *Controller) *meters {
	m := &meters{
		controller: c,
		stock:      findStockMeters(),
		steps: seconds("step_duration_seconds",
			"Duration of each try of a step, by step, operation (do, undo, stop, check) and outcome.", secondsOfSteps, "step", "operation", "outcome"),
		stepErrors: count("step_errors_total", "Failed tries of a step, by step, operation and class of the error.", "step", "operation", "error_type"),
		plugins: seconds("cni_command_duration_seconds",
			"Duration of each run of a CNI plugin, by command, plugin type, network and outcome.", secondsOfSteps, "command", "plugin", "network", "outcome"),
		creations: seconds("sandbox_creation_duration_seconds",
			"Duration of each sandbox creation requested by CRI, including the pull of the pause image and the rollback, by outcome.", secondsOfSteps, "outcome"),
		retries: count("sandbox_creation_retries_total",
			"Repeated requests for the same sandbox, by outcome of the request.", "outcome"),
		unclaimed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "podfsm_unclaimed_sandboxes_total", Help: "Created sandboxes that podfsm removed because no caller claimed them.",
		}),
		recoveries: seconds("recovery_duration_seconds", "Duration of each sandbox's recovery after a restart of containerd, by outcome.", secondsOfSteps, "outcome"),
		remaps:     count("remaps_total", "Root filesystems of sandboxes, by the strategy that mapped their ids.", "strategy"),
		writes:     seconds("ledger_write_duration_seconds", "Duration of each write to the ledger, by file and outcome.", secondsOfWrites, "file", "outcome"),
		writeOffs: count("cleanups_written_off_total",
			"Pending cleanups, or parts of them, that were written off, by step and by cause: operator or reboot.", "step", "by"),
	}
	// Each series starts at 0, so that its first event shows as an increase.
	for _, outcome := range []string{outcomeOK, outcomeError} {
		m.creations.WithLabelValues(outcome)
	}
	for _, file := range []string{fileDurable, fileLog} {
		m.writes.WithLabelValues(file, outcomeOK)
		m.writes.WithLabelValues(file, outcomeError)
	}
	for _, outcome := range []cri.RetryEvent{cri.RetryJoined, cri.RetryTook, cri.RetrySuperseded} {
		m.retries.WithLabelValues(string(outcome))
	}
	for _, outcome := range lifecycle.Recoveries() {
		m.recoveries.WithLabelValues(string(outcome))
	}
	m.writeOffs.WithLabelValues(string(AttachNetwork), string(lifecycle.ByReboot))
	for _, step := range Steps() {
		m.writeOffs.WithLabelValues(string(step.Name), string(lifecycle.ByOperator))
		m.steps.WithLabelValues(string(step.Name), string(lifecycle.OperationDo), string(lifecycle.OutcomeError))
		m.steps.WithLabelValues(string(step.Name), string(lifecycle.OperationUndo), string(lifecycle.OutcomeError))
	}
	return m
}

func seconds(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "podfsm_" + name, Help: help, Buckets: buckets}, labels)
}

func count(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "podfsm_" + name, Help: help}, labels)
}

// vectors returns the metrics that are updated by events.
func (m *meters) vectors() []prometheus.Collector {
	return []prometheus.Collector{m.steps, m.stepErrors, m.plugins, m.creations, m.retries, m.unclaimed, m.recoveries, m.remaps, m.writes, m.writeOffs}
}

// Describe implements prometheus.Collector.
func (m *meters) Describe(descs chan<- *prometheus.Desc) {
	for _, v := range m.vectors() {
		v.Describe(descs)
	}
	for _, d := range scrapedDescs {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (m *meters) Collect(metrics chan<- prometheus.Metric) {
	for _, v := range m.vectors() {
		v.Collect(metrics)
	}
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	c := m.controller
	gauge(buildInfoDesc, 1, buildInfo()...)
	gauge(degradedDesc, oneIf(c.degradedError() != nil))
	_, draining := c.drain.draining()
	gauge(drainingDesc, oneIf(draining))
	if c.doctor != nil {
		for check, failed := range c.doctor.Failed() {
			gauge(checkFailedDesc, oneIf(failed), check)
		}
	}
	if leaks := m.leaks.Load(); leaks != nil {
		gauge(leaksDesc, float64(*leaks))
	}
	for step, pods := range m.failing.count(time.Now()) {
		gauge(failingPodsDesc, float64(pods), step)
	}
	if c.engine != nil {
		collectCensus(c.engine.Census(), time.Now(), gauge)
	}
	if c.node != nil && c.node.ids != nil {
		if free, held, quarantined, ok := c.node.ids.Usage(); ok {
			gauge(rangesDesc, float64(free), "free")
			gauge(rangesDesc, float64(held), "held")
			gauge(rangesDesc, float64(quarantined), "quarantined")
		}
	}
	if c.remapper != nil {
		collectRemaps(c.remapper.Totals(), metrics)
	}
	if c.ledger != nil {
		durable, recent, err := c.ledger.Sizes()
		if err != nil {
			// At debug level, because each scrape repeats it. Failed writes have a metric of their
			// own.
			log.L.WithError(err).Debug("failed to read the size of the ledger, metric left out")
			return
		}
		gauge(ledgerDesc, float64(durable), fileDurable)
		gauge(ledgerDesc, float64(recent), fileLog)
	}
}

// remapper is the part of podfsm's snapshotter that counts remaps.
type remapper interface {
	Totals() map[remapping.Strategy]remapping.Totals
}

func collectRemaps(totals map[remapping.Strategy]remapping.Totals, metrics chan<- prometheus.Metric) {
	for _, strategy := range []remapping.Strategy{remapping.Metacopy, remapping.Chown} { // idmap makes no layers
		counter := func(desc *prometheus.Desc, value float64) {
			metrics <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, value, string(strategy))
		}
		t := totals[strategy]
		counter(layersDesc, float64(t.Layers))
		counter(inodesDesc, float64(t.Inodes))
		counter(bytesDesc, float64(t.Bytes))
		counter(remapSecDesc, t.Took.Seconds())
	}
}

func collectCensus(census lifecycle.Census, now time.Time, gauge func(desc *prometheus.Desc, value float64, labels ...string)) {
	age := func(since time.Time) float64 {
		if since.IsZero() {
			return 0
		}
		return max(0, now.Sub(since).Seconds())
	}
	for state, count := range census.States {
		gauge(sandboxesDesc, float64(count), string(state))
	}
	for key, since := range census.UnderWay {
		gauge(stepAgeDesc, age(since), string(key.Step), string(key.Operation))
	}
	for step, pending := range census.Pending {
		gauge(pendingDesc, float64(pending.Count), string(step))
		gauge(pendingAgeDesc, age(pending.Since), string(step))
	}
	for recovery, count := range census.Recovering {
		gauge(recoveryDesc, float64(count), string(recovery))
	}
}

func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

const (
	outcomeOK       = "ok"
	outcomeError    = "error"
	outcomeCanceled = "canceled" // by the caller

	fileDurable = "durable"
	fileLog     = "log"
)

func outcomeOf(err error) string {
	if err != nil {
		return outcomeError
	}
	return outcomeOK
}

// Tried implements lifecycle.Meter.
func (m *meters) Tried(try lifecycle.Try, outcome lifecycle.Outcome) {
	m.steps.WithLabelValues(string(try.Step), string(try.Operation), string(outcome)).Observe(try.Ended.Sub(try.Started).Seconds())
	if outcome == lifecycle.OutcomeError {
		m.stepErrors.WithLabelValues(string(try.Step), string(try.Operation), tracing.KnownClass(try.Err)).Inc()
	}
}

// Recovered implements lifecycle.Meter.
func (m *meters) Recovered(recovery lifecycle.Recovery, took time.Duration) {
	m.recoveries.WithLabelValues(string(recovery)).Observe(took.Seconds())
}

// wroteOff counts a cleanup that was written off.
func (m *meters) wroteOff(w lifecycle.WriteOff) {
	m.writeOffs.WithLabelValues(string(w.Step), string(w.By)).Inc()
}

// leaked sets the number of leaks that the last search found.
func (m *meters) leaked(count int) { m.leaks.Store(&count) }

// moved counts a transition: networks in containerd's metrics, failing pods, and the strategy of a
// remap.
func (m *meters) moved(view lifecycle.View) {
	m.stock.moved(view)
	m.failing.moved(view)
	if last := view.Transitions[len(view.Transitions)-1]; last.Event != RemapSnapshot {
		return
	}
	if made, ok := view.Step(RemapSnapshot).Result.(*records.Snapshot); ok {
		m.remaps.WithLabelValues(made.Strategy).Inc()
	}
}

// ran counts one run of a CNI plugin.
func (m *meters) ran(c cni.Command) {
	plugin, network := m.pluginNames.labels(c)
	m.plugins.WithLabelValues(c.Name, plugin, network, outcomeOf(c.Err)).Observe(c.Took.Seconds())
}

// Created counts a creation. It is part of [cri.Sandboxes].
func (c *Controller) Created(took time.Duration, err error) {
	c.meters.creations.WithLabelValues(outcomeOf(err)).Observe(took.Seconds())
}

// CountRetry counts the outcome of a retry, or a sandbox that no caller claimed. It is part of
// [cri.Attempts].
func (c *Controller) CountRetry(event cri.RetryEvent) {
	if event == cri.PodUnclaimed {
		c.meters.unclaimed.Inc()
		return
	}
	c.meters.retries.WithLabelValues(string(event)).Inc()
}

// maxPlugins bounds the pairs of plugin and network with labels of their own. A node has a few.
const maxPlugins = 32

// pluginNames bounds the labels of CNI plugins, since any program on the node may write the
// configuration files that name them.
type pluginNames struct {
	mu   sync.Mutex
	seen map[[2]string]bool
}

func (n *pluginNames) labels(c cni.Command) (plugin, network string) {
	plugin, network = strings.ToValidUTF8(c.Plugin, "?"), strings.ToValidUTF8(c.Network, "?")
	n.mu.Lock()
	defer n.mu.Unlock()
	key := [2]string{plugin, network}
	if !n.seen[key] {
		if len(n.seen) >= maxPlugins {
			return "other", "other"
		}
		if n.seen == nil {
			n.seen = map[[2]string]bool{}
		}
		n.seen[key] = true
	}
	return plugin, network
}

// timedLedger measures the writes to the ledger.
type timedLedger struct {
	lifecycle.Ledger
	meters *meters
}

func (l timedLedger) Append(ctx context.Context, r *ledger.Record) error {
	begun := time.Now()
	err := l.Ledger.Append(ctx, r)
	file := fileLog
	if r.Durable && !r.CanWait {
		file = fileDurable
	}
	l.wrote(ctx, file, begun, err)
	return err
}

func (l timedLedger) Forget(ctx context.Context, k ledger.Key) error {
	begun := time.Now()
	err := l.Ledger.Forget(ctx, k)
	l.wrote(ctx, fileDurable, begun, err)
	return err
}

// wrote counts one write. If the caller gave up, the write counts as canceled, not as failed.
func (l timedLedger) wrote(ctx context.Context, file string, begun time.Time, err error) {
	outcome := outcomeOf(err)
	if err != nil && ctx.Err() != nil {
		outcome = outcomeCanceled
	}
	l.meters.writes.WithLabelValues(file, outcome).Observe(time.Since(begun).Seconds())
}
