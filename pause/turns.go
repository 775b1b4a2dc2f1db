package pause

import (
	"context"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// turnTime bounds how long a start waits for its turn, and how long it keeps it:
// a runtime that hangs delays the others by no more.
const turnTime = 2 * time.Second

// turns are taken by those who start a runtime, the first come first. There are
// as many as CPUs: a runtime keeps one busy but for some waits in the kernel.
// More of them only make each other late, and with them the first pods of a
// burst: on two CPUs half of eight pods are ready in three quarters of the time
// that they take without turns, and all of them in the same.
type turns struct{ free *semaphore.Weighted }

func newTurns() turns {
	return turns{semaphore.NewWeighted(int64(runtime.GOMAXPROCS(0)))}
}

// take waits for a turn, not longer than turnTime or ctx. give gives it back,
// once; it is the caller's to call.
func (t turns) take(ctx context.Context) (give func()) {
	if !t.free.TryAcquire(1) {
		waiting, cancel := context.WithTimeout(ctx, turnTime)
		defer cancel()
		if t.free.Acquire(waiting, 1) != nil {
			return func() {} // it goes on without one
		}
	}
	once := sync.OnceFunc(func() { t.free.Release(1) })
	timer := time.AfterFunc(turnTime, once)
	return func() {
		timer.Stop()
		once()
	}
}
