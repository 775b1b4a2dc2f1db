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
// Nothing of a sandbox depends on it or waits for it. Its methods may be called by many goroutines.
type ended struct {
	archive archive
	writing *relay[lifecycle.View]

	mu   sync.Mutex
	last []lifecycle.View // the newest last, at most maxEnded
}

// archive is a [history.File]. Both methods may wait for a disk.
type archive interface {
	Add(*podfsmv1.InspectResponse) error
	Read() ([]*podfsmv1.InspectResponse, error)
}

// maxEnded is how many sandboxes that have ended stay in memory, and how many of them may wait for the disk. Containerd's events of a
// sandbox can come after its end.
const maxEnded = 128

func newEnded(to archive) *ended {
	e := &ended{archive: to}
	e.writing = &relay[lifecycle.View]{bound: maxEnded, pass: e.write, lost: func(n int) {
		log.L.Warnf("podfsm: the disk is too slow: what became of %d sandboxes can't be looked up later", n)
	}}
	return e
}

// add keeps a sandbox that has ended.
func (e *ended) add(view lifecycle.View) {
	e.mu.Lock()
	e.last = append(e.last, view)
	if over := len(e.last) - maxEnded; over > 0 {
		e.last = slices.Delete(e.last, 0, over)
	}
	e.mu.Unlock()
	e.writing.send(view)
}

func (e *ended) write(view lifecycle.View) {
	inspection, err := records.Inspection(view)
	if err == nil {
		err = e.archive.Add(inspection)
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

// read returns what operators see of them, the one that ended first first, also of those that still wait for the disk.
func (e *ended) read() ([]*podfsmv1.InspectResponse, error) {
	e.mu.Lock()
	last := slices.Clone(e.last)
	e.mu.Unlock()
	all, err := e.archive.Read()
	if err != nil {
		return nil, err
	}
	for _, view := range last {
		if inspection, err := records.Inspection(view); err == nil { // else the log says so
			all = append(all, inspection)
		}
	}
	return history.Latest(all), nil
}

// find is a sandbox as it is now, or as it was when it ended, as long as that is in memory.
func (c *Controller) find(key journal.Key) (lifecycle.View, bool) {
	if view, err := c.engine.Get(key); err == nil {
		return view, true
	}
	return c.ended.find(key)
}
