// Package userns validates the id mappings of pods in user namespaces.
package userns

import (
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// MinHostID is the lowest host id that a pod may be mapped to. The ids below belong to the
	// node's root and system users. A configuration may raise it, to keep pods off the ids of human
	// users, too.
	MinHostID = 1000

	// TryHostID is the host id that probes of the node's capabilities use. No pod may have it, so
	// no probe looks like a pod.
	TryHostID = MinHostID - 1

	// maxHostID is the last host id a pod may be mapped to. The one above it,
	// (uid_t)-1, means "no id" to setreuid(2), chown(2) and others, so the
	// kernel leaves it unmapped (user_namespaces(7)) and refuses a range that
	// holds it.
	maxHostID = math.MaxUint32 - 1
)

// Mapping is one extent of a user namespace's id map: the Length ids from
// ContainerID up are the host's ids from HostID up.
type Mapping struct {
	ContainerID uint32
	HostID      uint32
	Length      uint32
}

// Mappings are the uid and the gid map of a pod's user namespace.
type Mappings struct {
	UIDs Mapping
	GIDs Mapping
}

// FromCRI returns the mappings that a CRI request asks for, nil when the pod
// stays in the node's user namespace: without options, or in mode NODE.
//
// Mode POD needs one extent for uids and one for gids, both from container id 0
// and of the same length, on host ids up to 2^32-2. Anything else, modes
// CONTAINER and TARGET included, is an InvalidArgument error. How low the host
// ids may be is the node's choice: see [Mappings.CheckLowest].
func FromCRI(opts *runtime.UserNamespace) (*Mappings, error) {
	if opts == nil {
		return nil, nil
	}
	uids, gids := opts.GetUids(), opts.GetGids()
	switch mode := opts.GetMode(); mode {
	case runtime.NamespaceMode_NODE:
		if len(uids) > 0 || len(gids) > 0 {
			return nil, invalid("user namespace mode NODE came with %d uid and %d gid mappings: leave them out or ask for mode POD", len(uids), len(gids))
		}
		return nil, nil
	case runtime.NamespaceMode_POD:
		return podMappings(uids, gids)
	default:
		return nil, invalid("user namespace mode %s is not supported: ask for POD or NODE", mode)
	}
}

// CRI returns the mappings as a CRI request writes them.
func (m Mappings) CRI() *runtime.UserNamespace {
	return &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: m.UIDs.cri(), Gids: m.GIDs.cri()}
}

// Linux returns the mappings as the OCI runtime specification writes them.
func (m Mappings) Linux() (uids, gids []specs.LinuxIDMapping) {
	return m.UIDs.linux(), m.GIDs.linux()
}

// Overlap reports whether the two have any uid or any gid in common.
func (m Mappings) Overlap(other Mappings) bool {
	return m.UIDs.overlaps(other.UIDs) || m.GIDs.overlaps(other.GIDs)
}

// of returns the uid or the gid map. kind is "uid" or "gid".
func (m Mappings) of(kind string) Mapping {
	if kind == "uid" {
		return m.UIDs
	}
	return m.GIDs
}

func (m Mapping) linux() []specs.LinuxIDMapping {
	return []specs.LinuxIDMapping{{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Length}}
}

func (m Mapping) cri() []*runtime.IDMapping {
	return []*runtime.IDMapping{{ContainerId: m.ContainerID, HostId: m.HostID, Length: m.Length}}
}

func podMappings(uids, gids []*runtime.IDMapping) (*Mappings, error) {
	u, err := single("uid", uids)
	if err != nil {
		return nil, err
	}
	g, err := single("gid", gids)
	if err != nil {
		return nil, err
	}
	m := &Mappings{UIDs: u, GIDs: g}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return m, nil
}

// single returns the only extent of one id map. kind is "uid" or "gid".
func single(kind string, extents []*runtime.IDMapping) (Mapping, error) {
	if len(extents) != 1 {
		return Mapping{}, invalid("user namespace mode POD came with %d %s mappings: give exactly one", len(extents), kind)
	}
	return Mapping{
		ContainerID: extents[0].GetContainerId(),
		HostID:      extents[0].GetHostId(),
		Length:      extents[0].GetLength(),
	}, nil
}

// Validate fails with InvalidArgument if no pod may have the mappings.
func (m Mappings) Validate() error {
	if err := m.UIDs.validate("uid"); err != nil {
		return err
	}
	if err := m.GIDs.validate("gid"); err != nil {
		return err
	}
	if m.UIDs.Length != m.GIDs.Length {
		return invalid("the uid mapping is %d ids long and the gid mapping %d: give both the same length", m.UIDs.Length, m.GIDs.Length)
	}
	return nil
}

func (m Mapping) validate(kind string) error {
	if m.ContainerID != 0 {
		return invalid("the %s mapping starts at container id %d: let it start at 0", kind, m.ContainerID)
	}
	if m.Length == 0 {
		return invalid("the %s mapping has length 0: map at least one id", kind)
	}
	if m.last() > maxHostID {
		return invalid("the %s mapping takes host ids %d to %d: choose a range up to %d", kind, m.HostID, m.last(), uint32(maxHostID))
	}
	return nil
}

// CheckLowest fails with InvalidArgument for host ids below lowest, the lowest that pods may have.
func (m Mappings) CheckLowest(lowest uint32) error {
	for _, kind := range []string{"uid", "gid"} {
		if m := m.of(kind); m.HostID < lowest {
			return invalid("the %s mapping takes host ids %d to %d: choose a range within %d to %d", kind, m.HostID, m.last(), lowest, uint32(maxHostID))
		}
	}
	return nil
}

// hasHostID reports whether a host id is mapped.
func (m Mapping) hasHostID(id uint32) bool { return id >= m.HostID && id-m.HostID < m.Length }

// last returns the last host id. It is 64 bits wide, because the sum may not fit into 32.
func (m Mapping) last() uint64 { return uint64(m.HostID) + uint64(m.Length) - 1 }

func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
