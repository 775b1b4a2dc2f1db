package main

import (
	"cmp"
	"slices"
	"strings"
	"time"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
)

// idle is how long nothing may go on before a waterfall is broken off and goes
// on with a scale of its own: a pod may live for months.
const idle = time.Second

// ending is how a try went.
type ending string

const (
	succeeded  ending = "done"
	skipped    ending = "skipped"
	failed     ending = "failed"
	undone     ending = "undone"
	undoFailed ending = "undo failed"
	underWay   ending = "under way"
	unknownEnd ending = "interrupted"
)

// marks draw an ending in a terminal.
var marks = map[ending]string{succeeded: "=", skipped: ".", failed: "x", undone: "-", undoFailed: "!", underWay: "~", unknownEnd: "?"}

// writeOff is the kind of an act that gave an undo up. It takes no time.
const writeOff = "write-off"

// lane is a line of a waterfall: one try at something.
type lane struct {
	label  string
	nested bool // it is a part of the lane above it that isn't
	when   period
	timed  bool // when is known
	ending ending
	err    string
}

// stretch is a part of a sandbox's life in which something went on.
type stretch struct {
	title string
	whole period
	lanes []lane
}

// waterfall are the stretches of a sandbox's life, in their order.
func waterfall(r *podfsmv1.InspectResponse, now time.Time) []stretch {
	var all []stretch
	for _, group := range together(r, now) {
		s := stretch{whole: group[0].when, title: titleOf(r, group)}
		for _, l := range group {
			if l.timed && l.when.end.After(s.whole.end) {
				s.whole.end = l.when.end
			}
		}
		s.lanes = group
		all = append(all, s)
	}
	return all
}

// together are a sandbox's lanes, those without a pause between them together.
func together(r *podfsmv1.InspectResponse, now time.Time) [][]lane {
	var groups [][]lane
	var end time.Time
	for _, family := range families(r, now) {
		first := family[0]
		if len(groups) == 0 || first.when.start.Sub(end) > idle {
			groups = append(groups, nil)
		}
		if first.when.end.After(end) {
			end = first.when.end
		}
		groups[len(groups)-1] = append(groups[len(groups)-1], family...)
	}
	return groups
}

// families are the acts of a sandbox, each with those of the CNI plugins that
// were run for it, in the order in which they began.
func families(r *podfsmv1.InspectResponse, now time.Time) [][]lane {
	var all [][]lane
	var acts []*podfsmv1.Act
	for _, act := range r.GetActs() {
		if act.GetPlugin() == "" && act.GetStartedAt() != nil && act.GetKind() != writeOff {
			all, acts = append(all, []lane{laneOf(r, act, now)}), append(acts, act)
		}
	}
	for _, act := range r.GetActs() {
		if act.GetPlugin() == "" || act.GetKind() == writeOff {
			continue
		}
		if i := parentOf(act, acts); i >= 0 {
			l := laneOf(r, act, now)
			l.nested = true
			all[i] = append(all[i], l)
		}
	}
	return all
}

// parentOf is the act that a plugin was run for: the last one of its kind that
// had begun by then. It is -1 when there is none.
func parentOf(plugin *podfsmv1.Act, acts []*podfsmv1.Act) int {
	kind := "do"
	if plugin.GetKind() == "DEL" {
		kind = "undo"
	}
	for i, act := range slices.Backward(acts) {
		late := plugin.GetStartedAt() != nil && act.GetStartedAt().AsTime().After(plugin.GetStartedAt().AsTime())
		if act.GetStep() == plugin.GetStep() && act.GetKind() == kind && !late {
			return i
		}
	}
	return -1
}

func laneOf(r *podfsmv1.InspectResponse, act *podfsmv1.Act, now time.Time) lane {
	l := lane{label: labelOf(act), ending: endingOf(r, act), err: act.GetError(), timed: act.GetStartedAt() != nil}
	start := act.GetStartedAt().AsTime()
	l.when = period{start, start.Add(act.GetDuration().AsDuration())}
	if l.ending == underWay && now.After(start) {
		l.when.end = now
	}
	return l
}

func labelOf(act *podfsmv1.Act) string {
	switch {
	case act.GetPlugin() != "":
		return act.GetPlugin() + " " + act.GetKind()
	case act.GetKind() == "do":
		return act.GetStep()
	default:
		return act.GetKind() + " " + act.GetStep()
	}
}

