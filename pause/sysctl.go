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

// refusals are the kernel's errors for an unknown sysctl or an invalid value. Some of the node's sysctls are readable
// in every network namespace, but not writable.
var refusals = []error{unix.ENOENT, unix.ENOTDIR, unix.EISDIR, unix.EACCES, unix.EPERM, unix.EINVAL}

// SetSysctls sets the sysctls of a specification in pause's namespaces, in the order of their names. It runs after
// CNI, so that sysctls of an interface work and override those that a plugin set. [Processes.Start] has set the
// sysctls of the IPC namespace, which only the root of the owning user namespace can write.
//
// Errors: InvalidArgument for a sysctl that isn't of one of the pod's own namespaces, an unknown sysctl, or a value that
// the kernel refuses.
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
		root, err := os.OpenRoot("/proc/sys") // shows this thread's namespaces; follows no link out of it
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

// hostGroups translates a range of a pod's groups, "first last", for this process to write: the kernel reads the
// groups as those of the writer's user namespace. A range beyond the mapped groups ends with the last mapped group.
//
// For a pod with a user namespace, a value that isn't two groups is InvalidArgument. The kernel would accept "0 5 x",
// and would read the missing group of "0" as the node's.
func hostGroups(value string, gids []specs.LinuxIDMapping) (string, error) {
	if len(gids) == 0 {
		return value, nil
	}
	var first, last uint32
	if n, _ := fmt.Sscan(value, &first, &last); n != 2 || len(strings.Fields(value)) != 2 || last > lastPingGroup {
		return "", fmt.Errorf("the value is not a range of groups, \"first last\": %w", errdefs.ErrInvalidArgument)
	}
	if first > last { // such as "1 0", no group at all
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

// CheckSysctls refuses a pod with a sysctl that isn't of one of its own namespaces, before anything is made:
// InvalidArgument.
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

// sysctl is a sysctl of a pod.
type sysctl struct {
	name, file, value string
	kind              int // the CLONE_NEW* flag of its namespace
}

// sysctlsOf returns the sysctls of a specification, in the order of their names.
func sysctlsOf(spec *specs.Spec) ([]sysctl, error) {
	return parseSysctls(spec.Linux.Sysctl, ownNamespaces(spec.Linux.Namespaces))
}

// parseSysctls returns the sysctls of a pod with own namespaces of the given kinds, in the order of their names. So of
// several invalid ones, the same one is refused each time.
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

// ipcSysctlsOf returns the sysctls of the IPC namespace, by file.
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

// ownNamespaces returns the flags of the pod's own namespaces that have sysctls.
func ownNamespaces(namespaces []specs.LinuxNamespace) (kinds int) {
	of := map[specs.LinuxNamespaceType]int{
		specs.NetworkNamespace: unix.CLONE_NEWNET, specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS,
	}
	for _, namespace := range namespaces {
		kinds |= of[namespace.Type]
	}
	return kinds
}

// sysctlFile returns the file of a sysctl below /proc/sys, and the sysctl's namespace. It reads both notations of
// sysctl(8): with dots, where a slash stands for a dot in an interface's name, and with slashes.
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

// sysctlNamespace returns the namespace of a sysctl.
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
