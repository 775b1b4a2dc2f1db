package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/states"
)

// The diagram of states has three columns of boxes, narrow enough for a phone. The first column is
// the creation path, with the boxes of this release's table and of the sandbox's own path. The unit
// is a pixel.
const (
	boxWidth, boxHeight = 130, 28
	columnGap           = 165
	rowGap              = 66
	margin              = 3
)

// minRows is the minimal distance in rows from the first to the last state, so that the states off
// the creation path fit beside it.
const minRows = 6

// offPath is the position of each state off the creation path: its column, and its place between
// the first and the last state of the path.
var offPath = map[states.State]struct{ column, place float64 }{
	states.Quarantined: {1, 0}, states.RolledBack: {1, 0.21}, states.RollingBack: {1, 0.42}, states.CleanupOwed: {1, 0.67},
	states.Removed: {2, 0}, states.Removing: {2, 0.21}, states.Stopped: {2, 0.43}, states.Stopping: {2, 0.67}, states.NotReady: {2, 1},
}

// drawing is the diagram, for the template of the page.
type drawing struct {
	Width, Height int
	Nodes         []node
	Edges         []edge
	Spoken        text // the path in words
}

type node struct {
	Name, Meaning   string
	X, Y, W, H      float64
	TextX, TextY    float64
	On, Last, Ended bool
}

type edge struct {
	From, Event, To  string
	Line, Tip        string // as an SVG path's data
	On               bool
	Numbers          string
	NumberX, NumberY float64
}

// plan has the position of every state: those of the table, and those of another release in the
// path of the sandbox.
type plan struct {
	table *states.Table
	all   []states.State
	rows  float64
	at    map[states.State]struct{ x, y float64 }
}

func newPlan(table *states.Table, path []states.Passage) *plan {
	p := &plan{table: table, all: table.StatesWith(path), at: map[states.State]struct{ x, y float64 }{}}
	column := slices.DeleteFunc(slices.Clone(p.all), func(s states.State) bool { _, off := offPath[s]; return off })
	last := float64(len(column) - 1)
	p.rows = max(minRows, last)
	place := func(s states.State, column, row float64) {
		p.at[s] = struct{ x, y float64 }{margin + boxWidth/2 + column*columnGap, margin + boxHeight/2 + row*rowGap}
	}
	for i, s := range column {
		place(s, 0, float64(i)*p.rows/last)
	}
	for s, at := range offPath {
		place(s, at.column, at.place*p.rows)
	}
	return p
}

// draw returns the diagram with the path of a sandbox.
func draw(table *states.Table, transitions []*podfsmv1.Transition) drawing {
	path := slices.DeleteFunc(passages(transitions), func(p states.Passage) bool { return !p.Drawable() })
	p := newPlan(table, path)
	d := drawing{Width: 2*columnGap + boxWidth + 2*margin, Height: int(p.rows*rowGap) + boxHeight + 2*margin}
	taken := map[states.Transition][]uint64{}
	on := map[states.State]bool{}
	var last states.State
	for _, passage := range path {
		taken[passage.Transition] = append(taken[passage.Transition], passage.Seq)
		on[passage.From], on[passage.To], last = true, true, passage.To
	}
	for _, s := range p.all {
		d.Nodes = append(d.Nodes, p.node(s, on[s], s == last))
	}
	for _, t := range p.edges(path, taken) {
		d.Edges = append(d.Edges, p.edge(t, taken[t]))
	}
	d.Spoken = text(strings.ReplaceAll(pathOf(transitions), " > ", ", "))
	return d
}

// edges returns the transitions of the table, except for those into quarantine, which come from
// almost every state. The transitions of the path come last, so that they are drawn on top.
func (p *plan) edges(path []states.Passage, taken map[states.Transition][]uint64) []states.Transition {
	var edges []states.Transition
	for _, t := range p.table.Transitions() {
		if t.Event != states.Quarantine && taken[t] == nil {
			edges = append(edges, t)
		}
	}
	for _, passage := range path {
		if !slices.Contains(edges, passage.Transition) && passage.From != passage.To {
			edges = append(edges, passage.Transition)
		}
	}
	return edges
}

func (p *plan) node(s states.State, on, last bool) node {
	at := p.at[s]
	return node{
		Name: string(s), Meaning: cmp.Or(p.table.Meaning(s), "Another release of podfsm has this state."),
		X: at.x - boxWidth/2, Y: at.y - boxHeight/2, W: boxWidth, H: boxHeight,
		TextX: at.x, TextY: at.y + 4, On: on, Last: last, Ended: s.Terminal(),
	}
}

func (p *plan) edge(t states.Transition, taken []uint64) edge {
	const tip = 7.0
	x1, y1, x2, y2 := p.ends(t.From, t.To)
	length := math.Hypot(x2-x1, y2-y1)
	dx, dy := (x2-x1)/length, (y2-y1)/length
	e := edge{From: string(t.From), Event: string(t.Event), To: string(t.To), On: taken != nil, Numbers: states.Numbers(taken)}
	baseX, baseY := x2-dx*tip, y2-dy*tip
	e.Line = fmt.Sprintf("M%.1f %.1fL%.1f %.1f", x1, y1, baseX, baseY)
	e.Tip = fmt.Sprintf("M%.1f %.1fL%.1f %.1fL%.1f %.1fZ", x2, y2, baseX-dy*tip/2, baseY+dx*tip/2, baseX+dy*tip/2, baseY-dx*tip/2)
	e.NumberX, e.NumberY = (x1+x2)/2, (y1+y2)/2+4
	return e
}

// ends returns where an edge leaves one box and meets the other: above or below within a column,
// else at the side. If another edge leads back, each keeps to its right.
func (p *plan) ends(from, to states.State) (x1, y1, x2, y2 float64) {
	apart := 0.0
	if p.leads(to, from) {
		apart = 8
	}
	x1, y1, x2, y2 = p.at[from].x, p.at[from].y, p.at[to].x, p.at[to].y
	if x1 == x2 {
		half := math.Copysign(boxHeight/2, y2-y1)
		apart = math.Copysign(apart, y1-y2)
		return x1 + apart, y1 + half, x2 + apart, y2 - half
	}
	half := math.Copysign(boxWidth/2, x2-x1)
	apart = math.Copysign(apart, x2-x1)
	return x1 + half, y1 + apart, x2 - half, y2 + apart
}

// leads reports whether the table has a transition from one state to the other.
func (p *plan) leads(from, to states.State) bool {
	return slices.ContainsFunc(p.table.Transitions(), func(t states.Transition) bool { return t.From == from && t.To == to })
}
