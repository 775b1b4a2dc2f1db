package lifecycle

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/ledger"
)

// Claim is how far a sandbox is handed out. It only ever rises.
type Claim int32

const (
	// Unclaimed is a sandbox that no caller knows: the caller of its creation had gone before the
	// sandbox was ready.
	Unclaimed Claim = iota
	// Shown is a sandbox that a caller has seen and may use. The caller of its creation didn't get
	// it.
	Shown
	// Taken is a sandbox that the caller of its creation got, or that a later request has named.
	Taken
	// Discarded is a sandbox that is being removed. No caller gets it any more.
	Discarded
)

// claimNames are the names of the claims in the ledger.
var claimNames = []string{Unclaimed: "unclaimed", Shown: "shown", Taken: "taken", Discarded: "discarded"}

func (c Claim) String() string { return claimNames[c] }

// parseClaim returns the claim with a name. It fails with InvalidArgument for any other name.
func parseClaim(name string) (Claim, error) {
	i := slices.Index(claimNames, name)
	if i < 0 {
		return 0, fmt.Errorf("invalid claim %q: %w", name, errdefs.ErrInvalidArgument)
	}
	return Claim(i), nil
}

// Claim raises the claim on a sandbox to Shown or Taken. It returns false for a discarded sandbox,
// and true for a sandbox that the engine doesn't know. When Claim returns, Taken is on record,
// unless ctx ended first. Shown is recorded soon after. To repeat a claim is cheap.
func (e *Engine) Claim(ctx context.Context, key ledger.Key, claim Claim) bool {
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

// Discard marks a sandbox as discarded, unless its claim exceeds limit. It returns whether the
// sandbox is discarded, and false for an unknown sandbox.
func (e *Engine) Discard(key ledger.Key, limit Claim) bool {
	s, err := e.lookup(key)
	if err != nil {
		return false
	}
	raised, _ := s.raise(Discarded, limit)
	if raised {
		s.recordClaim(Discarded)
	}
	return raised || Claim(s.claim.Load()) == Discarded
}

// raise sets a higher claim, unless the present claim exceeds limit. raised says whether raise changed the claim. ok
// is false for a discarded sandbox.
func (s *sandbox) raise(higher, limit Claim) (raised, ok bool) {
	for {
		present := Claim(s.claim.Load())
		if present > limit || present >= higher {
			return false, present != Discarded
		}
		if s.claim.CompareAndSwap(int32(present), int32(higher)) {
			return true, true
		}
	}
}

// recordClaim queues the record of a claim. The returned channel gets the answer once the record is
// written.
func (s *sandbox) recordClaim(claim Claim) <-chan error {
	return s.ask(func(reply func(error)) {
		if s.state().Terminal() {
			reply(nil)
			return
		}
		s.appendOrLog(s.background(), &ledger.Record{Kind: ledger.Claimed, Claim: claim.String()}, nil)
		reply(nil)
	})
}

// Named returns the sandbox with a name, if there is one.
func (e *Engine) Named(name string) (View, bool) {
	e.mu.Lock()
	s, ok := e.names[name]
	e.mu.Unlock()
	if !ok {
		return View{}, false
	}
	return s.view(), true
}

// WaitQueued waits until the events that a sandbox's queue has now are handled. After a restart,
// these include the rollback of an interrupted creation. For an unknown sandbox it returns at once.
// It fails when ctx ends first.
func (e *Engine) WaitQueued(ctx context.Context, key ledger.Key) error {
	s, err := e.lookup(key)
	if err != nil {
		return nil
	}
	return await(ctx, s.ask(func(reply func(error)) { reply(nil) }), "sandbox %q is busy", key.ID)
}
