package owners

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Map maps ids of an image to host ids. The container ids of its extents are ids of the image. An
// id outside of the extents is an error.
type Map struct {
	UIDs, GIDs []specs.LinuxIDMapping
}

// Inverse returns the map from host ids to ids of the image.
func (m Map) Inverse() Map {
	return Map{UIDs: inverse(m.UIDs), GIDs: inverse(m.GIDs)}
}

func inverse(extents []specs.LinuxIDMapping) []specs.LinuxIDMapping {
	inverted := make([]specs.LinuxIDMapping, len(extents))
	for i, e := range extents {
		inverted[i] = specs.LinuxIDMapping{ContainerID: e.HostID, HostID: e.ContainerID, Size: e.Size}
	}
	return inverted
}

func (m Map) validate() error {
	if err := validate("uid", m.UIDs); err != nil {
		return err
	}
	return validate("gid", m.GIDs)
}

// validate fails unless the extents map each id to one id, and back.
func validate(kind string, extents []specs.LinuxIDMapping) error {
	if len(extents) == 0 {
		return fmt.Errorf("the %s map is empty: %w", kind, errdefs.ErrInvalidArgument)
	}
	for i, e := range extents {
		// The id above the last is (uid_t)-1, which is invalid.
		if last := uint64(math.MaxUint32) - 1; e.Size == 0 || end(e.ContainerID, e.Size) > last+1 || end(e.HostID, e.Size) > last+1 {
			return fmt.Errorf("the %s map has an extent of %d ids from %d to %d; use at least one id, none above %d: %w",
				kind, e.Size, e.ContainerID, e.HostID, last, errdefs.ErrInvalidArgument)
		}
		for _, other := range extents[:i] {
			if overlap(e.ContainerID, e.Size, other.ContainerID, other.Size) || overlap(e.HostID, e.Size, other.HostID, other.Size) {
				return fmt.Errorf("the %s map has overlapping extents from %d and %d: %w", kind, other.ContainerID, e.ContainerID, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func overlap(a, sizeA, b, sizeB uint32) bool {
	return uint64(a) < end(b, sizeB) && uint64(b) < end(a, sizeA)
}

// end returns the id after the last.
func end(first, size uint32) uint64 { return uint64(first) + uint64(size) }

func (m Map) uid(id uint32) (uint32, error) { return lookup("uid", m.UIDs, id) }
func (m Map) gid(id uint32) (uint32, error) { return lookup("gid", m.GIDs, id) }

func lookup(kind string, extents []specs.LinuxIDMapping, id uint32) (uint32, error) {
	for _, e := range extents {
		if id >= e.ContainerID && id-e.ContainerID < e.Size {
			return e.HostID + (id - e.ContainerID), nil
		}
	}
	return 0, &unmappedError{kind: kind, id: id}
}

// unmappedError is an id outside of the map.
type unmappedError struct {
	kind string
	id   uint32
}

func (e *unmappedError) Error() string {
	return fmt.Sprintf("%s %d is not mapped", e.kind, e.id)
}

// unmapped collects the files with ids outside of the map.
type unmapped struct {
	seen atomic.Bool

	mu    sync.Mutex
	files int64
	path  string // the first in order
	id    *unmappedError
}

func (u *unmapped) add(path string, id *unmappedError) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.files == 0 || path < u.path {
		u.path, u.id = path, id
	}
	u.files++
	u.seen.Store(true)
}

// err returns nil if all ids were mapped.
func (u *unmapped) err(m Map) error {
	if u.files == 0 {
		return nil
	}
	extents := m.UIDs
	if u.id.kind == "gid" {
		extents = m.GIDs
	}
	more := ""
	if u.files > 1 {
		more = fmt.Sprintf(", and %d other files have such ids", u.files-1)
	}
	return fmt.Errorf("%s %d of file %q is not one of the ids that are mapped (%s)%s: %w", u.id.kind, u.id.id, u.path, ranges(extents), more, errdefs.ErrFailedPrecondition)
}

// ranges lists the mapped ids, such as "0-65535".
func ranges(extents []specs.LinuxIDMapping) string {
	var text []byte
	for i, e := range slices.SortedFunc(slices.Values(extents), byContainerID) {
		if i > 0 {
			text = append(text, ", "...)
		}
		text = fmt.Appendf(text, "%d-%d", e.ContainerID, end(e.ContainerID, e.Size)-1)
	}
	return string(text)
}

func byContainerID(a, b specs.LinuxIDMapping) int {
	return int(int64(a.ContainerID) - int64(b.ContainerID))
}
