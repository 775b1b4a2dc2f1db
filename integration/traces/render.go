package traces

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Render draws spans as trees with one line per span. Children are below their parent, in the
// order of their start:
//
//   - sandbox.run ERROR "failed to …"
//     k8s.pod.name = web
//     event exception
//     exception.message = …
//     link sandbox.run
//   - sandbox.allocate_ids
//
// A span whose parent is not among spans is a root. Span ids, trace ids and times are left out.
// normalise, if set, replaces the value of an attribute, and a status message or an event's name
// under the keys "status" and "event". If ok is false, the value is left out. A link has the name of
// the span to which it points, or "elsewhere".
func Render(spans []Span, normalise func(key, value string) (_ string, ok bool)) string {
	if normalise == nil {
		normalise = func(_, value string) (string, bool) { return value, true }
	}
	r := renderer{normalise: normalise, names: map[string]string{}, children: map[string][]Span{}}
	for _, s := range spans {
		r.names[s.SpanID] = s.Name
	}
	for _, s := range spans {
		parent := s.ParentID
		if r.names[parent] == "" {
			parent = ""
		}
		r.children[parent] = append(r.children[parent], s)
	}
	r.tree("", "")
	return r.out.String()
}

type renderer struct {
	normalise func(key, value string) (string, bool)
	names     map[string]string // by span id
	children  map[string][]Span // by parent's span id
	out       strings.Builder
}

func (r *renderer) tree(parent, indent string) {
	children := r.children[parent]
	slices.SortStableFunc(children, func(a, b Span) int {
		return cmp.Or(a.Start.Compare(b.Start), strings.Compare(a.Name, b.Name))
	})
	for _, s := range children {
		r.span(s, indent)
		r.tree(s.SpanID, indent+"  ")
	}
}

func (r *renderer) span(s Span, indent string) {
	r.out.WriteString(indent + "- " + s.Name)
	if s.Failed {
		r.out.WriteString(" ERROR")
		if message, ok := r.normalise("status", s.Message); ok {
			fmt.Fprintf(&r.out, " %q", message)
		}
	}
	r.out.WriteString("\n")

	indent += "    "
	r.attributes(s.Attributes, indent)
	for _, e := range s.Events {
		if name, ok := r.normalise("event", e.Name); ok {
			r.out.WriteString(indent + "event " + name + "\n")
			r.attributes(e.Attributes, indent+"  ")
		}
	}
	for _, l := range s.Links {
		r.out.WriteString(indent + "link " + cmp.Or(r.names[l.SpanID], "elsewhere") + "\n")
		r.attributes(l.Attributes, indent+"  ")
	}
}

func (r *renderer) attributes(attributes map[string]string, indent string) {
	for _, key := range slices.Sorted(maps.Keys(attributes)) {
		if value, ok := r.normalise(key, attributes[key]); ok {
			r.out.WriteString(indent + key + " = " + value + "\n")
		}
	}
}
