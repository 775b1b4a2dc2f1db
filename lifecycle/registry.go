package lifecycle

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// This file keeps the engine's sandboxes by key, by name and by pod.

// all returns the sandboxes, in no order.
func (e *Engine) all() []*sandbox {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*sandbox, 0, len(e.sandboxes))
	for _, s := range e.sandboxes {
		all = append(all, s)
	}
	return all
}

// add adds a new sandbox. It fails with AlreadyExists for a key or a name in use, and after Close.
func (e *Engine) add(s *sandbox) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosed
	}
	if _, ok := e.sandboxes[s.key]; ok {
		return fmt.Errorf("sandbox %q: %w", s.key.ID, errdefs.ErrAlreadyExists)
	}
	if name := s.req.Name; name != "" {
		if holder, ok := e.names[name]; ok {
			return fmt.Errorf("the name %q is reserved for sandbox %q: %w", name, holder.key.ID, errdefs.ErrAlreadyExists)
		}
		e.names[name] = s
	}
	for _, other := range e.pods[s.req.Pod] {
		if !other.created.Before(s.created) {
			s.created = other.created.Add(1) // the wall clock was set back, but the kubelet sorts by it
		}
	}
	e.keepLocked(s)
	return nil
}

func (e *Engine) keepLocked(s *sandbox) {
	e.sandboxes[s.key] = s
	e.pods[s.req.Pod] = append(e.pods[s.req.Pod], s)
}

// addRestored adds a sandbox from the ledger. Only a damaged ledger has two sandboxes of one name:
// the older one was removed, and its record of that is lost. The newer one gets the name.
func (e *Engine) addRestored(s *sandbox) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.sandboxes[s.key]; ok {
		return fmt.Errorf("sandbox %q: %w", s.key.ID, errdefs.ErrAlreadyExists)
	}
	e.keepLocked(s)
	if s.req.Name != "" && (s.goal == "" || s.goal == states.Stopped) {
		e.names[s.req.Name] = s
	}
	return nil
}

// drop removes a sandbox.
func (e *Engine) drop(s *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.sandboxes, s.key)
	e.pods[s.req.Pod] = slices.DeleteFunc(e.pods[s.req.Pod], func(other *sandbox) bool { return other == s })
	if len(e.pods[s.req.Pod]) == 0 {
		delete(e.pods, s.req.Pod)
	}
	e.unnameLocked(s)
}

func (e *Engine) unnameLocked(s *sandbox) {
	if e.names[s.req.Name] == s {
		delete(e.names, s.req.Name)
	}
}

// unname frees the sandbox's name for another sandbox.
func (e *Engine) unname(s *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unnameLocked(s)
}

// lookup returns the sandbox with a key. It fails with NotFound.
func (e *Engine) lookup(key ledger.Key) (*sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s, ok := e.sandboxes[key]
	if !ok {
		return nil, fmt.Errorf("sandbox %q: %w", key.ID, errdefs.ErrNotFound)
	}
	return s, nil
}

var errClosed = fmt.Errorf("the engine is closed: %w", errdefs.ErrUnavailable)

// enter counts a goroutine in, unless the engine is closed.
func (e *Engine) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.work.Add(1)
	return true
}

// stay counts a goroutine in for work that is counted in already. So the goroutine may also begin
// while the engine closes.
func (e *Engine) stay() bool {
	e.work.Add(1)
	return true
}

func (e *Engine) isClosed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
}