func endingOf(r *podfsmv1.InspectResponse, act *podfsmv1.Act) ending {
	does := act.GetKind() == "do" || act.GetKind() == "ADD"
	ended := act.GetDuration() != nil || act.GetStartedAt() == nil
	status := statusOf(r, act.GetStep())
	switch {
	case act.GetError() != "" && does:
		return failed
	case act.GetError() != "":
		return undoFailed
	case !ended && (status == "running" || status == "undoing" || act.GetKind() == "stop"): // on no record, so it is today's
		return underWay
	case !ended:
		return unknownEnd
	case !does:
		return undone
	case act.GetKind() == "do" && status == "skipped":
		return skipped
	default:
		return succeeded
	}
}

func statusOf(r *podfsmv1.InspectResponse, step string) string {
	for _, s := range r.GetSteps() {
		if s.GetName() == step {
			return s.GetStatus()
		}
	}
	return ""
}

// titleOf says what a stretch was about.
func titleOf(r *podfsmv1.InspectResponse, lanes []lane) string {
	does := slices.ContainsFunc(lanes, creates)
	demanded := slices.ContainsFunc(lanes, onDemand)
	ends := slices.ContainsFunc(lanes, func(l lane) bool { return !l.nested && undoes(l) })
	rolledBack := slices.ContainsFunc(r.GetTransitions(), func(t *podfsmv1.Transition) bool { return t.GetEvent() == "roll_back" })
	switch {
	case does && ends && rolledBack:
		return "Creation and rollback"
	case does && ends:
		return "Creation and removal"
	case does:
		return "Creation"
	case rolledBack:
		return "Rollback, tried again"
	case demanded && ends:
		return "First container, stop and removal"
	case demanded:
		return "First container"
	default:
		return "Stop and removal"
	}
}

func undoes(l lane) bool {
	return strings.HasPrefix(l.label, "undo ") || strings.HasPrefix(l.label, "stop ")
}

// creates says whether a lane is a step of the creation.
func creates(l lane) bool { return !l.nested && !undoes(l) && !onDemand(l) }

// onDemand says whether a lane is the start of what a pod's containers need,
// which the first of them waits for, maybe long after the creation.
func onDemand(l lane) bool {
	step, _ := records.Table().Step(states.Event(l.label))
	return step.OnDemand
}

// slowest is the lane of the creation's step that took longest to do, and how
// long all of them took; it is false when there is none.
func slowest(all []stretch) (most lane, total time.Duration, ok bool) {
	var whole period
	for _, s := range all {
		for _, l := range s.lanes {
			if !creates(l) {
				continue
			}
			if !ok || l.when.length() > most.when.length() {
				most, ok = l, true
			}
			if whole.start.IsZero() {
				whole.start = l.when.start
			}
			if l.when.end.After(whole.end) {
				whole.end = l.when.end
			}
		}
	}
	return most, whole.length(), ok
}

// mishap is an error and what it is of.
type mishap struct {
	what, text string
}

// mishaps are the errors of all that was tried, each text once: that of a
// plugin is in its step's, too.
func mishaps(all []stretch) []mishap {
	var found []mishap
	for _, s := range all {
		for _, l := range s.lanes {
			known := slices.ContainsFunc(found, func(m mishap) bool { return strings.Contains(m.text, l.err) })
			if l.err != "" && !known {
				found = append(found, mishap{l.label, l.err})
			}
		}
	}
	return found
}

// writtenOff are the undos that were given up, and why.
func writtenOff(acts []*podfsmv1.Act, now time.Time) (all []mishap) {
	for _, act := range acts {
		if act.GetKind() != writeOff {
			continue
		}
		what := "undo of " + act.GetStep()
		if act.GetPlugin() != "" {
			what = act.GetPlugin() + " DEL"
		}
		all = append(all, mishap{what + ", " + age(act.GetStartedAt(), now) + " ago", act.GetReason()})
	}
	return all
}

// reason is why a sandbox is as it is, in its own words or those of the
// transition that took it there.
func reason(r *podfsmv1.InspectResponse) string {
	for _, t := range r.GetTransitions() {
		if t.GetEvent() == "roll_back" && t.GetError() != "" {
			return t.GetError()
		}
	}
	return cmp.Or(r.GetSandbox().GetError(), "")
}
