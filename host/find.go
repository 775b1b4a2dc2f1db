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

// FindPodCgroups returns the directories of cgroups, in every hierarchy, that have the name of one of the containers, and of which one: a
// directory of that name, or systemd's scope of it. Cgroups below one that belongs to somebody else than root are left out, because their
// owner chooses the names.
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
			return nil, fmt.Errorf("failed to look for cgroups: %w", err)
		}
	}
	return found, nil
}

// ContainerOf returns which one of the known containers a process is of, by its cgroups as [ParseCgroups] has them. The outermost name in a
// path counts: what is below the cgroup of a container, its processes may have named. Where hierarchies differ, because root has moved the
// process, the first one by its name counts.
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

// containerNamed returns which one of the known containers a cgroup has its name from. Runtimes call it ID, and have systemd call it
// PREFIX-ID.scope. A runtime that was told "slice:prefix:id", but not to have systemd make cgroups, takes all of it for the name. An id may
// have dashes, and none has a colon.
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

// EndCgroupDir kills what runs in a cgroup and below it, and removes the directory. It succeeds where there is none.
func EndCgroupDir(ctx context.Context, dir string) error {
	return Group{dir: dir}.end(ctx)
}
