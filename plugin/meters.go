package plugin

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/snapshot/remapping"
	"github.com/podfsm/podfsm/tracing"
)

// meters are podfsm's metrics, as one collector. They are in Prometheus' default registry, which containerd serves on its own endpoint.
// Labels have few values, whatever pods there are. What stands at a moment is counted when somebody asks, from memory: between two
// scrapes nothing runs.
type meters struct {
	controller *Controller
	stock      stockMeters

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

// The metrics that are counted when somebody asks.
var (
	sandboxesDesc = describe("sandboxes", "Sandboxes that podfsm has, by state.", "state")
	stepAgeDesc   = describe("unfinished_step_age_seconds",
		"How long the oldest try at a step is under way, by step and by what is done with it; 0 when there is none.", "step", "act")
	debtsDesc    = describe("debts", "Undos that have failed and are tried again, by step.", "step")
	debtAgeDesc  = describe("debt_age_seconds", "Since when the oldest of them is owed, by step; 0 when there is none.", "step")
	rangesDesc   = describe("id_ranges", "Ranges of the pool of host ids, by state. There are none without a pool.", "state")
	ledgerDesc   = describe("ledger_size_bytes", "Size of the ledger's files: the one that outlives a reboot, and the log of this boot.", "file")
	layersDesc   = describe("remap_layers_total", "Layers that were made to give images the owners of user namespaces, by strategy.", "strategy")
	inodesDesc   = describe("remap_inodes_total", "Inodes that have got other owners in them, by strategy.", "strategy")
	bytesDesc    = describe("remap_bytes_total", "Size of the files that have got other owners in them, by strategy; metacopy copies none of it.", "strategy")
	remapSecDesc = describe("remap_seconds_total", "Time that making them took, by strategy.", "strategy")
	refusesDesc  = describe("refuses_pods", "Whether podfsm runs degraded and refuses every pod, for the reason in the log: 1 or 0.")
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("podfsm_"+name, help, labels, nil)
}

var (
	// secondsOfSteps span from a step that has nothing to do, over a CNI chain of 50 ms, to the deadlines of minutes.
	secondsOfSteps = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 180}
	// secondsOfWrites span from an append to a log on a tmpfs to an fsync on a disk in trouble.
	secondsOfWrites = []float64{.00001, .000025, .0001, .00025, .001, .0025, .01, .025, .1, .25, 1, 5}
)

func newMeters(c *Controller) *meters {
	m := &meters{
		controller: c,
		stock:      findStockMeters(),
		steps: seconds("step_duration_seconds",
			"Time of each try at a step, by step, by what is done with it (do, undo, stop, check) and by outcome.", secondsOfSteps, "step", "act", "outcome"),
		stepErrors: count("step_errors_total", "Tries at a step that have failed, by step, by what was done with it and by the error's class.", "step", "act", "error_type"),
		plugins: seconds("cni_command_duration_seconds",
			"Time of each run of a CNI plugin, by command, by the plugin's type, by network and by outcome.", secondsOfSteps, "command", "plugin", "network", "outcome"),
		creations:  seconds("creation_duration_seconds", "Time of each creation of a pod sandbox by CRI, with the pull of the pause image if there is one, by outcome.", secondsOfSteps, "outcome"),
		retries:    count("retries_total", "Repeated requests for a pod sandbox that was being made or finished, by what became of them.", "outcome"),
		unclaimed:  prometheus.NewCounter(prometheus.CounterOpts{Name: "podfsm_unclaimed_total", Help: "Finished pod sandboxes that were discarded, because nobody asked for them again."}),
		recoveries: seconds("recovery_duration_seconds", "Time to take up a sandbox after a restart of containerd, by what became of it.", secondsOfSteps, "outcome"),
		remaps:     count("remaps_total", "Root file systems of sandboxes, by how their ids were mapped.", "strategy"),
		writes:     seconds("ledger_write_duration_seconds", "Time of each write to the ledger, by file and by outcome.", secondsOfWrites, "file", "outcome"),
		writeOffs:  count("cleanups_written_off_total", "Undos, or parts of them, that were given up, by step and by who did it: the operator, or the bound of the tries after a reboot.", "step", "by"),
	}
	// What hasn't happened yet is 0, so that its first time is an increase.
	for _, outcome := range []string{outcomeOK, outcomeError} {
		m.creations.WithLabelValues(outcome)
	}
	for _, file := range []string{fileDurable, fileLog} {
		m.writes.WithLabelValues(file, outcomeOK)
		m.writes.WithLabelValues(file, outcomeError)
	}
	for _, outcome := range []cri.Happening{cri.RetryJoined, cri.RetryTook, cri.RetrySuperseded} {
		m.retries.WithLabelValues(string(outcome))
	}
	for _, outcome := range lifecycle.Recoveries() {
		m.recoveries.WithLabelValues(string(outcome))
	}
	m.writeOffs.WithLabelValues(string(AttachNetwork), string(lifecycle.ByReboot))
	for _, step := range Steps() {
		m.writeOffs.WithLabelValues(string(step.Name), string(lifecycle.ByOperator))
		m.steps.WithLabelValues(string(step.Name), string(lifecycle.ActDo), string(lifecycle.OutcomeError))
		m.steps.WithLabelValues(string(step.Name), string(lifecycle.ActUndo), string(lifecycle.OutcomeError))
	}
	return m
}

