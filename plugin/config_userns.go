package plugin

import (
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/userns"
)

// UserNSConfig sets how the pods of one runtime handler get their id mappings.
type UserNSConfig struct {
	// Mode is "kubelet", the default: pods have the mapping that the kubelet asks for; "auto": a pod without one gets a private
	// range of 64Ki ids from the pool; "node": all pods without one share the node-wide mapping.
	Mode string `toml:"mode"`
	// Unmappable sets, in modes auto and node, what happens to privileged pods, pods in the node's
	// namespaces, and pods with users, groups or sysctls beyond the range: "refuse", the default,
	// or "host", which leaves them on the node's users. Containers that need the node's users in
	// other pods are always refused.
	Unmappable string `toml:"unmappable"`
	// NodeWideUIDMapping and NodeWideGIDMapping are the mapping of mode node.
	NodeWideUIDMapping *MappingConfig `toml:"node_wide_uid_mapping"`
	NodeWideGIDMapping *MappingConfig `toml:"node_wide_gid_mapping"`
}

// MappingConfig is one extent of an id map: the Size ids from ContainerID up are the host's from HostID up.
type MappingConfig struct {
	ContainerID int64 `toml:"container_id"`
	HostID      int64 `toml:"host_id"`
	Size        int64 `toml:"size"`
}

// PoolConfig sets the host ids that mode auto gives to pods: Ranges, or the subordinate ids of User
// in /etc/subuid and /etc/subgid.
type PoolConfig struct {
	Ranges []RangeConfig `toml:"ranges"`
	User   string        `toml:"user"`
}

// RangeConfig is the Size host ids from HostID up.
type RangeConfig struct {
	HostID int64 `toml:"host_id"`
	Size   int64 `toml:"size"`
}

// policies returns the parsed form of c.UserNS. All errors are InvalidArgument and name the option.
func (c *Config) policies(stock *stockConfig) (policies, error) {
	lowest, err := c.lowest()
	if err != nil {
		return nil, err
	}
	all := policies{}
	for _, name := range slices.Sorted(maps.Keys(c.UserNS)) {
		if stock.Containerd.Runtimes[name].Sandboxer != Name {
			return nil, fmt.Errorf("userns.%s: containerd has no runtime handler of that name with sandboxer = %q: %w", name, Name, errdefs.ErrInvalidArgument)
		}
		policy, err := c.UserNS[name].policy()
		if err == nil && policy.NodeWide != nil {
			err = policy.NodeWide.CheckLowest(lowest)
		}
		if err != nil {
			return nil, fmt.Errorf("userns.%s: %w", name, err)
		}
		all[name] = policy
	}
	return all, all.apart()
}

