package userns

import (
	"maps"
	"slices"
	"time"
)

// Origin says who chose a holder's mapping.
type Origin string

const (
	// OriginRequest: the request that made the sandbox, so the kubelet.
	OriginRequest Origin = "request"
	// OriginAuto: podfsm, out of its pool.
	OriginAuto Origin = "auto"
	// OriginNode: podfsm's configuration, for all pods of a runtime handler.
	OriginNode Origin = "node"
	// OriginStock: the request that made the sandbox of another controller.
	OriginStock Origin = "stock"
)

// Holder is a sandbox that holds host ids.
type Holder struct {
	// ID names the sandbox, and no other one.
	ID string
	// Owner may hold the same ids by several sandboxes: a pod by its attempts, or all pods with one node-wide mapping.
	Owner string
	// Pod is the pod's "namespace/name".
	Pod      string
	Origin   Origin
	Mappings Mappings
	Since    time.Time
}

// holding is a holder as the allocator keeps it.
type holding struct {
	Holder
	// spent: the sandbox is stopped and none of its processes is left, so its ids may be given to others.
	spent bool
}

// holdings are all holders, by sandbox and by what they hold.
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

// rival is a holder of another owner that some of the ids are taken by, and which kind of id; nil when there is none.
func (h *holdings) rival(m Mappings, owner string) (rival *holding, kind string) {
	if rival := h.uids.rival(m.UIDs, owner); rival != nil {
		return rival, "uid"
	}
	return h.gids.rival(m.GIDs, owner), "gid"
}

// blockBits make blocks of 64Ki ids, the size that the kubelet and the pool give out.
const blockBits = 16

// index finds the claims on a range of ids by the blocks that it touches. With ranges of about a block's size, what a look costs
// doesn't depend on how many holders there are.
type index map[uint32][]*claim

// claim is one range and all that hold it for one owner.
type claim struct {
	owner   string
	extent  Mapping
	holders map[string]*holding
}

// blocks are those that m touches; of a mapping without ids, which only a record could have, first is above last.
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
		return // it has no ids
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

// rival is a holder of another owner whose ids overlap m, and which isn't spent.
func (x index) rival(m Mapping, owner string) *holding {
	for first, last := blocks(m); first <= last; first++ {
		for _, c := range x[first] {
			if c.owner == owner || !c.extent.overlaps(m) {
				continue
			}
			if rival := c.unspent(); rival != nil {
				return rival
			}
		}
	}
	return nil
}

// taken says whether any holder at all has ids of m, spent or not.
func (x index) taken(m Mapping) bool {
	for first, last := blocks(m); first <= last; first++ {
		if slices.ContainsFunc(x[first], func(c *claim) bool { return c.extent.overlaps(m) }) {
			return true
		}
	}
	return false
}

// unspent is the first of the claim's holders, by id, that isn't spent: the same one from call to call.
func (c *claim) unspent() *holding {
	for _, id := range slices.Sorted(maps.Keys(c.holders)) {
		if h := c.holders[id]; !h.spent {
			return h
		}
	}
	return nil
}

func (m Mapping) overlaps(other Mapping) bool {
	return uint64(m.HostID) <= other.last() && uint64(other.HostID) <= m.last()
}
