package lifecycle

import "sync"

// turns bounds how much goes on at a time. What waits for its turn costs no goroutine.
type turns struct {
	mu      sync.Mutex
	free    int
	waiting []func()
}

// take calls begin when there is a turn for it, at once if one is free. What begin began ends with give.
func (t *turns) take(begin func()) {
	t.mu.Lock()
	if t.free == 0 {
		t.waiting = append(t.waiting, begin)
		t.mu.Unlock()
		return
	}
	t.free--
	t.mu.Unlock()
	begin()
}

// give passes the turn on to what has waited longest.
func (t *turns) give() {
	t.mu.Lock()
	if len(t.waiting) == 0 {
		t.free++
		t.mu.Unlock()
		return
	}
	next := t.waiting[0]
	t.waiting = t.waiting[1:]
	t.mu.Unlock()
	next()
}

// hold keeps the turns that are free until the returned function is called, which gives them back.
func (t *turns) hold() (release func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	held := t.free
	t.free = 0
	return sync.OnceFunc(func() {
		for range held {
			t.give()
		}
	})
}
