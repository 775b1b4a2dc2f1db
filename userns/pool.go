package userns

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// RangeSize is the number of ids per pod in mode auto, the same as the kubelet's.
const RangeSize = 1 << 16

// slot is a range of a pool, with the time of its last use on the pool's own clock, 0 if it was
// never used.
type slot struct {
	mappings Mappings
	lastUsed uint64
	holder   string // "" if it is not held
}

// Pool holds the ranges that mode auto gives to pods. A range is free, held or in quarantine.
//
// A range that no sandbox holds starts in quarantine, because an earlier daemon may have used it.
type Pool struct {
	// Source names where the ranges come from, for messages.
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

// OpenPool makes a pool of ranges. The first 64Ki uids are paired with the first 64Ki gids, and so
// on; the rest of the longer side is not used. path is the file for the history of use. If the file
// is missing or damaged, only the order of use is lost.
//
// It fails with InvalidArgument for ids that pods can't have, for overlapping ranges, and for fewer
// than 64Ki ids.
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
		return nil, invalid("%s: no range of %d contiguous uids and gids; the pool needs at least one", source, RangeSize)
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
			return nil, invalid("the pool's %d %ss from %d are not all within %d to %d", e.Size, kind, e.First, MinHostID, uint32(maxHostID))
		}
		if i > 0 && sorted[i-1].First+sorted[i-1].Size > e.First {
			return nil, invalid("the pool's ranges of %ss from %d and from %d overlap", kind, sorted[i-1].First, e.First)
		}
	}
	for _, e := range extents {
		for first := e.First; first+RangeSize <= e.First+e.Size; first += RangeSize {
			ranges = append(ranges, Mapping{HostID: uint32(first), Length: RangeSize})
		}
	}
	return ranges, nil
}

// Overlaps reports whether the pool and m have any id in common.
func (p *Pool) Overlaps(m Mappings) bool {
	for own := range p.slots {
		if own.Overlap(m) {
			return true
		}
	}
	return false
}

// restore marks a range as held, if it is one of the pool's.
func (p *Pool) restore(id string, m Mappings) {
	if s, ok := p.slots[m]; ok && s.holder == "" {
		delete(p.quarantine, m)
		p.take(id, s)
	}
}

// next returns the least recently used free range that no holder outside the pool overlaps.
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

// quarantineFreed puts the free ranges that a released holder outside the pool overlapped into
// quarantine.
func (p *Pool) quarantineFreed(m Mappings) {
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

// quarantined returns the ranges in quarantine, the least recently used first.
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

// exhausted returns an error with the numbers of ranges by state, and the error of the search.
func (p *Pool) exhausted(why error) error {
	err := fmt.Errorf("the pool of id ranges (%s) has none left: of %d ranges, %d are held, %d are in quarantine and %d belong to pods outside the pool",
		p.Source, len(p.slots), len(p.held), len(p.quarantine), len(p.free))
	if why != nil {
		err = fmt.Errorf("%w; failed to search the host for unused ranges: %w", err, why)
	}
	return fmt.Errorf("%w; remove pods or make the pool larger: %w", err, errdefs.ErrResourceExhausted)
}
