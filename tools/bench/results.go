package main

import (
	"fmt"
	"slices"
	"strings"
)

// measure is a row of the table.
type measure struct{ name, kind string }

func metric(name string, k kind) measure { return measure{name, k.name} }

// samples are numbers by round.
type samples map[int][]float64

// results are all numbers, by row and column.
type results struct {
	rows        []measure // in the order in which they came
	cells       map[measure]map[string]samples
	comparisons []comparison
}

// comparison is a table that compares a daemon with itself: the other columns with the first one.
type comparison struct {
	kind    kind
	columns []string
}

// compare makes a table with these columns of the rows of a kind.
func (r *results) compare(k kind, columns ...string) {
	r.comparisons = append(r.comparisons, comparison{k, columns})
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

// quantile returns a quantile of sorted numbers by the nearest rank.
func quantile(sorted []float64, q float64) float64 {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func (r *results) p50(m measure, side string) float64 { return median(r.cells[m][side].all()) }

// ratio returns the ratio of two columns: the median of the ratios of the rounds, which cancels out
// what made a whole round slow.
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

// format returns a number with its unit.
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

// The columns of the table: the sides, and those against which podfsm is compared.
var (
	columns  = []string{floorSide, unmodifiedSide, crioSide, podfsmSide}
	compared = []string{crioSide, unmodifiedSide, floorSide}
)

// table returns the results in Markdown.
func (r *results) table(machine string) string {
	var text strings.Builder
	text.WriteString(machine)
	for _, k := range kinds {
		rows := r.rowsOf(k)
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(&text, "\n### %s\n\n| | %s | podfsm / %s |\n|---%s|\n", k.title(),
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
	for _, c := range r.comparisons {
		r.comparisonTable(&text, c)
	}
	return text.String()
}

// rowsOf returns the rows about pods of a kind.
func (r *results) rowsOf(k kind) []measure {
	return slices.DeleteFunc(slices.Clone(r.rows), func(m measure) bool { return m.kind != k.name })
}

func (r *results) comparisonTable(text *strings.Builder, c comparison) {
	base, others := c.columns[0], c.columns[1:]
	fmt.Fprintf(text, "\n### %s\n\n| | %s |", c.kind.title(), strings.Join(c.columns, " | "))
	for _, column := range others {
		fmt.Fprintf(text, " %s / %s |", column, base)
	}
	fmt.Fprintf(text, "\n|---%s|\n", strings.Repeat("|---", len(c.columns)+len(others)))
	for _, m := range r.rowsOf(c.kind) {
		fmt.Fprintf(text, "| %s |", m.name)
		for _, column := range c.columns {
			fmt.Fprintf(text, " %s |", r.cell(m, column))
		}
		for _, column := range others {
			ratio, _ := r.ratio(m, column, base) // each round measures all columns
			fmt.Fprintf(text, " %s |", m.judge(ratio, 0))
		}
		text.WriteString("\n")
	}
}
