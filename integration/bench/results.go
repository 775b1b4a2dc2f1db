package main

import (
	"fmt"
	"slices"
	"strings"
)

// The measures that several files name.
const (
	cpuTotal   = "CPU time a pod"
	cpuDaemon  = "… of the daemon"
	cpuPlugins = "… of CNI plugins and shim starts"
	cpuRest    = "… of shims, runc and pause"

	tracingStart = "RunPodSandbox, podfsm, by tracing"
	tracingStop  = "StopPodSandbox, podfsm, by tracing"

	syncsStart   = "syncs to disk a pod, start"
	syncsStop    = "syncs to disk a pod, stop"
	syncsRemove  = "syncs to disk a pod, remove"
	bytesWritten = "bytes written to disk a pod"
	ledgerBytes  = "bytes of the ledger's log a pod"

	heapBytes   = "heap bytes"
	rssBytes    = "resident bytes"
	goroutines  = "goroutines"
	descriptors = "file descriptors"
)

// measure is a row of the table.
type measure struct{ name, kind string }

func metric(name string, k kind) measure { return measure{name, k.name} }

// samples are figures by round.
type samples map[int][]float64

// results are all figures, by row and column.
type results struct {
	rows  []measure // in the order in which they came
	cells map[measure]map[string]samples
}

func newResults() *results { return &results{cells: map[measure]map[string]samples{}} }

func (r *results) add(m measure, side string, round int, value float64) {
	if r.cells[m] == nil {
		r.rows = append(r.rows, m)
		r.cells[m] = map[string]samples{}
	}
	if r.cells[m][side] == nil {
		r.cells[m][side] = samples{}
	}
	r.cells[m][side][round] = append(r.cells[m][side][round], value)
}

func (s samples) all() []float64 {
	var all []float64
	for _, of := range s {
		all = append(all, of...)
	}
	slices.Sort(all)
	return all
}

