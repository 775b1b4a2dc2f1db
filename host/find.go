package host

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// FindPodCgroups returns the directories of cgroups, in every hierarchy, that have the name of one of the containers: a directory of
// that name, or systemd's scope of it. Cgroups below one that belongs to somebody else than root are left out, because their owner
// chooses the names.
func FindPodCgroups(ids []string) (found []string, _ error) {
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
			if slices.Contains(ids, CgroupID(path)) {
				found = append(found, path)
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
	slices.Sort(found)
	return slices.Compact(found), nil
}

// CgroupID is the id of the container that a cgroup has its name from. A runtime that was told "slice:prefix:name", but not to have systemd
// make cgroups, takes all of it for the name. No id has a colon.
func CgroupID(dir string) string {
	name := filepath.Base(dir)
	if slice, _, ok := strings.Cut(name, ":"); ok && strings.HasSuffix(slice, ".slice") {
		return name[strings.LastIndexByte(name, ':')+1:]
	}
	if scope, ok := strings.CutSuffix(name, ".scope"); ok {
		return scope[strings.LastIndexByte(scope, '-')+1:]
	}
	return name
}

// EndCgroupDir kills what runs in a cgroup and below it, and removes the directory. It succeeds where there is none.
func EndCgroupDir(ctx context.Context, dir string) error {
	return Group{dir: dir}.end(ctx)
}
