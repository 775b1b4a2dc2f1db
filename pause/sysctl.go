package pause

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
)

// ipcSysctls are those of an IPC namespace, ipc_namespaces(7).
var ipcSysctls = []string{"msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"}

// refusals are the errors of the kernel for a sysctl that it doesn't know, or a value that it doesn't take. Some sysctls of the node's can
// be read in any network namespace; nobody may write them there.
var refusals = []error{unix.ENOENT, unix.ENOTDIR, unix.EISDIR, unix.EACCES, unix.EPERM, unix.EINVAL}

// SetSysctls sets the sysctls of a specification in the namespaces of pause, in the order of their names. It comes after CNI, so that
// those of an interface work, and win against what a plugin has set. [Processes.Start] has set those of the IPC namespace: they are to
// be written by the root of the user namespace that owns it.
//
// Errors: InvalidArgument for a sysctl that is not of a namespace which the pod has for itself, or that the kernel doesn't know or
// refuses the value of.
func SetSysctls(process *host.Process, spec *specs.Spec) error {
	all, err := sysctlsOf(spec)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(s sysctl) bool { return s.kind == unix.CLONE_NEWIPC })
	if len(all) == 0 {
		return nil
	}
	for i, s := range all {
		if s.file != pingGroupRange {
			continue
		}
		if all[i].value, err = hostGroups(s.value, spec.Linux.GIDMappings); err != nil {
			return fmt.Errorf("failed to set the sysctl %s = %q: %w", s.name, s.value, err)
		}
	}
	kinds := ownNamespaces(spec.Linux.Namespaces) &^ unix.CLONE_NEWIPC
	return process.In(kinds, func() error {
		root, err := os.OpenRoot("/proc/sys") // follows no link out of it; what it shows are the namespaces of this thread
		if err != nil {
			return err
		}
		defer root.Close()
		for _, s := range all {
			if err := s.set(root); err != nil {
				return fmt.Errorf("failed to set the sysctl %s = %q: %w", s.name, s.value, err)
			}
		}
		return nil
	})
}

// pingGroupRange is the sysctl of the groups that may open ICMP sockets without privileges.
const pingGroupRange = "net/ipv4/ping_group_range"

// lastPingGroup is the last group that the kernel takes in pingGroupRange.
const lastPingGroup = math.MaxInt32

// hostGroups is a range of a pod's groups, "first last", as this process has to write it: the kernel takes the groups of the writer's user
// namespace, and shows them as those of the reader's. A range that goes on beyond the mapped groups ends with the last of them.
//
// A mapped pod's value that isn't two groups is InvalidArgument: the kernel would take "0 5 x", and the one that "0" leaves out, for the
// node's.
func hostGroups(value string, gids []specs.LinuxIDMapping) (string, error) {
	if len(gids) == 0 {
		return value, nil
	}
	var first, last uint32
	if n, _ := fmt.Sscan(value, &first, &last); n != 2 || len(strings.Fields(value)) != 2 || last > lastPingGroup {
		return "", fmt.Errorf("it is no range of groups, \"first last\": %w", errdefs.ErrInvalidArgument)
	}
	if first > last { // such as "1 0", which is nobody
		return value, nil
	}
	for _, m := range gids {
		if first >= m.ContainerID && first-m.ContainerID < m.Size {
			last = m.ContainerID + min(last-m.ContainerID, m.Size-1)
			return fmt.Sprint(first-m.ContainerID+m.HostID, " ", last-m.ContainerID+m.HostID), nil
		}
	}
	return "", fmt.Errorf("the pod's user namespace has no group %d: %w", first, errdefs.ErrInvalidArgument)
}

// CheckSysctls refuses sysctls of a pod that are not of a namespace which it has for itself, before anything is made: InvalidArgument.
func CheckSysctls(config *runtime.PodSandboxConfig) error {
	kinds := unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	options := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if options.GetNetwork() == runtime.NamespaceMode_NODE {
		kinds &^= unix.CLONE_NEWNET | unix.CLONE_NEWUTS
	}
	if options.GetIpc() == runtime.NamespaceMode_NODE {
		kinds &^= unix.CLONE_NEWIPC
	}
	_, err := parseSysctls(config.GetLinux().GetSysctls(), kinds)
	return err
}

