package lifecycle

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/journal"
)

// Claim says who may use a sandbox, from nobody on. It only ever rises.
type Claim int32

const (
	// Unclaimed is a sandbox that nobody knows of: its caller went before it was ready.
	Unclaimed Claim = iota
	// Shown is one that somebody has seen and may use, but that wasn't handed to who asked for it.
	Shown
	// Taken is one that was handed out.
	Taken
	// Discarded is one that is on its way out, which nobody may have any more.
	Discarded
)

// claimNames are the claims in the ledger's words.
var claimNames = []string{Unclaimed: "unclaimed", Shown: "shown", Taken: "taken", Discarded: "discarded"}

func (c Claim) String() string { return claimNames[c] }

// parseClaim is the claim with a name. It fails with InvalidArgument for a name that no claim has.
func parseClaim(name string) (Claim, error) {
	i := slices.Index(claimNames, name)
	if i < 0 {
		return 0, fmt.Errorf("%q is no claim: %w", name, errdefs.ErrInvalidArgument)
	}
	return Claim(i), nil
}

// Claim marks a sandbox as shown or taken. It says whether that may be done: a discarded sandbox can't be claimed. A sandbox that the
// engine doesn't know has no claims on it, and is anyone's. A claim that is made again costs next to nothing. What is taken is on
// record when Claim returns, unless ctx ends first; what is shown soon will be.
func (e *Engine) Claim(ctx context.Context, key journal.Key, claim Claim) bool {
	s, err := e.lookup(key)
	if err != nil {
		return true
	}
	raised, ok := s.raise(claim, Taken)
	if !raised {
		return ok
	}
	recorded := s.recordClaim(claim)
	if claim == Taken {
		select {
		case <-recorded:
		case <-ctx.Done():
		}
	}
	return true
}

// Discard marks a sandbox as discarded, unless it has more than the claim most on it; it says whether it is discarded. An unknown
// sandbox isn't.
func (e *Engine) Discard(key journal.Key, most Claim) bool {
	s, err := e.lookup(key)
	if err != nil {
		return false
	}
	raised, _ := s.raise(Discarded, most)
	if raised {
		s.recordClaim(Discarded)
	}
	return raised || Claim(s.claim.Load()) == Discarded
}

// raise raises the claim on a sandbox to one, from at most another. ok says that it is now as high, and no higher than Taken.
func (s *sandbox) raise(to, most Claim) (raised, ok bool) {
	for {
		now := Claim(s.claim.Load())
		if now > most || now >= to {
			return false, now != Discarded
		}
		if s.claim.CompareAndSwap(int32(now), int32(to)) {
			return true, true
		}
	}
}

// recordClaim puts a claim on record, in the queue: what is returned says when that is done.
func (s *sandbox) recordClaim(claim Claim) <-chan error {
	return s.ask(func(reply func(error)) {
		if s.state().Terminal() {
			reply(nil)
			return
		}
		s.record(s.background(), &journal.Record{Kind: journal.Claimed, Claim: claim.String()}, nil)
		reply(nil)
	})
}

// Named is the sandbox that has a name, if one has.
func (e *Engine) Named(name string) (View, bool) {
	e.mu.Lock()
	s, ok := e.names[name]
	e.mu.Unlock()
	if !ok {
		return View{}, false
	}
	return s.view(), true
}

// Settle waits until what is queued for a sandbox has been handled: after a restart, the rollback of a creation that was interrupted.
// For an unknown sandbox there is nothing to wait for. It fails when ctx ends first.
func (e *Engine) Settle(ctx context.Context, key journal.Key) error {
	s, err := e.lookup(key)
	if err != nil {
		return nil
	}
	return await(ctx, s.ask(func(reply func(error)) { reply(nil) }), "sandbox %q is busy", key.ID)
}
