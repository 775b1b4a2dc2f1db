package states

import (
	"fmt"
	"slices"
	"strings"
)

// anyState stands in the diagrams for all source states of an event that is
// legal wherever a sandbox has not ended, so that its edges don't hide the rest.
const anyState State = "AnyOther"

// Mermaid renders the table as a Mermaid stateDiagram-v2.
func Mermaid() string {
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n")
	fmt.Fprintf(&b, "    state \"any other unfinished state\" as %s\n", anyState)
	fmt.Fprintf(&b, "    [*] --> %s\n", New)
	for _, e := range edges() {
		fmt.Fprintf(&b, "    %s --> %s : %s\n", e.From, e.To, e.Event)
	}
	for _, s := range terminals() {
		fmt.Fprintf(&b, "    %s --> [*]\n", s)
	}
	return b.String()
}

// DOT renders the table in Graphviz's language. Terminal states have a double
// border.
func DOT() string {
	var b strings.Builder
	b.WriteString("digraph sandbox {\n")
	b.WriteString("    node [shape=box, style=rounded];\n")
	fmt.Fprintf(&b, "    %q [label=\"any other unfinished state\", style=dashed];\n", anyState)
	for _, s := range terminals() {
		fmt.Fprintf(&b, "    %q [peripheries=2];\n", s)
	}
	for _, e := range edges() {
		fmt.Fprintf(&b, "    %q -> %q [label=%q];\n", e.From, e.To, e.Event)
	}
	b.WriteString("}\n")
	return b.String()
}

// edges returns the table with the sources of an event that is legal in every
// unfinished state but its target folded into anyState.
func edges() []Transition {
	var unfinished []State
	for _, s := range All() {
		if !s.Terminal() {
			unfinished = append(unfinished, s)
		}
	}
	var folded []Transition
	for _, r := range rules {
		legalAnywhere := !slices.ContainsFunc(unfinished, func(s State) bool {
			return s != r.to && !slices.Contains(r.from, s)
		})
		sources := r.from
		if legalAnywhere {
			sources = []State{anyState}
		}
		for _, from := range sources {
			folded = append(folded, Transition{From: from, Event: r.event, To: r.to})
		}
	}
	return folded
}

func terminals() []State {
	return slices.DeleteFunc(All(), func(s State) bool { return !s.Terminal() })
}
