package host

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// FindPodCgroups returns the cgroup directories of the containers in every hierarchy, each with its
// container's id. A container's directory has its id as name, or is its systemd scope. Directories
// below a cgroup that root doesn't own are left out, because their owner chooses the names.
func FindPodCgroups(ids []string) (found map[string]string, _ error) {
	found = map[string]string{}
	known := func(id string) bool { return slices.Contains(ids, id) }
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for _, mount := range mounts {
		err := filepath.WalkDir(mount.Mountpoint, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case gone(err):
				return nil
			case err != nil:
				return err
			case !entry.IsDir():
				return nil
			}
			if id, ok := containerNamed(filepath.Base(path), known); ok {
				found[path] = id
			}
			var st unix.Stat_t
			if unix.Lstat(path, &st) != nil || st.Uid != 0 {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("failed to search the cgroups: %w", err)
		}
	}
	return found, nil
}

// ContainerOf returns the known container to which a process belongs, by its cgroups from
// [ParseCgroups]. The outermost name in a path counts: the processes of a container may choose the
// names below its cgroup. If hierarchies differ, because root has moved the process, the first
// hierarchy by name counts.
func ContainerOf(cgroups map[string]string, known func(id string) bool) (id string, ok bool) {
	for _, hierarchy := range slices.Sorted(maps.Keys(cgroups)) {
		for name := range strings.SplitSeq(cgroups[hierarchy], "/") {
			if id, ok := containerNamed(name, known); ok {
				return id, true
			}
		}
	}
	return "", false
}

// containerNamed returns the known container whose cgroup has a name. The name is ID, or with
// systemd PREFIX-ID.scope. Without SystemdCgroup, a runtime takes the whole path "slice:prefix:id"
// for the name. An id may have dashes, but no colon.
func containerNamed(name string, known func(id string) bool) (id string, ok bool) {
	if known(name) {
		return name, true
	}
	if parts := strings.Split(name, ":"); len(parts) == 3 && strings.HasSuffix(parts[0], ".slice") {
		return parts[2], known(parts[2])
	}
	id, more := strings.CutSuffix(name, ".scope")
	for more {
		if known(id) {
			return id, true
		}
		_, id, more = strings.Cut(id, "-")
	}
	return "", false
}

// EndCgroupDir kills the processes in a cgroup and below it, and removes the cgroup. It succeeds if
// there is no cgroup.
func EndCgroupDir(ctx context.Context, dir string) error {
	return Group{dir: dir}.end(ctx)
}
