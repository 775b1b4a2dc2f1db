package plugin

import "github.com/podfsm/podfsm/userns"

// runtimeInfo is podfsm's part of the runtime's verbose status, under its own key.
type runtimeInfo struct {
	// UserNS tells, per runtime handler, how its pods get their id mappings.
	UserNS map[string]userNSInfo `json:"userns"`
}

// userNSInfo has the names of the configuration options. The mapping replaces UserNamespaceConfig,
// which GetRuntimeConfigInfo had in the first patches for user namespaces.
type userNSInfo struct {
	Mode               userns.Mode       `json:"mode"`
	Unmappable         userns.Unmappable `json:"unmappable,omitempty"`
	NodeWideUIDMapping *mappingInfo      `json:"node_wide_uid_mapping,omitempty"`
	NodeWideGIDMapping *mappingInfo      `json:"node_wide_gid_mapping,omitempty"`
}

type mappingInfo struct {
	ContainerID uint32 `json:"container_id"`
	HostID      uint32 `json:"host_id"`
	Size        uint32 `json:"size"`
}

// StatusInfo returns the runtimeInfo of the configuration in force.
func (c *Controller) StatusInfo() (map[string]string, error) {
	info := runtimeInfo{UserNS: map[string]userNSInfo{}}
	for name, handler := range c.stock.Containerd.Runtimes {
		if handler.Sandboxer == Name {
			info.UserNS[name] = newUserNSInfo(c.policies.of(name))
		}
	}
	return marshalEach(map[string]any{Name: info})
}

func newUserNSInfo(policy userns.Policy) userNSInfo {
	info := userNSInfo{Mode: policy.Mode}
	if policy.Mode != userns.ModeKubelet {
		info.Unmappable = policy.Unmappable
	}
	if m := policy.NodeWide; m != nil {
		info.NodeWideUIDMapping = &mappingInfo{m.UIDs.ContainerID, m.UIDs.HostID, m.UIDs.Length}
		info.NodeWideGIDMapping = &mappingInfo{m.GIDs.ContainerID, m.GIDs.HostID, m.GIDs.Length}
	}
	return info
}
