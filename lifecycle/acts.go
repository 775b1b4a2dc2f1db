package lifecycle

import (
	"slices"
	"time"

	"github.com/podfsm/podfsm/states"
)

// acts are what was tried for a sandbox, in the order in which it began. Of the tries at one thing they hold the first and the last,
// as the ledger does, so that a debt of months doesn't push out how it came about.
type acts []Act

// begin notes that something is being tried.
func (a *acts) begin(step states.Event, kind ActKind, at time.Time) {
	*a = withLast(*a, Act{Step: step, Kind: kind, Started: at}, func(act Act) bool { return act.Step == step && act.Kind == kind })
}

// withLast is a new list with an item at its end. Of those that are like it, the first and the last are kept, so it is the last from now on.
func withLast[T any](all []T, item T, like func(T) bool) []T {
	first, last := -1, -1
	for i, other := range all {
		if like(other) {
			if first < 0 {
				first = i
			}
			last = i
		}
	}
	all = slices.Clone(all)
	if first != last {
		all = slices.Delete(all, last, last+1)
	}
	return append(all, item)
}

// end notes how the last try at something went.
func (a acts) end(step states.Event, kind ActKind, started, ended time.Time, err error) {
	for i := len(a) - 1; i >= 0; i-- {
		if act := &a[i]; act.Step == step && act.Kind == kind {
			act.Started, act.Ended, act.Err = started, ended, err
			return
		}
	}
}

// writeOff notes that the undo of a step was given up, and why.
func (a *acts) writeOff(step states.Event, at time.Time, err error, reason string) {
	a.begin(step, ActWriteOff, at)
	act := &(*a)[len(*a)-1]
	act.Ended, act.Err, act.Reason = at, err, reason
}

// endAll notes that all that is under way of a kind has ended because of an error.
func (a acts) endAll(kind ActKind, at time.Time, err error) {
	for i := range a {
		if act := &a[i]; act.Kind == kind && act.Ended.IsZero() {
			act.Ended, act.Err = at, err
		}
	}
}
