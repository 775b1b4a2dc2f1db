package lifecycle

import (
	"slices"
	"time"

	"github.com/podfsm/podfsm/states"
)

// tries are the tries of a sandbox, in the order in which they began. Of several tries of one
// operation on one step, tries keeps the first and the last, as the ledger does. So a cleanup that
// fails for months doesn't push out what led to it.
type tries []Try

// begin adds a try that begins now.
func (t *tries) begin(step states.Event, operation Operation, at time.Time) {
	*t = withLast(*t, Try{Step: step, Operation: operation, Started: at}, func(try Try) bool { return try.Step == step && try.Operation == operation })
}

// withLast returns a copy of all with item at the end. If all has several items that are like item,
// the copy keeps only the first of them.
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

// end sets the result of the last try of an operation on a step.
func (t tries) end(step states.Event, operation Operation, started, ended time.Time, err error) {
	for i := len(t) - 1; i >= 0; i-- {
		if try := &t[i]; try.Step == step && try.Operation == operation {
			try.Started, try.Ended, try.Err = started, ended, err
			return
		}
	}
}

// writeOff adds the write-off of a step's undo.
func (t *tries) writeOff(step states.Event, at time.Time, err error, reason string) {
	t.begin(step, OperationWriteOff, at)
	try := &(*t)[len(*t)-1]
	try.Ended, try.Err, try.Reason = at, err, reason
}

// endAll ends all tries of an operation that are under way, with err.
func (t tries) endAll(operation Operation, at time.Time, err error) {
	for i := range t {
		if try := &t[i]; try.Operation == operation && try.Ended.IsZero() {
			try.Ended, try.Err = at, err
		}
	}
}
