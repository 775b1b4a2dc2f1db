package userns

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unmappable returns the reasons why a sandbox can't have a user namespace of length ids, as the
// rest of "the pod …".
func unmappable(config *runtime.PodSandboxConfig, length uint32) (reasons []string) {
	security := config.GetLinux().GetSecurityContext()
	if security.GetPrivileged() {
		reasons = append(reasons, "is privileged")
	}
	options := security.GetNamespaceOptions()
	for _, namespace := range []struct {
		name string
		mode runtime.NamespaceMode
	}{
		{"network", options.GetNetwork()},
		{"pid", options.GetPid()},
		{"ipc", options.GetIpc()},
	} {
		if namespace.mode == runtime.NamespaceMode_NODE {
			reasons = append(reasons, "shares the node's "+namespace.name+" namespace")
		}
	}
	reasons = append(reasons, outside(security, length)...)
	return append(reasons, unmappableSysctls(config.GetLinux().GetSysctls(), length, false)...)
}

// securityContext is the common part of the security contexts of sandboxes and containers.
type securityContext interface {
	GetRunAsUser() *runtime.Int64Value
	GetRunAsGroup() *runtime.Int64Value
	GetSupplementalGroups() []int64
}

// outside returns the reasons why a security context does not fit into a user namespace of length
// ids. Negative ids are skipped, because they are always refused.
func outside(security securityContext, length uint32) (reasons []string) {
	beyond := func(what string, id int64) {
		if id >= int64(length) {
			reasons = append(reasons, fmt.Sprintf("%s %d, beyond the %d ids of its user namespace", what, id, length))
		}
	}
	beyond("runs as user", security.GetRunAsUser().GetValue())
	beyond("runs as group", security.GetRunAsGroup().GetValue())
	for _, group := range security.GetSupplementalGroups() { // includes the pod's fsGroup
		beyond("has the group", group)
	}
	return reasons
}

// hiddenSysctl reports whether the kernel hides a sysctl in network namespaces that belong to a
// user namespace.
func hiddenSysctl(file string) bool {
	if file == "net/ipv6/route/max_size" { // shown since Linux 5.15
		return false
	}
	return strings.HasPrefix(file, "net/core/xfrm_") || strings.HasPrefix(file, "net/ipv6/route/")
}

// unmappableSysctls returns the reasons why sysctls can't be set in a user namespace of length ids.
// A range of groups may exceed the mapping, such as "0 2147483647". In a pod that has not asked for
// a mapping, such a range means all groups of the pod, and is cut at the last mapped group.
func unmappableSysctls(sysctls map[string]string, length uint32, asked bool) (reasons []string) {
	for name, value := range sysctls {
		file := strings.ReplaceAll(name, ".", "/")
		var first, last uint64
		n, _ := fmt.Sscan(value, &first, &last) // an invalid range is refused when it is set
		beyond := first >= uint64(length) || asked && last >= uint64(length)
		switch {
		case file == "net/ipv4/ping_group_range" && n == 2 && beyond:
			reasons = append(reasons, fmt.Sprintf("has the sysctl %s = %q, beyond the %d ids of its user namespace", name, value, length))
		case hiddenSysctl(file):
			reasons = append(reasons, fmt.Sprintf("has the sysctl %s, reserved to the node's users", name))
		}
	}
	slices.Sort(reasons)
	return reasons
}

// CheckPod returns InvalidArgument for a sandbox with ids outside of the user namespace that it
// asks for.
func CheckPod(config *runtime.PodSandboxConfig, m Mappings) error {
	length := m.UIDs.Length
	reasons := append(outside(config.GetLinux().GetSecurityContext(), length), unmappableSysctls(config.GetLinux().GetSysctls(), length, true)...)
	if len(reasons) == 0 {
		return nil
	}
	return invalid("it %s; "+askedRemedy, strings.Join(reasons, " and "), length)
}

// askedRemedy is the remedy for unmapped ids in a pod that has asked for a user namespace.
const askedRemedy = "run the pod with hostUsers: true, or choose ids below %d"