func seconds(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "podfsm_" + name, Help: help, Buckets: buckets}, labels)
}

func count(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "podfsm_" + name, Help: help}, labels)
}

// vectors are the metrics that are kept.
func (m *meters) vectors() []prometheus.Collector {
	return []prometheus.Collector{m.steps, m.stepErrors, m.plugins, m.creations, m.retries, m.unclaimed, m.recoveries, m.remaps, m.writes, m.writeOffs}
}

// Describe implements prometheus.Collector.
func (m *meters) Describe(descs chan<- *prometheus.Desc) {
	for _, v := range m.vectors() {
		v.Describe(descs)
	}
	for _, d := range []*prometheus.Desc{sandboxesDesc, stepAgeDesc, debtsDesc, debtAgeDesc, rangesDesc, ledgerDesc, layersDesc, inodesDesc, bytesDesc, remapSecDesc, refusesDesc} {
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
	refuses := 0.0
	if c.well() != nil {
		refuses = 1
	}
	gauge(refusesDesc, refuses)
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
			log.L.WithError(err).Debug("podfsm: a metric is left out") // each scrape would say so; the writes that fail are counted
			return
		}
		gauge(ledgerDesc, float64(durable), fileDurable)
		gauge(ledgerDesc, float64(recent), fileLog)
	}
}

// remapper is what remaps images, and counts it.
type remapper interface {
	Totals() map[remapping.Strategy]remapping.Totals
}

func collectRemaps(totals map[remapping.Strategy]remapping.Totals, metrics chan<- prometheus.Metric) {
	for _, strategy := range []remapping.Strategy{remapping.Metacopy, remapping.Chown} { // idmap makes none
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
	for act, since := range census.Acts {
		gauge(stepAgeDesc, age(since), string(act.Step), string(act.Kind))
	}
	for step, debt := range census.Debts {
		gauge(debtsDesc, float64(debt.Count), string(step))
		gauge(debtAgeDesc, age(debt.Since), string(step))
	}
}

const (
	outcomeOK       = "ok"
	outcomeError    = "error"
	outcomeCanceled = "canceled" // whoever wanted it had gone

	fileDurable = "durable"
	fileLog     = "log"
)

func outcomeOf(err error) string {
	if err != nil {
		return outcomeError
	}
	return outcomeOK
}

// Acted implements lifecycle.Meter.
func (m *meters) Acted(act lifecycle.Act, outcome lifecycle.Outcome) {
	m.steps.WithLabelValues(string(act.Step), string(act.Kind), string(outcome)).Observe(act.Ended.Sub(act.Started).Seconds())
	if outcome == lifecycle.OutcomeError {
		m.stepErrors.WithLabelValues(string(act.Step), string(act.Kind), tracing.KnownClass(act.Err)).Inc()
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

// moved counts what only the result of a step tells.
func (m *meters) moved(view lifecycle.View) {
	m.stock.moved(view)
	if last := view.Transitions[len(view.Transitions)-1]; last.Event != RemapSnapshot {
		return
	}
	if made, ok := view.Step(RemapSnapshot).Result.(*records.Snapshot); ok {
		m.remaps.WithLabelValues(made.Strategy).Inc()
	}
}

// ran counts a run of a CNI plugin.
func (m *meters) ran(c cni.Command) {
	plugin, network := m.pluginNames.labels(c)
	m.plugins.WithLabelValues(c.Name, plugin, network, outcomeOf(c.Err)).Observe(c.Took.Seconds())
}

// Created tells how a creation went, for the front.
func (c *Controller) Created(took time.Duration, err error) {
	c.meters.creations.WithLabelValues(outcomeOf(err)).Observe(took.Seconds())
}

// Happened counts what becomes of retries, for the front.
func (c *Controller) Happened(what cri.Happening) {
	if what == cri.PodUnclaimed {
		c.meters.unclaimed.Inc()
		return
	}
	c.meters.retries.WithLabelValues(string(what)).Inc()
}

// maxPlugins is how many plugins of networks have labels of their own; a node has a few.
const maxPlugins = 32

// pluginNames bound the labels of CNI plugins: they come from files that are written while containerd runs.
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

// timedLedger is the ledger with a meter on its writes.
type timedLedger struct {
	lifecycle.Journal
	meters *meters
}

func (l timedLedger) Append(ctx context.Context, r *journal.Record) error {
	begun := time.Now()
	err := l.Journal.Append(ctx, r)
	file := fileLog
	if r.Durable && !r.CanWait {
		file = fileDurable
	}
	l.wrote(ctx, file, begun, err)
	return err
}

func (l timedLedger) Forget(ctx context.Context, k journal.Key) error {
	begun := time.Now()
	err := l.Journal.Forget(ctx, k)
	l.wrote(ctx, fileDurable, begun, err)
	return err
}

// wrote tells a write that failed from one that nobody waited for.
func (l timedLedger) wrote(ctx context.Context, file string, begun time.Time, err error) {
	outcome := outcomeOf(err)
	if err != nil && ctx.Err() != nil {
		outcome = outcomeCanceled
	}
	l.meters.writes.WithLabelValues(file, outcome).Observe(time.Since(begun).Seconds())
}
