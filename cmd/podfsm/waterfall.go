package main

import (
	"cmp"
	"slices"
	"strings"
	"time"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/states"
)

// idle is the longest pause within a period of a waterfall. After a longer one, a new period with
// its own scale begins: a pod may live for months.
const idle = time.Second

// ending is the outcome of a try.
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

// marks are the characters that draw an ending on a terminal.
var marks = map[ending]string{succeeded: "=", skipped: ".", failed: "x", undone: "-", undoFailed: "!", underWay: "~", unknownEnd: "?"}

// writeOff is the kind of a try that wrote an undo off. It takes no time.
const writeOff = "write-off"

// line is a line of a waterfall: one try of a step, an undo or a CNI plugin.
type line struct {
	label  string
	nested bool // a part of the last line above that is not nested
	when   interval
	timed  bool // the time in when is known
	ending ending
	err    string
}

// period is a part of a sandbox's life without a long pause.
type period struct {
	title string
	whole interval
	lines []line
}

// waterfall returns the periods of a sandbox's life in their order.
func waterfall(r *podfsmv1.InspectResponse, now time.Time) []period {
	var all []period
	tried := false // something was undone in an earlier period
	for _, group := range together(r, now) {
		p := period{whole: group[0].when, title: titleOf(r, group, tried)}
		tried = tried || slices.ContainsFunc(group, undoes)
		for _, l := range group {
			if l.timed && l.when.end.After(p.whole.end) {
				p.whole.end = l.when.end
			}
		}
		p.lines = group
		all = append(all, p)
	}
	return all
}

// together groups the lines of a sandbox: those without a long pause in between.
func together(r *podfsmv1.InspectResponse, now time.Time) [][]line {
	var groups [][]line
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

// families returns the tries of a sandbox in the order of their start, each with the CNI plugins
// that ran for it.
func families(r *podfsmv1.InspectResponse, now time.Time) [][]line {
	var all [][]line
	var tries []*podfsmv1.Try
	for _, try := range r.GetTries() {
		if try.GetPlugin() == "" && try.GetStartedAt() != nil && try.GetKind() != writeOff {
			all, tries = append(all, []line{lineOf(r, try, now)}), append(tries, try)
		}
	}
	for _, try := range r.GetTries() {
		if try.GetPlugin() == "" || try.GetKind() == writeOff {
			continue
		}
		if i := parentOf(try, tries); i >= 0 {
			l := lineOf(r, try, now)
			l.nested = true
			all[i] = append(all[i], l)
		}
	}
	return all
}

// parentOf returns the index of the try for which a plugin ran: the last matching try that had
// started by then, or -1.
func parentOf(plugin *podfsmv1.Try, tries []*podfsmv1.Try) int {
	kind := "do"
	if plugin.GetKind() == "DEL" {
		kind = "undo"
	}
	for i, try := range slices.Backward(tries) {
		late := plugin.GetStartedAt() != nil && try.GetStartedAt().AsTime().After(plugin.GetStartedAt().AsTime())
		if try.GetStep() == plugin.GetStep() && try.GetKind() == kind && !late {
			return i
		}
	}
	return -1
}

func lineOf(r *podfsmv1.InspectResponse, try *podfsmv1.Try, now time.Time) line {
	l := line{label: labelOf(try), ending: endingOf(r, try), err: try.GetError(), timed: try.GetStartedAt() != nil}
	start := try.GetStartedAt().AsTime()
	l.when = interval{start, start.Add(try.GetDuration().AsDuration())}
	if l.ending == underWay && now.After(start) {
		l.when.end = now
	}
	return l
}

func labelOf(try *podfsmv1.Try) string {
	switch {
	case try.GetPlugin() != "":
		return try.GetPlugin() + " " + try.GetKind()
	case try.GetKind() == "do":
		return try.GetStep()
	default:
		return try.GetKind() + " " + try.GetStep()
	}
}

func endingOf(r *podfsmv1.InspectResponse, try *podfsmv1.Try) ending {
	does := try.GetKind() == "do" || try.GetKind() == "ADD"
	ended := try.GetDuration() != nil || try.GetStartedAt() == nil
	status := statusOf(r, try.GetStep())
	switch {
	case try.GetError() != "" && does:
		return failed
	case try.GetError() != "":
		return undoFailed
	case !ended && (status == "running" || status == "undoing" || try.GetKind() == "stop"): // without an end, and of the running daemon
		return underWay
	case !ended:
		return unknownEnd
	case !does:
		return undone
	case try.GetKind() == "do" && status == "skipped":
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

// titleOf returns the title of a period. again says that something was undone in an earlier period.
func titleOf(r *podfsmv1.InspectResponse, lines []line, again bool) string {
	does := slices.ContainsFunc(lines, creates)
	demanded := slices.ContainsFunc(lines, onDemand)
	ends := slices.ContainsFunc(lines, func(l line) bool { return !l.nested && undoes(l) })
	rolledBack := slices.ContainsFunc(r.GetTransitions(), func(t *podfsmv1.Transition) bool { return t.GetEvent() == "roll_back" })
	switch {
	case does && ends && rolledBack:
		return "Creation and rollback"
	case does && ends:
		return "Creation and removal"
	case does:
		return "Creation"
	case rolledBack && again:
		return "Rollback, tried again"
	case rolledBack:
		return "Rollback"
	case demanded && ends:
		return "First container, stop and removal"
	case demanded:
		return "First container"
	default:
		return "Stop and removal"
	}
}

func undoes(l line) bool {
	return strings.HasPrefix(l.label, "undo ") || strings.HasPrefix(l.label, "stop ")
}

// creates reports whether a line is a step of the creation.
func creates(l line) bool { return !l.nested && !undoes(l) && !onDemand(l) }

// onDemand reports whether a line starts what a pod's containers need. The first container waits
// for it, maybe long after the creation.
func onDemand(l line) bool {
	step, _ := records.Table().Step(states.Event(l.label))
	return step.OnDemand
}

// slowest returns the longest step of the creation, and the time of the whole creation. It is false
// without a creation.
func slowest(all []period) (most line, total time.Duration, ok bool) {
	var whole interval
	for _, p := range all {
		for _, l := range p.lines {
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

// note is a text and its subject.
type note struct {
	what, text string
}

// errorsOf returns the errors of all tries without repetition: a plugin's error is also a part of
// its step's.
func errorsOf(all []period) []note {
	var found []note
	for _, p := range all {
		for _, l := range p.lines {
			known := slices.ContainsFunc(found, func(n note) bool { return strings.Contains(n.text, l.err) })
			if l.err != "" && !known {
				found = append(found, note{l.label, l.err})
			}
		}
	}
	return found
}

// writtenOff returns the undos that were written off, and the reasons.
func writtenOff(tries []*podfsmv1.Try, now time.Time) (all []note) {
	for _, try := range tries {
		if try.GetKind() != writeOff {
			continue
		}
		what := "undo of " + try.GetStep()
		if try.GetPlugin() != "" {
			what = try.GetPlugin() + " DEL"
		}
		all = append(all, note{what + ", " + age(try.GetStartedAt(), now) + " ago", try.GetReason()})
	}
	return all
}

// reason returns why a sandbox is in its state: the error of its rollback, or its own.
func reason(r *podfsmv1.InspectResponse) string {
	for _, t := range r.GetTransitions() {
		if t.GetEvent() == "roll_back" && t.GetError() != "" {
			return t.GetError()
		}
	}
	return cmp.Or(r.GetSandbox().GetError(), "")
}
