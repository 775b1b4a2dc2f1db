package states

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// anyState is one node for all source states of an event that is legal in every unfinished state.
// Its many edges would hide the rest of the diagram.
const anyState State = "AnyOther"

// Passage is a transition of a sandbox with its number in the sandbox's history.
type Passage struct {
	Transition
	Seq uint64
}

// Mermaid renders the table as a Mermaid stateDiagram-v2 with the path of a sandbox: the states of
// the path are filled, and its transitions are numbered. It includes states of another release,
// unless their names are not [Drawable].
func (t *Table) Mermaid(path ...Passage) string {
	taken := t.taken(path)
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n")
	fmt.Fprintf(&b, "    state \"any other unfinished state\" as %s\n", anyState)
	fmt.Fprintf(&b, "    [*] --> %s\n", New)
	for _, e := range taken.edges() {
		label := string(e.Event)
		if numbers := taken.numbers[e]; numbers != "" {
			label += " (" + numbers + ")"
		}
		fmt.Fprintf(&b, "    %s --> %s : %s\n", e.From, e.To, label)
	}
	for _, s := range t.terminals() {
		fmt.Fprintf(&b, "    %s --> [*]\n", s)
	}
	if len(taken.states) > 0 {
		b.WriteString("    classDef taken fill:#2563eb,color:#ffffff\n")
		fmt.Fprintf(&b, "    class %s taken\n", strings.Join(taken.names(), ","))
	}
	return b.String()
}

// DOT renders the same as [Table.Mermaid] in Graphviz's language. Terminal states have a double
// border.
func (t *Table) DOT(path ...Passage) string {
	taken := t.taken(path)
	var b strings.Builder
	b.WriteString("digraph sandbox {\n")
	b.WriteString("    node [shape=box, style=rounded];\n")
	fmt.Fprintf(&b, "    %q [label=\"any other unfinished state\", style=dashed];\n", anyState)
	for _, s := range t.terminals() {
		fmt.Fprintf(&b, "    %q [peripheries=2];\n", s)
	}
	for _, name := range taken.names() {
		fmt.Fprintf(&b, "    %q [style=\"rounded,filled\", fillcolor=\"#2563eb\", fontcolor=white];\n", name)
	}
	for _, e := range taken.edges() {
		if numbers := taken.numbers[e]; numbers != "" {
			fmt.Fprintf(&b, "    %q -> %q [label=%q, color=\"#2563eb\", penwidth=2];\n", e.From, e.To, fmt.Sprintf("%s (%s)", e.Event, numbers))
			continue
		}
		fmt.Fprintf(&b, "    %q -> %q [label=%q];\n", e.From, e.To, e.Event)
	}
	b.WriteString("}\n")
	return b.String()
}

// name matches the names of states and events of all releases.
var name = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]{0,63}$`)

// Drawable says whether a diagram can have the names of a transition. A transition from a damaged
// ledger may have any names.
func (t Transition) Drawable() bool {
	return name.MatchString(string(t.From)) && name.MatchString(string(t.Event)) && name.MatchString(string(t.To))
}

// StatesWith returns every state of the table, and the states of a path that the table doesn't
// have, each after its predecessor.
func (t *Table) StatesWith(path []Passage) []State {
	all := t.States()
	add := func(s, after State) {
		if !slices.Contains(all, s) {
			all = slices.Insert(all, slices.Index(all, after)+1, s)
		}
	}
	for _, p := range path {
		if p.Drawable() {
			add(p.From, New)
			add(p.To, p.From)
		}
	}
	return all
}

// taken is the path of a sandbox through the table.
type taken struct {
	table   *Table
	all     []State // of the table and of the path
	states  map[State]bool
	numbers map[Transition]string // of the passages of each transition
	extra   []Transition          // those without an edge in the diagrams
}

func (t *Table) taken(path []Passage) *taken {
	taken := &taken{table: t, all: t.StatesWith(path), states: map[State]bool{}, numbers: map[Transition]string{}}
	of := map[Transition][]uint64{}
	for _, p := range path {
		if !p.Drawable() {
			continue
		}
		taken.states[p.From], taken.states[p.To] = true, true
		if of[p.Transition] == nil && !slices.Contains(t.edges(), p.Transition) {
			taken.extra = append(taken.extra, p.Transition)
		}
		of[p.Transition] = append(of[p.Transition], p.Seq)
	}
	for transition, all := range of {
		taken.numbers[transition] = Numbers(all)
	}
	return taken
}

// Numbers returns the numbers of all passages of a transition; if there are very many, the first
// and the last.
func Numbers(all []uint64) string {
	const most = 4
	var texts []string
	for i, n := range all {
		switch {
		case len(all) <= most || i < most-1 || i == len(all)-1:
			texts = append(texts, fmt.Sprint(n))
		case i == most-1:
			texts = append(texts, "…")
		}
	}
	return strings.Join(texts, ", ")
}

// edges returns the edges of the table and those of the sandbox.
func (t *taken) edges() []Transition { return slices.Concat(t.table.edges(), t.extra) }

// names returns the states on the path, in the order of a sandbox's life.
func (t *taken) names() (names []string) {
	for _, s := range t.all {
		if t.states[s] {
			names = append(names, string(s))
		}
	}
	return names
}

// edges returns the table's transitions. If an event is legal in every unfinished state except its
// target, its sources are folded into anyState.
func (t *Table) edges() []Transition {
	unfinished := slices.DeleteFunc(t.States(), State.Terminal)
	var folded []Transition
	for _, r := range t.rules {
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

func (t *Table) terminals() []State {
	return slices.DeleteFunc(t.States(), func(s State) bool { return !s.Terminal() })
}
