package main

import (
	"fmt"
	"slices"
	"strings"
)

// The sizes of the plot in pixels.
const (
	labelWidth = 430
	barWidth   = 560 // of the ratio scale
	barHeight  = 11
	rowHeight  = 36
	topMargin  = 64
	scale      = 3.5
)

// The colours of the bars.
var barColours = map[string]string{podfsmSide: "#4878a8", crioSide: "#c8a050"}

// plot returns an SVG of the rows with an aim: podfsm and CRI-O relative to an unmodified
// containerd, with marks for the floor and the aim.
func (r *results) plot() string {
	rows := slices.DeleteFunc(slices.Clone(r.rows), func(m measure) bool {
		_, measured := r.ratio(m, podfsmSide, unmodifiedSide)
		return m.kind != userNS.name || !measured || !m.aimed()
	})
	var svg strings.Builder
	height := topMargin + rowHeight*len(rows) + 10
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
<text x="10" y="18" font-size="14">podfsm and CRI-O relative to an unmodified containerd (1.0), pods with user namespaces</text>
<text x="10" y="36" fill="#555"><tspan fill="%[3]s">■</tspan> podfsm, <tspan fill="%[4]s">■</tspan> CRI-O; red line: podfsm's aim; dotted line: the floor</text>
<text x="10" y="52" fill="#555">Shorter is better, except for rows per second.</text>
`, labelWidth+barWidth+20, height, barColours[podfsmSide], barColours[crioSide])
	fmt.Fprintf(&svg, `<line x1="%[1]d" y1="%[2]d" x2="%[1]d" y2="%[3]d" stroke="#888"/>`+"\n", x(1), topMargin-8, height-6)
	for i, m := range rows {
		r.row(&svg, m, topMargin+rowHeight*i)
	}
	svg.WriteString("</svg>\n")
	return svg.String()
}

// row draws the bars and marks of a row.
func (r *results) row(svg *strings.Builder, m measure, y int) {
	fmt.Fprintf(svg, `<text x="10" y="%d">%s</text>`+"\n", y+15, m.name)
	for i, side := range []string{podfsmSide, crioSide} {
		ratio, measured := r.ratio(m, side, unmodifiedSide)
		if !measured {
			continue
		}
		top := y + i*barHeight
		fmt.Fprintf(svg, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", labelWidth, top, x(ratio)-labelWidth, barHeight, barColours[side])
		fmt.Fprintf(svg, `<text x="%d" y="%d" font-size="10" text-anchor="end">%.2f</text>`+"\n", labelWidth-6, top+barHeight-2, ratio)
	}
	if aim := m.aimTo(unmodifiedSide); aim > 0 {
		mark(svg, aim, y, `stroke="#c03030" stroke-width="2"`)
	}
	if floor, measured := r.ratio(m, floorSide, unmodifiedSide); measured {
		mark(svg, floor, y, `stroke="black" stroke-width="2" stroke-dasharray="3,2"`)
	}
}

func mark(svg *strings.Builder, ratio float64, y int, style string) {
	fmt.Fprintf(svg, `<line x1="%[1]d" y1="%[2]d" x2="%[1]d" y2="%[3]d" %[4]s/>`+"\n", x(ratio), y-3, y+2*barHeight+3, style)
}

// x returns the position of a ratio. A ratio beyond the scale is at its end.
func x(ratio float64) int { return labelWidth + int(min(ratio, scale)/scale*barWidth) }
