package kubelet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Leftovers returns the directories and cgroups of pods. The kubelet removes a
// pod's a little after its end.
func (k *Kubelet) Leftovers() ([]string, error) {
	left, err := filepath.Glob(k.path("root/pods/*"))
	if err != nil {
		return nil, err
	}
	qos, err := k.qosCgroups()
	if err != nil {
		return nil, err
	}
	for _, dir := range qos {
		pods, err := filepath.Glob(filepath.Join(dir, "pod*"))
		if err != nil {
			return nil, err
		}
		left = append(left, pods...)
	}
	return left, nil
}

// qosCgroups returns the cgroups that hold those of pods, in every hierarchy,
// parents last. The kubelet makes them and never removes them.
func (k *Kubelet) qosCgroups() ([]string, error) {
	hierarchies, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, h := range hierarchies {
		top := filepath.Join(h.Mountpoint, filepath.Base(k.node.Dir()), "kubepods")
		dirs = append(dirs, filepath.Join(top, "besteffort"), filepath.Join(top, "burstable"), top)
	}
	return dirs, nil
}

// removeQoSCgroups fails while a pod has a cgroup.
func (k *Kubelet) removeQoSCgroups() error {
	dirs, err := k.qosCgroups()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("failed to remove cgroup %q: %w", dir, err)
		}
	}
	return nil
}
