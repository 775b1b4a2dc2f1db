package pause

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cgroupRetry is how often a cgroup is tried to be removed whose processes have
// been killed and are on their way out.
const cgroupRetry = 10 * time.Millisecond

// RemoveCgroup kills what still runs in a pause container's cgroup and removes
// it from every hierarchy: a runtime that was interrupted leaves it behind, and
// forgets it. It succeeds when there is none.
//
// cgroupsPath is as in the OCI specification. A cgroup of the systemd driver
// ("slice:prefix:name") is left alone: systemd removes the empty scope.
func RemoveCgroup(ctx context.Context, cgroupsPath string) error {
	if !filepath.IsAbs(cgroupsPath) || filepath.Clean(cgroupsPath) == "/" {
		return nil
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return fmt.Errorf("failed to find the cgroup hierarchies: %w", err)
	}
	for _, mount := range mounts {
		if err := removeCgroup(ctx, filepath.Join(mount.Mountpoint, cgroupsPath)); err != nil {
			return fmt.Errorf("failed to remove cgroup %q: %w", cgroupsPath, err)
		}
	}
	return nil
}

// Cgroups returns the directories of cgroups, in every hierarchy, that have the
// name of one of the containers. Those of the systemd driver have other names:
// systemd removes them.
func Cgroups(ids []string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("failed to find the cgroup hierarchies: %w", err)
	}
	var found []string
	for _, mount := range mounts {
		err := filepath.WalkDir(mount.Mountpoint, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() {
				return ignoreGone(err)
			}
			if slices.Contains(ids, entry.Name()) {
				found = append(found, path)
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

// ignoreGone takes a cgroup that has been removed meanwhile (ENODEV is of one
// that was open) for none.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// RemoveCgroupDir is RemoveCgroup for a directory from Cgroups.
func RemoveCgroupDir(ctx context.Context, dir string) error {
	if err := removeCgroup(ctx, dir); err != nil {
		return fmt.Errorf("failed to remove cgroup %q: %w", dir, err)
	}
	return nil
}

// removeCgroup removes a cgroup's directory: the kernel does so once nothing
// runs in it (cgroups(7)).
func removeCgroup(ctx context.Context, dir string) error {
	for {
		err := os.Remove(dir)
		// A pod names its parent: below a file, or under a name that is too long, there can't be a cgroup.
		if err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENAMETOOLONG) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if err := killAll(dir); err != nil {
			return err
		}
		retry := time.NewTimer(cgroupRetry)
		select {
		case <-retry.C:
		case <-ctx.Done():
			retry.Stop()
			return context.Cause(ctx)
		}
	}
}

// killAll kills the processes of a cgroup.
func killAll(dir string) error {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return err
	}
	for field := range strings.FieldsSeq(string(procs)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}
