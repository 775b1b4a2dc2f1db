package plugin

import (
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/tracing"
)

// ended keeps ended sandboxes: the latest in memory, for late callers, and all in a file, for
// operators. No sandbox depends on it or waits for it. Its methods may be called by many
// goroutines.
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

// maxEnded bounds the ended sandboxes in memory, and those that wait for the disk. They stay in
// memory because containerd's events of a sandbox can come after its end.
const maxEnded = 128

func newEnded(to archive) *ended {
	e := &ended{archive: to}
	e.writing = &relay[lifecycle.View]{bound: maxEnded, pass: e.write, dropped: func(n int) {
		log.L.Warnf("disk is too slow, history of %d ended sandboxes dropped", n)
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
	inspection, err := show.Inspection(view)
	if err == nil {
		err = e.archive.Add(inspection)
	}
	if err != nil {
		log.L.WithField(tracing.LogSandbox, view.Key.ID).WithError(err).Warn("failed to write history of ended sandbox")
	}
}

// find returns an ended sandbox that is still in memory.
func (e *ended) find(key ledger.Key) (lifecycle.View, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, view := range slices.Backward(e.last) {
		if view.Key == key {
			return view, true
		}
	}
	return lifecycle.View{}, false
}

// within returns the keys of sandboxes that ended at most d ago.
func (e *ended) within(d time.Duration) (keys []ledger.Key) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, view := range e.last {
		if time.Since(view.Since) < d {
			keys = append(keys, view.Key)
		}
	}
	return keys
}

// read returns all ended sandboxes, the oldest first, including those that still wait for the disk.
func (e *ended) read() ([]*podfsmv1.InspectResponse, error) {
	e.mu.Lock()
	last := slices.Clone(e.last)
	e.mu.Unlock()
	all, err := e.archive.Read()
	if err != nil {
		return nil, err
	}
	for _, view := range last {
		if inspection, err := show.Inspection(view); err == nil { // write logs the error
			all = append(all, inspection)
		}
	}
	return history.Latest(all), nil
}

// find returns a sandbox, also an ended one that is still in memory.
func (c *Controller) find(key ledger.Key) (lifecycle.View, bool) {
	if view, err := c.engine.Get(key); err == nil {
		return view, true
	}
	return c.ended.find(key)
}
