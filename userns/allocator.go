package userns

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Standing is the state of a holder's sandbox.
type Standing int

const (
	// Lives: the sandbox may have processes, or get some.
	Lives Standing = iota
	// Ended: the sandbox is stopped and gets no more processes.
	Ended
	// Gone: the sandbox does not exist.
	Gone
)

// Host is what the allocator has to know of the node.
type Host interface {
	// Standing returns the state of a holder that blocks another one.
	Standing(ctx context.Context, h Holder) (Standing, error)
	// Uses returns all uses of host ids by processes, mounts and snapshots.
	Uses(ctx context.Context) ([]Use, error)
	// Processes returns the uses by processes alone.
	Processes(ctx context.Context) ([]Use, error)
}

// Use is a use of host uids and gids, and its user in words. A nil side is not used.
type Use struct {
	UIDs, GIDs []Mapping
	By         string
}

// touches reports whether the use includes any id of m.
func (u Use) touches(m Mappings) bool {
	return slices.ContainsFunc(u.UIDs, m.UIDs.overlaps) || slices.ContainsFunc(u.GIDs, m.GIDs.overlaps)
}

// Allocator keeps the id ranges of pods apart. Its methods may be called by many goroutines.
type Allocator struct {
	host Host

	mu       sync.Mutex
	pool     *Pool // nil for none
	holdings *holdings
	refusals []Refusal

	searching sync.Mutex // one search for uses at a time; locked before mu
}

// New makes an allocator without holders. pool may be nil.
func New(host Host, pool *Pool) *Allocator {
	return &Allocator{host: host, pool: pool, holdings: newHoldings()}
}

// Restore makes a sandbox a holder that already holds its ids.
func (a *Allocator) Restore(h Holder) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.holdings.add(h)
	if a.pool != nil && h.Origin == OriginAuto {
		a.pool.restore(h.ID, h.Mappings)
	}
}

// Check returns the error that [Allocator.Hold], or for a holder without mappings
// [Allocator.Allocate], would return now. It holds nothing. For a pod that has a range of the pool
// it succeeds: the request may be a retry for the same sandbox.
func (a *Allocator) Check(ctx context.Context, h Holder) error {
	if h.Origin != OriginAuto {
		return a.hold(ctx, h, false)
	}
	if _, ok := a.tryAllocate(h, false); ok || a.hasRange(h.Owner) {
		return nil
	}
	_, err := a.allocate(ctx, h, false)
	return err
}

func (a *Allocator) hasRange(owner string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range a.pool.held {
		if held, ok := a.holdings.byID[id]; ok && held.Owner == owner {
			return true
		}
	}
	return false
}

// Hold makes h a holder of its mappings. It is idempotent. If another owner holds any of the ids,
// Hold fails with InvalidArgument and names the other pod. But a sandbox of another pod yields if it
// is stopped, has no process left, and doesn't hold a range of the pool.
func (a *Allocator) Hold(ctx context.Context, h Holder) error { return a.hold(ctx, h, true) }

func (a *Allocator) hold(ctx context.Context, h Holder, keep bool) error {
	for {
		rival, kind := a.tryHold(h, keep)
		if rival == nil {
			return nil
		}
		yields, err := a.yields(ctx, *rival)
		if err != nil || !yields {
			return a.refuse(h, conflict(h, *rival, kind, err))
		}
	}
}

// tryHold makes h a holder if keep is set and h has no rival. It returns the rival, and the kind of
// the shared ids.
func (a *Allocator) tryHold(h Holder, keep bool) (*Holder, string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if rival, kind := a.holdings.rival(h.Mappings, h.Owner); rival != nil {
		holder := rival.Holder
		return &holder, kind
	}
	if keep {
		a.holdings.add(h)
	}
	return nil, ""
}

