package userns

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unmappable are the reasons why a sandbox can't have a user namespace of length ids, as the rest of "the pod …".
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

// securityContext is that of a sandbox or of a container.
type securityContext interface {
	GetRunAsUser() *runtime.Int64Value
	GetRunAsGroup() *runtime.Int64Value
	GetSupplementalGroups() []int64
}

// outside are the ids of a security context that a user namespace of length ids doesn't map, as reasons. A negative id is none, and
// refused in any case.
func outside(security securityContext, length uint32) (reasons []string) {
	beyond := func(what string, id int64) {
		if id >= int64(length) {
			reasons = append(reasons, fmt.Sprintf("%s %d, beyond the %d ids of its user namespace", what, id, length))
		}
	}
	beyond("runs as user", security.GetRunAsUser().GetValue())
	beyond("runs as group", security.GetRunAsGroup().GetValue())
	for _, group := range security.GetSupplementalGroups() { // the pod's fsGroup is among them
		beyond("has the group", group)
	}
	return reasons
}

// hiddenSysctl says whether the kernel doesn't show a sysctl in a network namespace which belongs to a user namespace.
func hiddenSysctl(file string) bool {
	if file == "net/ipv6/route/max_size" { // shown since Linux 5.15
		return false
	}
	return strings.HasPrefix(file, "net/core/xfrm_") || strings.HasPrefix(file, "net/ipv6/route/")
}

// unmappableSysctls are the sysctls that can't be set in a user namespace of length ids, as reasons. A pod that has not asked to be mapped
// means all groups that it has by a range of groups that goes on beyond them, such as "0 2147483647": it gets the range up to its last one.
func unmappableSysctls(sysctls map[string]string, length uint32, asked bool) (reasons []string) {
	for name, value := range sysctls {
		file := strings.ReplaceAll(name, ".", "/")
		var first, last uint64
		n, _ := fmt.Sscan(value, &first, &last) // what is no range is refused when it is set
		beyond := first >= uint64(length) || asked && last >= uint64(length)
		switch {
		case file == "net/ipv4/ping_group_range" && n == 2 && beyond:
			reasons = append(reasons, fmt.Sprintf("has the sysctl %s = %q, beyond the %d ids of its user namespace", name, value, length))
		case hiddenSysctl(file):
			reasons = append(reasons, fmt.Sprintf("has the sysctl %s, which is the node's users' alone", name))
		}
	}
	slices.Sort(reasons)
	return reasons
}

// CheckPod refuses a sandbox whose ids aren't in the user namespace that it asks for: InvalidArgument.
func CheckPod(config *runtime.PodSandboxConfig, m Mappings) error {
	length := m.UIDs.Length
	reasons := append(outside(config.GetLinux().GetSecurityContext(), length), unmappableSysctls(config.GetLinux().GetSysctls(), length, true)...)
	if len(reasons) == 0 {
		return nil
	}
	return invalid("it %s; "+askedRemedy, strings.Join(reasons, " and "), length)
}

// askedRemedy is what to do about ids in a pod that has asked for a user namespace.
const askedRemedy = "run the pod with hostUsers: true, or choose ids below %d"

// nodeCapabilities are those which the kernel asks of the node's own users only, wherever it asks for them: a container in a user
// namespace has them for nothing. One that is given ALL has all that there are in its user namespace. MKNOD, which every container has
// unless it drops it, is not among them, nor is MAC_ADMIN, which AppArmor takes in a policy namespace.
var nodeCapabilities = []string{
	"AUDIT_CONTROL", "AUDIT_READ", "BLOCK_SUSPEND", "BPF", "LINUX_IMMUTABLE", "MAC_OVERRIDE", "PERFMON", "SYSLOG",
	"SYS_MODULE", "SYS_PACCT", "SYS_RAWIO", "SYS_TIME", "SYS_TTY_CONFIG", "WAKE_ALARM",
}

// Container is one that is about to be made in a pod with a user namespace.
type Container struct {
	Config *runtime.ContainerConfig
	// ImageUser is the user of the image that the container runs as, "user" or "user:group"; "" for none.
	ImageUser string
	// Length is how many ids the pod has, and Chosen says that podfsm has mapped it, though it has asked for no user namespace.
	Length uint32
	Chosen bool
}

// Check refuses a container that can't be in the pod's user namespace. All errors are InvalidArgument.
//
// A container of a pod that has asked for a user namespace is only refused what can't be: ids that are not in it.
func (c Container) Check() error {
	security := c.Config.GetLinux().GetSecurityContext()
	reasons := append(outside(security, c.Length), c.imageOutside()...)
	remedy := fmt.Sprintf(askedRemedy, c.Length)
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

// imageOutside are the ids of the image that the user namespace doesn't map, as reasons. Names are not looked up: that takes the root
// filesystem, which is yet to be made.
func (c Container) imageOutside() (reasons []string) {
	user, group, _ := strings.Cut(c.ImageUser, ":")
	for _, of := range []struct{ kind, id string }{{"user", user}, {"group", group}} {
		if id, err := strconv.ParseUint(of.id, 10, 64); err == nil && id >= uint64(c.Length) {
			reasons = append(reasons, fmt.Sprintf("runs as %s %d, which its image names, beyond the %d ids of its user namespace", of.kind, id, c.Length))
		}
	}
	return reasons
}

// checkAsked refuses mappings in a pod that has asked for none.
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

// beyondNamespace are the reasons why a container needs the node's users.
func (c Container) beyondNamespace() (reasons []string) {
	security := c.Config.GetLinux().GetSecurityContext()
	if security.GetPrivileged() {
		reasons = append(reasons, "is privileged")
	}
	capabilities := security.GetCapabilities() // the ambient ones containerd takes away
	for _, capability := range capabilities.GetAddCapabilities() {
		same := func(dropped string) bool { return strings.EqualFold(dropped, capability) } // containerd drops last, but ALL first
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
		if path := closedDevice(d); path != "" {
			reasons = append(reasons, fmt.Sprintf("has the device %q, which only the node's users may open", path))
		}
	}
	return reasons
}

// mostEntries of a directory of devices are looked at.
const mostEntries = 10000

// notDevices are the directories below one of devices that containerd passes over.
var notDevices = []string{"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"}

// closedDevice is a device of the node that its mode keeps from all but its owner and its group, who are the node's: in a user namespace
// a device can't get another owner. Of a directory it is the first device, unless another one there is open to all. It is "" where there
// is none.
func closedDevice(d *runtime.Device) (closed string) {
	var needed fs.FileMode
	if strings.Contains(d.GetPermissions(), "r") {
		needed |= 0o4
	}
	if strings.Contains(d.GetPermissions(), "w") {
		needed |= 0o2
	}
	root, err := filepath.EvalSymlinks(d.GetHostPath())
	if err != nil {
		return "" // containerd's service says so
	}
	open, left := false, mostEntries
	_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if left--; left < 0 {
			return fs.SkipAll
		}
		switch {
		case err != nil:
			return nil
		case path != root && entry.IsDir() && slices.Contains(notDevices, entry.Name()):
			return fs.SkipDir
		case entry.Type()&os.ModeDevice == 0 || path != root && entry.Name() == "console":
			return nil
		}
		info, err := entry.Info()
		switch {
		case err != nil: // it has just gone
		case info.Mode().Perm()&needed == needed:
			open = true
			return fs.SkipAll
		case closed == "":
			closed = path
		}
		return nil
	})
	if open {
		return ""
	}
	return closed
}
