package pause

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// ipcSysctls are those of an IPC namespace, ipc_namespaces(7).
var ipcSysctls = []string{"msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"}

// SetSysctls sets the sysctls of a specification in the namespaces of pause, in the order of their names. It comes after CNI, so that
// those of an interface work, and win against what a plugin has set.
//
// Errors: InvalidArgument for a sysctl that is not of a namespace which the pod has for itself, or that the kernel doesn't know or
// refuses the value of.
func SetSysctls(process *host.Process, spec *specs.Spec) error {
	if len(spec.Linux.Sysctl) == 0 {
		return nil
	}
	kinds := ownNamespaces(spec.Linux.Namespaces)
	files := map[string]string{}
	for name := range spec.Linux.Sysctl {
		file, err := sysctlFile(name, kinds)
		if err != nil {
			return err
		}
		files[name] = file
	}
	return process.In(kinds, func() error {
		root, err := os.OpenRoot("/proc/sys") // follows no link out of it; what it shows are the namespaces of this thread
		if err != nil {
			return err
		}
		defer root.Close()
		for _, name := range slices.Sorted(maps.Keys(files)) {
			if err := writeSysctl(root, files[name], spec.Linux.Sysctl[name]); err != nil {
				return fmt.Errorf("failed to set the sysctl %s = %q: %w", name, spec.Linux.Sysctl[name], err)
			}
		}
		return nil
	})
}

func writeSysctl(root *os.Root, file, value string) error {
	f, err := root.OpenFile(file, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	// Some sysctls of the node's can be read in any network namespace. Root may not write them there.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EINVAL) {
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
// interface's name, or with slashes.
func sysctlFile(name string, kinds int) (string, error) {
	file := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		file = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	needs, ok := sysctlNamespace(file)
	switch {
	case !ok || !filepath.IsLocal(file) || filepath.Clean(file) != file:
		return "", fmt.Errorf("sysctl %q is not of a namespace that a pod may have for itself: %w", name, errdefs.ErrInvalidArgument)
	case kinds&needs == 0:
		return "", fmt.Errorf("sysctl %q would change the node's, the pod shares that namespace with it: %w", name, errdefs.ErrInvalidArgument)
	default:
		return file, nil
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