// yields reports whether a rival no longer needs its ids, and releases them in that case.
func (a *Allocator) yields(ctx context.Context, rival Holder) (bool, error) {
	standing, err := a.host.Standing(ctx, rival)
	if err != nil {
		return false, err
	}
	switch {
	case standing == Gone:
		return true, a.Release(rival.ID)
	case standing == Lives, rival.Origin == OriginAuto: // a range of the pool also waits for snapshots and mounts
		return false, nil
	}
	uses, err := a.host.Processes(ctx)
	if err != nil {
		return false, err
	}
	if i := slices.IndexFunc(uses, func(u Use) bool { return u.touches(rival.Mappings) }); i >= 0 {
		return false, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if held, ok := a.holdings.byID[rival.ID]; ok {
		held.yielded = true
	}
	return true, nil
}

func conflict(h, rival Holder, kind string, err error) error {
	asked, taken := h.Mappings.of(kind), rival.Mappings.of(kind)
	text := fmt.Sprintf("host %ss %d to %d of pod %q overlap %d to %d, which pod %q (sandbox %q) holds",
		kind, asked.HostID, asked.last(), h.Pod, taken.HostID, taken.last(), rival.Pod, rival.ID)
	if err != nil {
		text = fmt.Sprintf("%s, as far as is known (%s)", text, err)
	}
	return invalid("%s; give each pod a range of its own", text)
}

// Allocate makes h a holder of a range of the pool. It is idempotent. If no range is free, not even
// after a search for unused ranges in quarantine, it fails with ResourceExhausted.
func (a *Allocator) Allocate(ctx context.Context, h Holder) (Mappings, error) {
	return a.allocate(ctx, h, true)
}

func (a *Allocator) allocate(ctx context.Context, h Holder, keep bool) (Mappings, error) {
	if m, ok := a.tryAllocate(h, keep); ok {
		return m, nil
	}
	_, failed := a.search(ctx)
	if m, ok := a.tryAllocate(h, keep); ok {
		return m, nil
	}
	a.mu.Lock()
	err := a.pool.exhausted(failed)
	a.mu.Unlock()
	return Mappings{}, a.refuse(h, err)
}

func (a *Allocator) tryAllocate(h Holder, keep bool) (Mappings, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s, ok := a.pool.held[h.ID]; ok {
		return s.mappings, true
	}
	s := a.pool.next(func(m Mappings) bool { return a.holdings.uids.taken(m.UIDs) || a.holdings.gids.taken(m.GIDs) })
	if s == nil {
		return Mappings{}, false
	}
	if keep {
		a.pool.take(h.ID, s)
		h.Mappings = s.mappings
		a.holdings.add(h)
	}
	return s.mappings, true
}

// search frees the ranges in quarantine that nothing on the host uses. It returns the users of the
// others.
func (a *Allocator) search(ctx context.Context) (map[Mappings]string, error) {
	a.searching.Lock()
	defer a.searching.Unlock()
	a.mu.Lock()
	suspects := a.pool.quarantined() // before the search, because a range quarantined later may be used after it
	a.mu.Unlock()
	if len(suspects) == 0 {
		return nil, nil
	}
	uses, err := a.host.Uses(ctx)
	if err != nil {
		return nil, err
	}
	users, unused := sortOut(suspects, uses)
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range unused {
		a.pool.clear(m)
	}
	return users, nil
}

// sortOut returns the users of the suspects, and the unused suspects. It finds uses by the blocks
// of ids that they touch, because a pool may have tens of thousands of ranges.
func sortOut(suspects []Mappings, uses []Use) (users map[Mappings]string, unused []Mappings) {
	uids, gids := map[uint32][]Use{}, map[uint32][]Use{}
	for _, u := range uses {
		for _, side := range []struct {
			extents []Mapping
			into    map[uint32][]Use
		}{{u.UIDs, uids}, {u.GIDs, gids}} {
			for _, m := range side.extents {
				for first, last := blocks(m); first <= last; first++ {
					side.into[first] = append(side.into[first], u)
				}
			}
		}
	}
	users = map[Mappings]string{}
	for _, m := range suspects {
		if by, used := userOf(m, near(m.UIDs, uids), near(m.GIDs, gids)); used {
			users[m] = by
		} else {
			unused = append(unused, m)
		}
	}
	return users, unused
}

// near returns the uses in the blocks of m.
func near(m Mapping, byBlock map[uint32][]Use) (uses []Use) {
	for first, last := blocks(m); first <= last; first++ {
		uses = append(uses, byBlock[first]...)
	}
	return uses
}

// userOf returns the user of a range, false if it is unused.
func userOf(m Mappings, uses ...[]Use) (string, bool) {
	for _, some := range uses {
		if i := slices.IndexFunc(some, func(u Use) bool { return u.touches(m) }); i >= 0 {
			return some[i].By, true
		}
	}
	return "", false
}

// Release ends a holding. It is idempotent. The pool's ranges that overlap the holding go into
// quarantine. An error only means that a restart may lose the order in which ranges were used.
func (a *Allocator) Release(id string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	held, ok := a.holdings.byID[id]
	a.holdings.remove(id)
	if a.pool == nil || !ok {
		return nil
	}
	a.pool.quarantineFreed(held.Mappings)
	return a.pool.release(id)
}

// Refusal is a request that was refused because of its ids.
type Refusal struct {
	Pod    string
	Reason string
	At     time.Time // the last time
	Count  int
}

// keepRefusals is the number of different refusals that are kept.
const keepRefusals = 64

// refuse records err as the reason why h was refused, and returns err.
func (a *Allocator) refuse(h Holder, err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := Refusal{Pod: h.Pod, Reason: err.Error(), Count: 1, At: time.Now()}
	if i := slices.IndexFunc(a.refusals, func(old Refusal) bool { return old.Pod == r.Pod && old.Reason == r.Reason }); i >= 0 {
		r.Count += a.refusals[i].Count
		a.refusals = slices.Delete(a.refusals, i, i+1)
	}
	a.refusals = append(a.refusals, r)
	if over := len(a.refusals) - keepRefusals; over > 0 {
		a.refusals = slices.Delete(a.refusals, 0, over)
	}
	return err
}

// Overview is the state of the allocator.
type Overview struct {
	Holders  []Holder // sorted by host uid
	Refusals []Refusal
	Pool     *PoolOverview // nil for none
}

// PoolOverview is the state of the pool.
type PoolOverview struct {
	Source             string
	Ranges, Held, Free int
	// Quarantined are the ranges in quarantine.
	Quarantined []Quarantined
}

// Quarantined is a range in quarantine, and its user that the search found.
type Quarantined struct {
	Mappings Mappings
	UsedBy   string
}

// Usage returns the numbers of free, held and quarantined ranges of the pool. It does not search.
// ok is false without a pool.
func (a *Allocator) Usage() (free, held, quarantined int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pool == nil {
		return 0, 0, 0, false
	}
	return len(a.pool.free), len(a.pool.held), len(a.pool.quarantine), true
}

// Overview searches the host for users of ranges in quarantine, and returns the state of the
// allocator, also if the search fails.
func (a *Allocator) Overview(ctx context.Context) (Overview, error) {
	var users map[Mappings]string
	var err error
	if a.pool != nil {
		users, err = a.search(ctx)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	o := Overview{Refusals: slices.Clone(a.refusals)}
	for _, h := range a.holdings.byID {
		o.Holders = append(o.Holders, h.Holder)
	}
	slices.SortFunc(o.Holders, func(x, y Holder) int {
		return cmp.Or(cmp.Compare(x.Mappings.UIDs.HostID, y.Mappings.UIDs.HostID), cmp.Compare(x.ID, y.ID))
	})
	if a.pool == nil {
		return o, err
	}
	o.Pool = &PoolOverview{Source: a.pool.Source, Ranges: len(a.pool.slots), Held: len(a.pool.held), Free: len(a.pool.free)}
	for _, m := range a.pool.quarantined() {
		o.Pool.Quarantined = append(o.Pool.Quarantined, Quarantined{Mappings: m, UsedBy: users[m]})
	}
	return o, err
}
