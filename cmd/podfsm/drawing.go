package main

import (
	"fmt"
	"math"
	"slices"
	"strings"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/states"
)

// The picture of all states has three columns of boxes, narrow enough for a
// phone; the creation path goes down the first one. All is in pixels.
const (
	boxWidth, boxHeight = 130, 28
	columnGap           = 165
	rowGap              = 66
	margin              = 3
)

// places are where each state stands, in columns and rows.
var places = map[states.State]struct{ column, row float64 }{
	states.New: {0, 0}, states.IDsAllocated: {0, 1}, states.SnapshotRemapped: {0, 2}, states.PauseStarted: {0, 3},
	states.NetNSCaptured: {0, 4}, states.NetworkReady: {0, 5}, states.Ready: {0, 6},
	states.Quarantined: {1, 0}, states.RolledBack: {1, 1.25}, states.RollingBack: {1, 2.5}, states.CleanupOwed: {1, 4},
	states.Removed: {2, 0}, states.Removing: {2, 1.25}, states.Stopped: {2, 2.6}, states.Stopping: {2, 4}, states.NotReady: {2, 6},
}

// drawing is the picture, for the page's template.
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

// draw makes the picture with the path that a sandbox has taken.
func draw(transitions []*podfsmv1.Transition) drawing {
	d := drawing{Width: 2*columnGap + boxWidth + 2*margin, Height: 6*rowGap + boxHeight + 2*margin}
	path := passages(transitions)
	taken := map[states.Transition][]uint64{}
	on := map[states.State]bool{}
	var last states.State
	for _, p := range path {
		if !placed(p.From) || !placed(p.To) || p.Event.Meaning() == "" {
			continue
		}
		taken[p.Transition] = append(taken[p.Transition], p.Seq)
		on[p.From], on[p.To], last = true, true, p.To
	}
	for _, s := range states.All() {
		if placed(s) {
			d.Nodes = append(d.Nodes, nodeOf(s, on[s], s == last))
		}
	}
	for _, t := range edgesWith(path, taken) {
		d.Edges = append(d.Edges, edgeOf(t, taken[t]))
	}
	d.Spoken = text(strings.ReplaceAll(pathOf(transitions), " > ", ", "))
	return d
}

func placed(s states.State) bool {
	_, ok := places[s]
	return ok
}

// edgesWith are the transitions of the table, without those into quarantine,
// which lead there from almost everywhere; and those taken, last so that they
// are on top.
func edgesWith(path []states.Passage, taken map[states.Transition][]uint64) []states.Transition {
	var edges []states.Transition
	for _, t := range states.Table() {
		if t.Event != states.Quarantine && taken[t] == nil {
			edges = append(edges, t)
		}
	}
	for _, p := range path {
		if taken[p.Transition] != nil && !slices.Contains(edges, p.Transition) {
			edges = append(edges, p.Transition)
		}
	}
	return edges
}

func nodeOf(s states.State, on, last bool) node {
	x, y := centre(s)
	return node{
		Name: string(s), Meaning: s.Meaning(), X: x - boxWidth/2, Y: y - boxHeight/2, W: boxWidth, H: boxHeight,
		TextX: x, TextY: y + 4, On: on, Last: last, Ended: s.Terminal(),
	}
}

func centre(s states.State) (x, y float64) {
	at := places[s]
	return margin + boxWidth/2 + at.column*columnGap, margin + boxHeight/2 + at.row*rowGap
}

func edgeOf(t states.Transition, taken []uint64) edge {
	const tip = 7.0
	x1, y1, x2, y2 := ends(t.From, t.To)
	length := math.Hypot(x2-x1, y2-y1)
	dx, dy := (x2-x1)/length, (y2-y1)/length
	e := edge{From: string(t.From), Event: string(t.Event), To: string(t.To), On: taken != nil, Numbers: states.Numbers(taken)}
	baseX, baseY := x2-dx*tip, y2-dy*tip
	e.Line = fmt.Sprintf("M%.1f %.1fL%.1f %.1f", x1, y1, baseX, baseY)
	e.Tip = fmt.Sprintf("M%.1f %.1fL%.1f %.1fL%.1f %.1fZ", x2, y2, baseX-dy*tip/2, baseY+dx*tip/2, baseX+dy*tip/2, baseY-dx*tip/2)
	e.NumberX, e.NumberY = (x1+x2)/2, (y1+y2)/2+4
	return e
}

// ends are where an edge leaves one box and meets the other: above or below
// within a column, else at the side. Where another one leads back, each keeps to
// its right.
func ends(from, to states.State) (x1, y1, x2, y2 float64) {
	apart := 0.0
	if leads(to, from) {
		apart = 8
	}
	x1, y1 = centre(from)
	x2, y2 = centre(to)
	if x1 == x2 {
		half := math.Copysign(boxHeight/2, y2-y1)
		apart = math.Copysign(apart, y1-y2)
		return x1 + apart, y1 + half, x2 + apart, y2 - half
	}
	half := math.Copysign(boxWidth/2, x2-x1)
	apart = math.Copysign(apart, x2-x1)
	return x1 + half, y1 + apart, x2 - half, y2 + apart
}

// leads says whether the table has a way from one state right to the other.
func leads(from, to states.State) bool {
	return slices.ContainsFunc(states.Table(), func(t states.Transition) bool { return t.From == from && t.To == to })
}
