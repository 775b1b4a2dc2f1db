package leaks

import (
	"context"
	"slices"
)

// WithoutStores returns the leaks that the host shows without containerd's stores: marked things of
// unknown sandboxes, and all other things of these sandboxes. known says whether the sandbox with
// an id is on record.
func (h Host) WithoutStores(ctx context.Context, known func(id string) bool) ([]Thing, error) {
	marked, err := h.Marked()
	if err != nil {
		return nil, err
	}
	marked = slices.DeleteFunc(marked, func(t Thing) bool { return known(t.ID) })
	unmarked, err := h.Unmarked(ctx)
	if err != nil {
		return nil, err
	}
	cgroups, err := Cgroups(marked)
	if err != nil {
		return nil, err
	}
	ids := IDs(marked)
	unmarked = slices.DeleteFunc(unmarked, func(t Thing) bool { return !slices.Contains(ids, t.ID) })
	things := slices.Concat(marked, unmarked, cgroups)
	Sort(things)
	return things, nil
}
