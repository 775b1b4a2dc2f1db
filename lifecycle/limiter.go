package lifecycle

import "sync"

// limiter bounds the parallel events that no caller waits for. A waiting event costs no goroutine.
type limiter struct {
	mu      sync.Mutex
	free    int
	waiting []func()
}

// acquire calls begin as soon as a slot is free. begin owns the slot until release.
func (l *limiter) acquire(begin func()) {
	l.mu.Lock()
	if l.free == 0 {
		l.waiting = append(l.waiting, begin)
		l.mu.Unlock()
		return
	}
	l.free--
	l.mu.Unlock()
	begin()
}

// release passes the slot on to the function that has waited longest.
func (l *limiter) release() {
	l.mu.Lock()
	if len(l.waiting) == 0 {
		l.free++
		l.mu.Unlock()
		return
	}
	next := l.waiting[0]
	l.waiting = l.waiting[1:]
	l.mu.Unlock()
	next()
}

// hold keeps all free slots until the returned function is called.
func (l *limiter) hold() (release func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	held := l.free
	l.free = 0
	return sync.OnceFunc(func() {
		for range held {
			l.release()
		}
	})
}
