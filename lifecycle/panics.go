package lifecycle

import (
	"fmt"
	"runtime/debug"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Protect turns a panic of f into an Internal error and logs its stack. One pod must not end the
// daemon that runs the pods of the node.
func Protect(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
			logStack(err)
		}
	}()
	return f()
}

func logStack(err error) {
	defer func() { _ = recover() }() // the log may be what panics
	log.L.WithError(err).Errorf("panic, please report it: %s", debug.Stack())
}

// logPanics calls f, and logs and drops a panic of f. It is for calls that nothing of the sandbox depends on: the log,
// the meter, the observer. It also is the last guard around each event.
func (s *sandbox) logPanics(f func()) {
	err := Protect(func() error { f(); return nil })
	if err == nil {
		return
	}
	_ = Protect(func() error { // the log may be what panics
		s.log(s.background()).WithError(err).Error("event handler failed, please report it")
		return nil
	})
}