// apart fails if two different node-wide mappings overlap: running pods of one handler would block
// those of the other.
func (p policies) apart() error {
	names := slices.Sorted(maps.Keys(p))
	for i, name := range names {
		for _, other := range names[:i] {
			m, n := p[name].NodeWide, p[other].NodeWide
			if m != nil && n != nil && *m != *n && m.Overlap(*n) {
				return fmt.Errorf("userns.%s: node-wide mapping overlaps that of userns.%s; use the same mapping for both, or separate ids: %w",
					name, other, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func (c UserNSConfig) policy() (p userns.Policy, err error) {
	if p.Mode, err = oneOf("mode", c.Mode, userns.ModeKubelet, userns.ModeAuto, userns.ModeNode); err != nil {
		return p, err
	}
	if p.Unmappable, err = oneOf("unmappable", c.Unmappable, userns.UnmappableRefuse, userns.UnmappableHost); err != nil {
		return p, err
	}
	if p.Mode != userns.ModeNode {
		if c.NodeWideUIDMapping != nil || c.NodeWideGIDMapping != nil {
			return p, fmt.Errorf("a node-wide mapping is set, but mode is %q; set mode = %q or remove the mapping: %w", p.Mode, userns.ModeNode, errdefs.ErrInvalidArgument)
		}
		return p, nil
	}
	p.NodeWide, err = c.nodeWide()
	return p, err
}

func (c UserNSConfig) nodeWide() (*userns.Mappings, error) {
	if c.NodeWideUIDMapping == nil || c.NodeWideGIDMapping == nil {
		return nil, fmt.Errorf("mode %q needs node_wide_uid_mapping and node_wide_gid_mapping: %w", userns.ModeNode, errdefs.ErrInvalidArgument)
	}
	uids, err := c.NodeWideUIDMapping.mapping("node_wide_uid_mapping")
	if err != nil {
		return nil, err
	}
	gids, err := c.NodeWideGIDMapping.mapping("node_wide_gid_mapping")
	if err != nil {
		return nil, err
	}
	m := &userns.Mappings{UIDs: uids, GIDs: gids}
	return m, m.Validate()
}

func (c MappingConfig) mapping(key string) (userns.Mapping, error) {
	for _, field := range []struct {
		name  string
		value int64
	}{{"container_id", c.ContainerID}, {"host_id", c.HostID}, {"size", c.Size}} {
		if field.value < 0 || field.value > math.MaxUint32 {
			return userns.Mapping{}, fmt.Errorf("%s: %s = %d is not an id: %w", key, field.name, field.value, errdefs.ErrInvalidArgument)
		}
	}
	return userns.Mapping{ContainerID: uint32(c.ContainerID), HostID: uint32(c.HostID), Length: uint32(c.Size)}, nil
}

// oneOf returns text if it is one of the values of an option, and the first value, the default, for
// "".
func oneOf[T ~string](key, text string, values ...T) (T, error) {
	if text == "" {
		return values[0], nil
	}
	if !slices.Contains(values, T(text)) {
		return "", fmt.Errorf("%s = %q is not one of %q: %w", key, text, values, errdefs.ErrInvalidArgument)
	}
	return T(text), nil
}

// openPool opens the pool; it returns nil if none is configured. Mode auto needs a pool. All errors
// name the option.
func (c *Config) openPool(policies policies, dir string) (*userns.Pool, error) {
	lowest, err := c.lowest()
	if err != nil {
		return nil, err
	}
	source, ranges, err := c.Pool.ranges()
	switch {
	case err != nil:
		return nil, fmt.Errorf("userns_pool: %w", err)
	case source != "":
		pool, err := userns.OpenPool(source, ranges, filepath.Join(dir, "pool-history"))
		if err != nil {
			return nil, fmt.Errorf("userns_pool: %w", err)
		}
		if below := (userns.Mapping{Length: lowest}); pool.Overlaps(userns.Mappings{UIDs: below, GIDs: below}) {
			return nil, fmt.Errorf("userns_pool: host ids below userns_min_host_id = %d; choose higher ones: %w", lowest, errdefs.ErrInvalidArgument)
		}
		return pool, policies.apartFrom(pool)
	}
	for _, name := range slices.Sorted(maps.Keys(policies)) {
		if policies[name].Mode == userns.ModeAuto {
			return nil, fmt.Errorf("userns.%s: mode %q needs a pool; set userns_pool.ranges or userns_pool.user: %w", name, userns.ModeAuto, errdefs.ErrInvalidArgument)
		}
	}
	return nil, nil
}

// ranges returns the configured ranges and the name of their source, "" if there are none.
func (c PoolConfig) ranges() (source string, _ userns.Ranges, err error) {
	switch {
	case len(c.Ranges) > 0 && c.User != "":
		return "", userns.Ranges{}, fmt.Errorf("ranges and user are both set; remove one: %w", errdefs.ErrInvalidArgument)
	case c.User != "":
		ranges, err := userns.SubIDs(c.User, "/etc/subuid", "/etc/subgid")
		return fmt.Sprintf("/etc/subuid and /etc/subgid of user %q", c.User), ranges, err
	case len(c.Ranges) > 0:
		var extents []userns.Extent
		for _, r := range c.Ranges {
			if r.HostID < 0 || r.Size <= 0 {
				return "", userns.Ranges{}, fmt.Errorf("ranges: host_id = %d, size = %d is not a range of ids: %w", r.HostID, r.Size, errdefs.ErrInvalidArgument)
			}
			extents = append(extents, userns.Extent{First: uint64(r.HostID), Size: uint64(r.Size)})
		}
		return "userns_pool.ranges", userns.Ranges{UIDs: extents, GIDs: extents}, nil
	default:
		return "", userns.Ranges{}, nil
	}
}

// apartFrom fails if a node-wide mapping overlaps the pool.
func (p policies) apartFrom(pool *userns.Pool) error {
	for _, name := range slices.Sorted(maps.Keys(p)) {
		if m := p[name].NodeWide; m != nil && pool.Overlaps(*m) {
			return fmt.Errorf("userns.%s: node-wide mapping overlaps userns_pool; use separate ids: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
