package plugin

import (
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/history"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/tracing"
)

// ended keeps the sandboxes that have ended: the last of them in memory, for callers that come late, and in a file, for operators.
// Nothing of a sandbox depends on it. Its methods may be called by many goroutines.
type ended struct {
	file *history.File

	mu   sync.Mutex
	last []lifecycle.View // the newest last, at most maxEnded
}

// maxEnded is how many sandboxes that have ended stay in memory. Containerd's events of a sandbox can come after its end.
const maxEnded = 128

// add keeps a sandbox that has ended.
func (e *ended) add(view lifecycle.View) {
	e.mu.Lock()
	e.last = append(e.last, view)
	if over := len(e.last) - maxEnded; over > 0 {
		e.last = slices.Delete(e.last, 0, over)
	}
	e.mu.Unlock()
	e.write(view)
}

func (e *ended) write(view lifecycle.View) {
	inspection, err := records.Inspection(view)
	if err == nil {
		err = e.file.Add(inspection)
	}
	if err != nil {
		log.L.WithField(tracing.LogSandbox, view.Key.ID).WithError(err).Warn("podfsm: what became of a sandbox can't be looked up later")
	}
}

// find is a sandbox as it was when it ended, as long as it is in memory.
func (e *ended) find(key journal.Key) (lifecycle.View, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, view := range slices.Backward(e.last) {
		if view.Key == key {
			return view, true
		}
	}
	return lifecycle.View{}, false
}

// within are the keys of those that ended not longer ago than a duration.
func (e *ended) within(d time.Duration) (keys []journal.Key) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, view := range e.last {
		if time.Since(view.Since) < d {
			keys = append(keys, view.Key)
		}
	}
	return keys
}

// read returns what operators see of them, the one that ended first first.
func (e *ended) read() ([]*podfsmv1.InspectResponse, error) { return e.file.Read() }

// find is a sandbox as it is now, or as it was when it ended, as long as that is in memory.
func (c *Controller) find(key journal.Key) (lifecycle.View, bool) {
	if view, err := c.engine.Get(key); err == nil {
		return view, true
	}
	return c.ended.find(key)
}