// DisablesIPv6 says whether a pod has sysctls that take the IPv6 addresses of network interfaces away.
func DisablesIPv6(config *runtime.PodSandboxConfig) bool {
	for name, value := range config.GetLinux().GetSysctls() {
		file, _, err := sysctlFile(name, unix.CLONE_NEWNET)
		if err == nil && strings.HasPrefix(file, "net/ipv6/conf/") && strings.HasSuffix(file, "/disable_ipv6") && strings.TrimSpace(value) != "0" {
			return true
		}
	}
	return false
}

// sysctl is one of a pod's.
type sysctl struct {
	name, file, value string
	kind              int // the CLONE_NEW* flag of its namespace
}

// sysctlsOf are the sysctls of a specification, in the order of their names.
func sysctlsOf(spec *specs.Spec) ([]sysctl, error) {
	return parseSysctls(spec.Linux.Sysctl, ownNamespaces(spec.Linux.Namespaces))
}

// parseSysctls are sysctls of a pod that has the namespaces of kinds for itself. Of several that can't be set the same one is refused
// each time.
func parseSysctls(values map[string]string, kinds int) (all []sysctl, err error) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		s := sysctl{name: name, value: values[name]}
		if s.file, s.kind, err = sysctlFile(name, kinds); err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

// ipcSysctlsOf are those of the IPC namespace, by their files.
func ipcSysctlsOf(spec *specs.Spec) (map[string]string, error) {
	all, err := sysctlsOf(spec)
	files := map[string]string{}
	for _, s := range all {
		if s.kind == unix.CLONE_NEWIPC {
			files[s.file] = s.value
		}
	}
	return files, err
}

func (s sysctl) set(root *os.Root) error {
	f, err := root.OpenFile(s.file, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(s.value)
		err = errors.Join(err, f.Close())
	}
	if slices.ContainsFunc(refusals, func(refusal error) bool { return errors.Is(err, refusal) }) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// ownNamespaces are the flags of those namespaces with sysctls that are not the node's.
func ownNamespaces(namespaces []specs.LinuxNamespace) (kinds int) {
	of := map[specs.LinuxNamespaceType]int{
		specs.NetworkNamespace: unix.CLONE_NEWNET, specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS,
	}
	for _, namespace := range namespaces {
		kinds |= of[namespace.Type]
	}
	return kinds
}

// sysctlFile is the file of a sysctl below /proc/sys, in the two notations of sysctl(8): with dots, where a slash stands for a dot of an
// interface's name, or with slashes, and the namespace that it is of.
func sysctlFile(name string, kinds int) (file string, kind int, err error) {
	file = name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		file = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	kind, ok := sysctlNamespace(file)
	switch {
	case !ok || !filepath.IsLocal(file) || filepath.Clean(file) != file:
		return "", 0, fmt.Errorf("sysctl %q is not of a namespace that a pod may have for itself: %w", name, errdefs.ErrInvalidArgument)
	case kinds&kind == 0:
		return "", 0, fmt.Errorf("sysctl %q would change the node's, the pod shares that namespace with it: %w", name, errdefs.ErrInvalidArgument)
	default:
		return file, kind, nil
	}
}

// sysctlNamespace is the namespace that a sysctl is of.
func sysctlNamespace(file string) (kind int, ok bool) {
	name, kernel := strings.CutPrefix(file, "kernel/")
	switch {
	case strings.HasPrefix(file, "net/"):
		return unix.CLONE_NEWNET, true
	case strings.HasPrefix(file, "fs/mqueue/"), kernel && slices.Contains(ipcSysctls, name):
		return unix.CLONE_NEWIPC, true
	case kernel && name == "domainname":
		return unix.CLONE_NEWUTS, true
	default:
		return 0, false
	}
}
