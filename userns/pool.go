package userns

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// RangeSize is how many ids mode auto gives to a pod, as many as the kubelet does.
const RangeSize = 1 << 16

// slot is a range of a pool, and the time of its last use on the pool's own clock; 0 when it was never used.
type slot struct {
	mappings Mappings
	lastUsed uint64
	holder   string // "" for none
}

// Pool is the ranges that mode auto gives to pods. A range is free, held or in quarantine.
//
// Every range that no sandbox holds starts in quarantine, since nobody knows what a daemon before this one did with it.
type Pool struct {
	// Source says where the ranges come from, for people.
	Source string

	history    *history
	slots      map[Mappings]*slot
	free       []*slot // the least recently used first
	quarantine map[Mappings]*slot
	held       map[string]*slot // by holder
}

// Ranges are extents of host ids, for uids and for gids.
type Ranges struct {
	UIDs, GIDs []Extent
}

// Extent is the Size host ids from First up.
type Extent struct {
	First, Size uint64
}

// OpenPool makes a pool of ranges. The first 64Ki uids go together with the first 64Ki gids, and so on; what is left over on one
// side is not used. path is a file in which the pool keeps what was used when; without it, or with a damaged one, only that is lost.
//
// It fails with InvalidArgument for ids that pods can't have, for ranges that overlap, and for fewer than 64Ki ids.
func OpenPool(source string, ranges Ranges, path string) (*Pool, error) {
	uids, err := split("uid", ranges.UIDs)
	if err != nil {
		return nil, err
	}
	gids, err := split("gid", ranges.GIDs)
	if err != nil {
		return nil, err
	}
	size := min(len(uids), len(gids))
	if size == 0 {
		return nil, invalid("%s: there are no %d uids and gids in one piece each, the fewest that a pool can be made of", source, RangeSize)
	}
	p := &Pool{Source: source, slots: map[Mappings]*slot{}, quarantine: map[Mappings]*slot{}, held: map[string]*slot{}}
	for i := range size {
		m := Mappings{UIDs: uids[i], GIDs: gids[i]}
		s := &slot{mappings: m}
		p.slots[m], p.quarantine[m] = s, s
	}
	p.history = openHistory(path, p.slots)
	return p, nil
}

// split cuts extents into ranges; kind is "uid" or "gid".
func split(kind string, extents []Extent) (ranges []Mapping, err error) {
	sorted := slices.SortedFunc(slices.Values(extents), func(a, b Extent) int { return cmp.Compare(a.First, b.First) })
	for i, e := range sorted {
		if e.Size == 0 || e.First < MinHostID || e.First > maxHostID || e.Size > maxHostID-e.First+1 {
			return nil, invalid("the pool's %d %ss from %d up are not all within %d to %d", e.Size, kind, e.First, MinHostID, uint32(maxHostID))
		}
		if i > 0 && sorted[i-1].First+sorted[i-1].Size > e.First {
			return nil, invalid("the pool's %ss from %d up and from %d up overlap", kind, sorted[i-1].First, e.First)
		}
	}
	for _, e := range extents {
		for first := e.First; first+RangeSize <= e.First+e.Size; first += RangeSize {
			ranges = append(ranges, Mapping{HostID: uint32(first), Length: RangeSize})
		}
	}
	return ranges, nil
}

// Overlaps says whether any of the pool's ids are m's, too.
func (p *Pool) Overlaps(m Mappings) bool {
	for own := range p.slots {
		if own.Overlap(m) {
			return true
		}
	}
	return false
}

// restore marks a range as held, where it is one of the pool's.
func (p *Pool) restore(id string, m Mappings) {
	if s, ok := p.slots[m]; ok && s.holder == "" {
		delete(p.quarantine, m)
		p.take(id, s)
	}
}

// next is the least recently used free range that nobody outside the pool has ids of.
func (p *Pool) next(taken func(Mappings) bool) *slot {
	for _, s := range p.free {
		if !taken(s.mappings) {
			return s
		}
	}
	return nil
}

func (p *Pool) take(id string, s *slot) {
	p.free = slices.DeleteFunc(p.free, func(other *slot) bool { return other == s })
	p.held[id], s.holder = s, id
}

// release puts a holder's range into quarantine.
func (p *Pool) release(id string) error {
	s, ok := p.held[id]
	if !ok {
		return nil
	}
	delete(p.held, id)
	p.quarantine[s.mappings], s.holder = s, ""
	return p.history.used(s)
}

// distrust puts the free ranges that a holder outside the pool had ids of into quarantine.
func (p *Pool) distrust(m Mappings) {
	p.free = slices.DeleteFunc(p.free, func(s *slot) bool {
		had := s.mappings.Overlap(m)
		if had {
			p.quarantine[s.mappings] = s
		}
		return had
	})
}

// clear frees a range that nothing on the host uses.
func (p *Pool) clear(m Mappings) {
	s, ok := p.quarantine[m]
	if !ok {
		return
	}
	delete(p.quarantine, m)
	at, _ := slices.BinarySearchFunc(p.free, s, byUse)
	p.free = slices.Insert(p.free, at, s)
}

// quarantined are the ranges in quarantine, the least recently used first.
func (p *Pool) quarantined() (all []Mappings) {
	slots := make([]*slot, 0, len(p.quarantine))
	for _, s := range p.quarantine {
		slots = append(slots, s)
	}
	slices.SortFunc(slots, byUse)
	for _, s := range slots {
		all = append(all, s.mappings)
	}
	return all
}

func byUse(a, b *slot) int {
	return cmp.Or(cmp.Compare(a.lastUsed, b.lastUsed), cmp.Compare(a.mappings.UIDs.HostID, b.mappings.UIDs.HostID))
}

// exhausted says in numbers why there is no range.
func (p *Pool) exhausted(why error) error {
	err := fmt.Errorf("the pool of id ranges (%s) has none left: of %d ranges, %d are held, %d are in quarantine and %d belong to pods outside the pool",
		p.Source, len(p.slots), len(p.held), len(p.quarantine), len(p.free))
	if why != nil {
		err = fmt.Errorf("%w; the host can't be searched for what uses them: %w", err, why)
	}
	return fmt.Errorf("%w; remove pods or make the pool larger: %w", err, errdefs.ErrResourceExhausted)
}