// nodeCapabilities are the capabilities that the kernel always checks against the node's user
// namespace, so they have no effect in a container with its own. A container with ALL gets all
// capabilities of its user namespace and is allowed. MKNOD is not listed, because each container
// has it unless it drops it, nor is MAC_ADMIN, which AppArmor accepts in a policy namespace.
var nodeCapabilities = []string{
	"AUDIT_CONTROL", "AUDIT_READ", "BLOCK_SUSPEND", "BPF", "LINUX_IMMUTABLE", "MAC_OVERRIDE", "PERFMON", "SYSLOG",
	"SYS_MODULE", "SYS_PACCT", "SYS_RAWIO", "SYS_TIME", "SYS_TTY_CONFIG", "WAKE_ALARM",
}

// Container is a container that is about to be made in a pod with a user namespace.
type Container struct {
	Config *runtime.ContainerConfig
	// ImageUser is the user of the image that the container runs as, "user" or "user:group"; "" for none.
	ImageUser string
	// Mapped are the ids of the pod. Chosen is set if podfsm mapped the pod without its request.
	Mapped Mappings
	Chosen bool
}

// Check refuses a container that can't run in the pod's user namespace. All errors are
// InvalidArgument.
//
// If the pod has asked for a user namespace, only ids outside of it are refused.
func (c Container) Check() error {
	security := c.Config.GetLinux().GetSecurityContext()
	reasons := append(outside(security, c.length()), c.namedOutside()...)
	remedy := fmt.Sprintf(askedRemedy, c.length())
	if c.Chosen {
		if err := c.checkAsked(); err != nil {
			return err
		}
		reasons = append(c.beyondNamespace(), reasons...)
		remedy = "give the pod a runtime handler that leaves it on the node's users"
	}
	if len(reasons) == 0 {
		return nil
	}
	return invalid("it %s; %s", strings.Join(reasons, " and "), remedy)
}

// length returns the number of ids of the pod.
func (c Container) length() uint32 { return c.Mapped.UIDs.Length }

// namedOutside returns the reasons why a numeric user or group in the user string of the container
// or its image is not mapped. Names are not resolved, because that needs the root filesystem, which
// does not exist yet.
func (c Container) namedOutside() (reasons []string) {
	for _, of := range []struct{ user, by string }{
		{c.Config.GetLinux().GetSecurityContext().GetRunAsUsername(), ""},
		{c.ImageUser, " which its image names,"},
	} {
		user, group, _ := strings.Cut(of.user, ":")
		for _, is := range []struct{ kind, id string }{{"user", user}, {"group", group}} {
			if id, err := strconv.Atoi(is.id); err == nil && id >= int(c.length()) { // containerd parses it so
				reasons = append(reasons, fmt.Sprintf("runs as %s %d,%s beyond the %d ids of its user namespace", is.kind, id, of.by, c.length()))
			}
		}
	}
	return reasons
}

// checkAsked refuses id mappings in the container if its pod has asked for none.
func (c Container) checkAsked() error {
	asked := c.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if asked != nil && asked.GetMode() == runtime.NamespaceMode_POD {
		return invalid("it asks for a user namespace that its pod didn't ask for")
	}
	for _, m := range c.Config.GetMounts() {
		if len(m.GetUidMappings()) > 0 || len(m.GetGidMappings()) > 0 {
			return invalid("its mount %q comes with an id mapping that its pod didn't ask for", m.GetContainerPath())
		}
	}
	return nil
}

// beyondNamespace returns the reasons why a container needs the node's users.
func (c Container) beyondNamespace() (reasons []string) {
	security := c.Config.GetLinux().GetSecurityContext()
	if security.GetPrivileged() {
		reasons = append(reasons, "is privileged")
	}
	capabilities := security.GetCapabilities() // containerd drops ambient capabilities
	for _, capability := range capabilities.GetAddCapabilities() {
		same := func(dropped string) bool { return strings.EqualFold(dropped, capability) } // containerd applies ALL first and drops last
		if slices.Contains(nodeCapabilities, strings.ToUpper(capability)) && !slices.ContainsFunc(capabilities.GetDropCapabilities(), same) {
			reasons = append(reasons, "has the capability "+capability+", which only the node's users can use")
		}
	}
	for _, m := range c.Config.GetMounts() {
		if m.GetPropagation() == runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL {
			reasons = append(reasons, fmt.Sprintf("has the mount %q, which is bidirectional", m.GetContainerPath()))
		}
	}
	for _, d := range c.Config.GetDevices() {
		if reason := c.Mapped.unusableDevice(d); reason != "" {
			reasons = append(reasons, reason)
		}
	}
	return reasons
}
