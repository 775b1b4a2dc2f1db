package userns

import (
	"maps"
	"slices"
	"time"
)

// Origin is the source of a holder's mapping.
type Origin string

const (
	// OriginRequest: the CRI request of a podfsm sandbox, so the kubelet.
	OriginRequest Origin = "request"
	// OriginAuto: the pool.
	OriginAuto Origin = "auto"
	// OriginNode: the configuration, for all pods of a runtime handler.
	OriginNode Origin = "node"
	// OriginStock: the CRI request of a sandbox of another controller.
	OriginStock Origin = "stock"
)

// Holder is a sandbox that holds host ids.
type Holder struct {
	// ID is unique among holders.
	ID string
	// Owner is whose sandboxes share ids: a pod with its attempts, or all pods with one node-wide
	// mapping.
	Owner string
	// Pod is "namespace/name" of the pod.
	Pod      string
	Origin   Origin
	Mappings Mappings
	Since    time.Time
}

// holding is a holder as the allocator keeps it.
type holding struct {
	Holder
	// yielded: the sandbox is stopped without processes, so other owners may hold its ids.
	yielded bool
}

// holdings are all holders, indexed by sandbox and by their ids.
type holdings struct {
	byID       map[string]*holding
	uids, gids index
}

func newHoldings() *holdings {
	return &holdings{byID: map[string]*holding{}, uids: index{}, gids: index{}}
}

func (h *holdings) add(holder Holder) {
	h.remove(holder.ID)
	added := &holding{Holder: holder}
	h.byID[holder.ID] = added
	h.uids.add(holder.Mappings.UIDs, added)
	h.gids.add(holder.Mappings.GIDs, added)
}

func (h *holdings) remove(id string) {
	if old, ok := h.byID[id]; ok {
		delete(h.byID, id)
		h.uids.remove(old.Mappings.UIDs, old)
		h.gids.remove(old.Mappings.GIDs, old)
	}
}

// rival returns a holder of another owner with some of the ids, and the kind of the shared ids. It
// returns nil if there is none.
func (h *holdings) rival(m Mappings, owner string) (rival *holding, kind string) {
	if rival := h.uids.rival(m.UIDs, owner); rival != nil {
		return rival, "uid"
	}
	return h.gids.rival(m.GIDs, owner), "gid"
}

// blockBits is the size of a block of ids as a power of two: 64Ki ids, as many as the kubelet and
// the pool give to a pod.
const blockBits = 16

// index finds the claims on a range of ids by the blocks that it touches. For ranges of about a
// block, the cost of a lookup does not depend on the number of holders.
type index map[uint32][]*claim

// claim is a range and its holders of one owner.
type claim struct {
	owner   string
	extent  Mapping
	holders map[string]*holding
}

// blocks returns the first and last block that m touches. For a mapping without ids, which only a
// record could have, first is above last.
func blocks(m Mapping) (first, last uint32) {
	if m.Length == 0 {
		return 1, 0
	}
	return m.HostID >> blockBits, uint32(m.last() >> blockBits)
}

func (x index) find(m Mapping, owner string) *claim {
	first, _ := blocks(m)
	for _, c := range x[first] {
		if c.owner == owner && c.extent == m {
			return c
		}
	}
	return nil
}

func (x index) add(m Mapping, h *holding) {
	c := x.find(m, h.Owner)
	if c == nil {
		c = &claim{owner: h.Owner, extent: m, holders: map[string]*holding{}}
		for first, last := blocks(m); first <= last; first++ {
			x[first] = append(x[first], c)
		}
	}
	c.holders[h.ID] = h
}

func (x index) remove(m Mapping, h *holding) {
	c := x.find(m, h.Owner)
	if c == nil {
		return // no ids
	}
	delete(c.holders, h.ID)
	if len(c.holders) > 0 {
		return
	}
	for first, last := blocks(m); first <= last; first++ {
		x[first] = slices.DeleteFunc(x[first], func(other *claim) bool { return other == c })
		if len(x[first]) == 0 {
			delete(x, first)
		}
	}
}

// rival returns a holder of another owner that overlaps m and hasn't yielded.
func (x index) rival(m Mapping, owner string) *holding {
	for first, last := blocks(m); first <= last; first++ {
		for _, c := range x[first] {
			if c.owner == owner || !c.extent.overlaps(m) {
				continue
			}
			if rival := c.active(); rival != nil {
				return rival
			}
		}
	}
	return nil
}

// taken reports whether any holder overlaps m, even one that has yielded.
func (x index) taken(m Mapping) bool {
	for first, last := blocks(m); first <= last; first++ {
		if slices.ContainsFunc(x[first], func(c *claim) bool { return c.extent.overlaps(m) }) {
			return true
		}
	}
	return false
}

// active returns the claim's first holder by id that hasn't yielded: the same one at each call, for
// constant error texts.
func (c *claim) active() *holding {
	for _, id := range slices.Sorted(maps.Keys(c.holders)) {
		if h := c.holders[id]; !h.yielded {
			return h
		}
	}
	return nil
}

func (m Mapping) overlaps(other Mapping) bool {
	return uint64(m.HostID) <= other.last() && uint64(other.HostID) <= m.last()
}
