package main

import (
	"fmt"
	"slices"
	"strings"
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

// format gives a figure its unit.
func (m measure) format(v float64) string {
	switch {
	case strings.Contains(m.name, "resident memory"), m.name == bytesPerPod:
		if v >= 10<<20 {
			return fmt.Sprintf("%.1f MiB", v/(1<<20))
		}
		return fmt.Sprintf("%.1f KiB", v/(1<<10))
	case m.moreIsBetter(), m.name == syncsPerPod:
		return fmt.Sprintf("%.1f", v)
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

func (r *results) ratioCell(m measure, to string) string {
	ratio, ok := r.ratio(m, podfsmSide, to)
	if !ok {
		return ""
	}
	return m.judge(ratio, m.aimTo(to))
}

// The columns of the table: the sides, and those that podfsm is compared with.
var (
	columns  = []string{floorSide, unmodifiedSide, crioSide, podfsmSide}
	compared = []string{crioSide, unmodifiedSide, floorSide}
)

// table is what was measured, in Markdown.
func (r *results) table(machine string) string {
	var text strings.Builder
	text.WriteString(machine)
	for _, k := range kinds {
		rows := slices.DeleteFunc(slices.Clone(r.rows), func(m measure) bool { return m.kind != k.name || r.isTracing(m) })
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(&text, "\n### %s%s\n\n| | %s | podfsm / %s |\n|---%s|\n", strings.ToUpper(k.name[:1]), k.name[1:],
			strings.Join(columns, " | "), strings.Join(compared, " | podfsm / "), strings.Repeat("|---", len(columns)+len(compared)))
		for _, m := range rows {
			fmt.Fprintf(&text, "| %s |", m.name)
			for _, side := range columns {
				fmt.Fprintf(&text, " %s |", r.cell(m, side))
			}
			for _, side := range compared {
				fmt.Fprintf(&text, " %s |", r.ratioCell(m, side))
			}
			text.WriteString("\n")
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
