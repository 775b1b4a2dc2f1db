package host

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
)

// CgroupPaths returns a process's cgroup paths below the mounts of the hierarchies. The keys are
// the hierarchies: a controller of v1, "name=NAME", or "" for v2. In a container, these paths
// differ from those in /proc/PID/cgroup, which begin at the host's root. Hierarchies are left out
// if no mount shows the process's cgroup.
//
// Errors: those of [Read]; others if the mounts can't be listed.
func CgroupPaths(ctx context.Context, pid int) (map[string]string, error) {
	data, err := Read(ctx, pid, "cgroup")
	if err != nil {
		return nil, err
	}
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
	}
	return belowMounts(ParseCgroups(data), mounts), nil
}

// CgroupPathsBelow is [CgroupPaths] from the content of the process's /proc/PID/cgroup and of this
// process's /proc/self/mountinfo.
func CgroupPathsBelow(mountInfo io.Reader, cgroup []byte) (map[string]string, error) {
	mounts, err := mountinfo.GetMountsFromReader(mountInfo, cgroupMounts)
	if err != nil {
		return nil, fmt.Errorf("failed to find the cgroup hierarchies: %w", err)
	}
	return belowMounts(ParseCgroups(cgroup), mounts), nil
}

// cgroupMounts selects the mounts of cgroup hierarchies.
var cgroupMounts = mountinfo.FSTypeFilter("cgroup2", "cgroup")

func belowMounts(paths map[string]string, mounts []*mountinfo.Info) map[string]string {
	found := map[string]string{}
	for hierarchy, path := range paths {
		for _, m := range mounts {
			if below, ok := belowMount(m, path); ok && isOf(m, hierarchy) {
				found[hierarchy] = filepath.Join("/", below)
				break
			}
		}
	}
	return found
}

// ParseCgroups parses a /proc/PID/cgroup (cgroups(7)), whose lines are ID:CONTROLLERS:PATH, for v2
// without controllers. It returns the paths by controller.
func ParseCgroups(data []byte) map[string]string {
	paths := map[string]string{}
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) < 3 {
			continue
		}
		for controller := range strings.SplitSeq(fields[1], ",") {
			paths[controller] = fields[2]
		}
	}
	return paths
}

// hierarchies returns the mounts of cgroup hierarchies, in mount order. It reads them once: the
// list of mounts is long on a node with many pods, and the mounts of cgroups don't change.
var hierarchies = onceFound(func() ([]*mountinfo.Info, error) {
	mounts, err := mountinfo.GetMounts(cgroupMounts)
	if err != nil {
		return nil, fmt.Errorf("failed to find the cgroup hierarchies: %w", err)
	}
	return mounts, nil
})

// onceFound returns a function that calls read until it finds mounts, and then always returns
// these.
func onceFound(read func() ([]*mountinfo.Info, error)) func() ([]*mountinfo.Info, error) {
	var mu sync.Mutex
	var found []*mountinfo.Info
	return func() (_ []*mountinfo.Info, err error) {
		mu.Lock()
		defer mu.Unlock()
		if len(found) == 0 {
			found, err = read()
		}
		return found, err
	}
}

// isOf says whether a mount shows a hierarchy.
func isOf(m *mountinfo.Info, hierarchy string) bool {
	if hierarchy == "" || m.FSType == "cgroup2" {
		return hierarchy == "" && m.FSType == "cgroup2"
	}
	return slices.Contains(strings.Split(m.VFSOptions, ","), hierarchy)
}

// belowMount returns the path of a cgroup below a mount. path is from /proc/PID/cgroup. The mount's
// root is not "/" if the mount shows only a part of the hierarchy, as in a container. Root and path
// begin at the root of this process's cgroup namespace, and lead out of it by "/..". They are
// compared as text, because the names between "/.." and "/" are unknown.
func belowMount(m *mountinfo.Info, path string) (below string, ok bool) {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(m.Root, "/"))
	if !ok || rest != "" && rest[0] != '/' {
		return "", false
	}
	below = filepath.Join(".", rest)
	return below, filepath.IsLocal(below)
}

// v1Preference are the v1 hierarchies for the groups if there is no v2, in order of preference. A
// new cgroup of these changes nothing for its members.
var v1Preference = []string{"name=systemd", "freezer", "pids"}

// ownCgroup returns the directory of this process's cgroup, below which podfsm makes its groups.
// paths are from [ParseCgroups]. If the process is in a cgroup namespace and the mounts are from
// outside, its place in them is unknown. Then ownCgroup returns the top directory of a mount.
func ownCgroup(paths map[string]string, mounts []*mountinfo.Info) (dir string, ok bool) {
	mounts = slices.DeleteFunc(slices.Clone(mounts), func(m *mountinfo.Info) bool {
		return slices.Contains(strings.Split(m.Options, ","), "ro")
	})
	places := []func(m *mountinfo.Info, path string) (string, bool){
		belowMount,
		func(m *mountinfo.Info, path string) (string, bool) {
			return ".", strings.HasPrefix(m.Root, "/..") && !strings.HasPrefix(path, "/..")
		},
	}
	for _, place := range places {
		for _, hierarchy := range append([]string{""}, v1Preference...) {
			path, known := paths[hierarchy]
			if !known {
				continue
			}
			for _, m := range mounts {
				if below, ok := place(m, path); ok && isOf(m, hierarchy) {
					return filepath.Join(m.Mountpoint, below), true
				}
			}
		}
	}
	return "", false
}
