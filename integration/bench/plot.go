package main

import (
	"fmt"
	"slices"
	"strings"
)

// The plot's measures, in pixels.
const (
	labelWidth = 300
	barWidth   = 420 // of ratio 1.5, which is the end of the scale
	barHeight  = 16
	rowHeight  = 28
	topMargin  = 56
	scale      = 1.5
)

// plot is an SVG of the rows that have an aim: podfsm beside an unmodified containerd, the floor and the aim marked.
func (r *results) plot() string {
	rows := slices.DeleteFunc(slices.Clone(r.rows), func(m measure) bool {
		_, aimed := m.aim()
		_, floorAimed := m.floorAim()
		_, measured := r.ratio(m, podfsmSide, unmodifiedSide)
		return m.kind != userNS.name || !measured || !aimed && !floorAimed
	})
	var svg strings.Builder
	height := topMargin + rowHeight*len(rows) + 10
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
<text x="10" y="18" font-size="14">podfsm relative to an unmodified containerd (1.0), pods with user namespaces</text>
<text x="10" y="36" fill="#555">bar: podfsm; red line: the aim; dotted line: the floor; shorter is better, except for pods a second</text>
`, labelWidth+barWidth+80, height)
	fmt.Fprintf(&svg, `<line x1="%[1]d" y1="%[2]d" x2="%[1]d" y2="%[3]d" stroke="#888"/>`+"\n", x(1), topMargin-8, height-6)
	for i, m := range rows {
		r.bar(&svg, m, topMargin+rowHeight*i)
	}
	svg.WriteString("</svg>\n")
	return svg.String()
}

// bar draws one row.
func (r *results) bar(svg *strings.Builder, m measure, y int) {
	ratio, _ := r.ratio(m, podfsmSide, unmodifiedSide)
	fmt.Fprintf(svg, `<text x="10" y="%d">%s</text>`+"\n", y+13, m.name)
	fmt.Fprintf(svg, `<rect x="%d" y="%d" width="%d" height="%d" fill="#4878a8"/>`+"\n", labelWidth, y, x(ratio)-labelWidth, barHeight)
	fmt.Fprintf(svg, `<text x="%d" y="%d">%.2f</text>`+"\n", x(ratio)+6, y+13, ratio)
	if a, aimed := m.aim(); aimed {
		mark(svg, a.ratio, y, `stroke="#c03030" stroke-width="2"`)
	}
	if floor, measured := r.ratio(m, floorSide, unmodifiedSide); measured {
		mark(svg, floor, y, `stroke="black" stroke-width="2" stroke-dasharray="3,2"`)
	}
}

func mark(svg *strings.Builder, ratio float64, y int, style string) {
	fmt.Fprintf(svg, `<line x1="%[1]d" y1="%[2]d" x2="%[1]d" y2="%[3]d" %[4]s/>`+"\n", x(ratio), y-4, y+barHeight+4, style)
}

// x is where a ratio stands; what is beyond the scale stands at its end.
func x(ratio float64) int { return labelWidth + int(min(ratio, scale)/scale*barWidth) }