// quantile of sorted figures: the nearest rank.
func quantile(sorted []float64, q float64) float64 {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func (r *results) p50(m measure, side string) float64 { return median(r.cells[m][side].all()) }

// ratio of two columns: the median of the ratios of the rounds, so that what made a whole round slow cancels out.
func (r *results) ratio(m measure, side, to string) (float64, bool) {
	var ratios []float64
	for round, of := range r.cells[m][side] {
		if base := r.cells[m][to][round]; len(base) > 0 && median(base) > 0 {
			ratios = append(ratios, median(of)/median(base))
		}
	}
	if len(ratios) == 0 {
		return 0, false
	}
	return median(ratios), true
}

// aim is what a ratio of podfsm's shall be at most, or at least where more is better.
type aim struct {
	ratio float64
	least bool
}

func (a aim) String() string {
	if a.least {
		return fmt.Sprintf("≥ %.2f", a.ratio)
	}
	return fmt.Sprintf("≤ %.2f", a.ratio)
}

func (a aim) met(ratio float64) bool {
	if a.least {
		return ratio >= a.ratio
	}
	return ratio <= a.ratio
}

// aims are the ratios to an unmodified containerd, of pods with user namespaces.
var aims = map[string]aim{
	"RunPodSandbox, alone":               {ratio: 0.65},
	"StopPodSandbox, alone":              {ratio: 0.6},
	"RemovePodSandbox, alone":            {ratio: 0.15},
	"pods started a second, 8 at a time": {ratio: 1.4, least: true},
	cpuTotal:                             {ratio: 0.8},
	heapBytes + " a sandbox":             {ratio: 1},
	rssBytes + " a sandbox":              {ratio: 1},
	"restart with 300 pods":              {ratio: 0.8},
	"ListPodSandbox with 300 pods":       {ratio: 1.1},
}

// floorAims are those to the floor.
var floorAims = map[string]aim{
	"RunPodSandbox, alone":        {ratio: 1.15},
	"StopPodSandbox, alone":       {ratio: 1.15},
	"RunPodSandbox, 8 at a time":  {ratio: 1.15},
	"StopPodSandbox, 8 at a time": {ratio: 1.15},
}

// aim is that of a row. Pods on host users shall be slower in nothing.
func (m measure) aim() (aim, bool) {
	if m.kind == onHost.name {
		return aim{1, strings.Contains(m.name, " a second")}, !strings.HasPrefix(m.name, "…")
	}
	a, ok := aims[m.name]
	return a, ok
}

func (m measure) floorAim() (aim, bool) {
	a, ok := floorAims[m.name]
	return a, ok && m.kind == userNS.name
}

// format gives a figure its unit.
func (m measure) format(v float64) string {
	switch {
	case strings.Contains(m.name, "bytes"):
		return fmt.Sprintf("%.1f KiB", v/1024)
	case strings.Contains(m.name, " a second"), strings.Contains(m.name, "syncs"):
		return fmt.Sprintf("%.1f", v)
	case strings.HasPrefix(m.name, goroutines), strings.HasPrefix(m.name, descriptors):
		return fmt.Sprintf("%.4g", v)
	default:
		return fmt.Sprintf("%.1f ms", v*1000)
	}
}

func (r *results) cell(m measure, side string) string {
	s := r.cells[m][side]
	if len(s) == 0 {
		return ""
	}
	all := s.all()
	if len(all) == 1 {
		return m.format(all[0])
	}
	return fmt.Sprintf("%s (%s)", m.format(r.p50(m, side)), m.format(quantile(all, 0.95)))
}

func (r *results) ratioCell(m measure, to string, a aim, aimed bool) string {
	ratio, ok := r.ratio(m, podfsmSide, to)
	switch {
	case !ok:
		return ""
	case !aimed:
		return fmt.Sprintf("%.2f", ratio)
	case a.met(ratio):
		return fmt.Sprintf("**%.2f** (aim %s)", ratio, a)
	default:
		return fmt.Sprintf("**%.2f** (aim %s: missed)", ratio, a)
	}
}

// table is what was measured, in Markdown.
func (r *results) table(machine string) string {
	var text strings.Builder
	text.WriteString(machine)
	columns := []string{floorSide, unmodifiedSide, stockSide, podfsmSide}
	for _, k := range []kind{userNS, onHost} {
		rows := slices.DeleteFunc(slices.Clone(r.rows), func(m measure) bool { return m.kind != k.name || r.isTracing(m) })
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(&text, "\n### Pods with %s\n\n| | %s | podfsm / unmodified | podfsm / floor |\n|---|---|---|---|---|---|---|\n",
			map[string]string{userNS.name: "user namespaces", onHost.name: "the node's users"}[k.name], strings.Join(columns, " | "))
		for _, m := range rows {
			fmt.Fprintf(&text, "| %s |", m.name)
			for _, side := range columns {
				fmt.Fprintf(&text, " %s |", r.cell(m, side))
			}
			a, aimed := m.aim()
			fa, floorAimed := m.floorAim()
			fmt.Fprintf(&text, " %s | %s |\n", r.ratioCell(m, unmodifiedSide, a, aimed), r.ratioCell(m, floorSide, fa, floorAimed))
		}
	}
	r.tracingTable(&text)
	return text.String()
}

func (r *results) isTracing(m measure) bool { return m.name == tracingStart || m.name == tracingStop }

// tracingTable compares podfsm with itself.
func (r *results) tracingTable(text *strings.Builder) {
	rows := slices.DeleteFunc(slices.Clone(r.rows), func(m measure) bool { return !r.isTracing(m) })
	if len(rows) == 0 {
		return
	}
	text.WriteString("\n### Tracing\n\n| | off | sampled out | on | sampled out / off | on / off |\n|---|---|---|---|---|---|\n")
	for _, m := range rows {
		sampledOut, _ := r.ratio(m, "sampled out", "off")
		on, _ := r.ratio(m, "on", "off")
		fmt.Fprintf(text, "| %s | %s | %s | %s | %.2f | %.2f |\n", m.name, r.cell(m, "off"), r.cell(m, "sampled out"), r.cell(m, "on"), sampledOut, on)
	}
}
