package kubelet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Leftovers returns the directories and cgroups of pods. The kubelet removes them some time after
// the end of a pod.
func (k *Kubelet) Leftovers() ([]string, error) {
	left, err := filepath.Glob(k.path("root/pods/*"))
	if err != nil {
		return nil, err
	}
	for _, class := range qosClasses {
		pods, err := k.cgroups(append(class, "pod*")...)
		if err != nil {
			return nil, err
		}
		left = append(left, pods...)
	}
	return left, nil
}

// qosClasses are the cgroups above those of pods, parents last. The kubelet makes them and never
// removes them.
var qosClasses = [][]string{{"kubepods", "besteffort"}, {"kubepods", "burstable"}, {"kubepods"}}

// cgroups returns the cgroups that match a pattern below the node's, in every
// hierarchy.
func (k *Kubelet) cgroups(below ...string) ([]string, error) {
	hierarchies, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, h := range hierarchies {
		found, err := filepath.Glob(filepath.Join(h.Mountpoint, k.node.Cgroup(below...)))
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, found...)
	}
	return dirs, nil
}

// removeQoSCgroups fails while a pod has a cgroup.
func (k *Kubelet) removeQoSCgroups() error {
	for _, class := range qosClasses {
		dirs, err := k.cgroups(class...)
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("failed to remove cgroup %q: %w", dir, err)
			}
		}
	}
	return nil
}
