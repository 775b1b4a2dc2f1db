package lifecycle

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// unknownExit is containerd's exit code for a process whose exit was not observed.
const unknownExit = 255

// pauseExited handles the end of the sandbox's process.
func (s *sandbox) pauseExited(exit Exit) {
	ctx := s.background()
	if s.state().Terminal() || !s.recordExit(ctx, exit) {
		return
	}
	defer s.announceExit()
	cause := exit.cause()
	if s.creation != nil {
		s.creation.fail(cause)
		return
	}
	if s.state() == states.Ready {
		if err := s.move(ctx, states.LosePause, cause); err != nil {
			s.log(ctx).WithError(err).Error("failed to record the exit of pause")
		}
	}
}

// recordExit keeps and records the exit of the process. It returns false if it has an exit already.
func (s *sandbox) recordExit(ctx context.Context, exit Exit) bool {
	if !s.setExit(exit) {
		return false
	}
	s.appendOrLog(ctx, &ledger.Record{Kind: ledger.Exited}, &exit)
	return true
}

// setExit keeps the exit of the process. It returns false if it has an exit already.
func (s *sandbox) setExit(exit Exit) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit != nil {
		return false
	}
	s.exit = &exit
	return true
}

// announceExit wakes the callers of [Engine.Wait]. It is called after the state has moved, so that
// they see both.
func (s *sandbox) announceExit() {
	s.exitOnce.Do(func() { close(s.exited) })
}

func (s *sandbox) exitStatus() (Exit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exit == nil {
		return Exit{}, fmt.Errorf("sandbox %q never ran: %w", s.key.ID, errdefs.ErrNotFound)
	}
	return *s.exit, nil
}
