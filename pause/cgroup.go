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
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cgroupRetry is how often a cgroup is tried to be removed whose processes have
// been killed and are on their way out.
const cgroupRetry = 10 * time.Millisecond

// hierarchies are where cgroup hierarchies are mounted. They stay where a node has mounted them when it came up, and to read all its mounts
// again takes the longer the more pods there are.
func hierarchies() ([]*mountinfo.Info, error) {
	if known := knownHierarchies.Load(); known != nil {
		return *known, nil
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("failed to find the cgroup hierarchies: %w", err)
	}
	if len(mounts) > 0 {
		knownHierarchies.Store(&mounts)
	}
	return mounts, nil
}

var knownHierarchies atomic.Pointer[[]*mountinfo.Info]

// Processes returns the pids of the processes in a pause container's cgroup; none
// before the runtime has made it. With cgroup v1 the hierarchy of devices is
// asked, which no runtime goes without.
//
// cgroupsPath is as in the OCI specification. A relative one is below the
// runtime's own cgroup, which is not known: NotFound.
func Processes(cgroupsPath string) ([]int, error) {
	dir, err := cgroupDir(cgroupsPath)
	if err != nil {
		return nil, err
	}
	main, err := mainHierarchy()
	if err != nil {
		return nil, err
	}
	pids, err := processesIn(filepath.Join(main.Mountpoint, dir))
	if ignoreGone(err) != nil {
		return nil, fmt.Errorf("failed to look for the processes of cgroup %q: %w", cgroupsPath, err)
	}
	return pids, nil
}

// mainHierarchy is the one where every container has a cgroup.
func mainHierarchy() (*mountinfo.Info, error) {
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return slices.Contains(strings.Split(m.VFSOptions, ","), "devices") })
	if i < 0 {
		i = slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return m.FSType == "cgroup2" })
	}
	if i < 0 {
		return nil, fmt.Errorf("no cgroup hierarchy is mounted: %w", errdefs.ErrNotFound)
	}
	return mounts[i], nil
}

// expectMove has the kernel get ready for the move of a process to another
// cgroup, which the runtime makes some 20 ms after its shim is asked for. A move
// takes a lock that all forks take, too (cgroup_threadgroup_rwsem), and the first
// who takes it for writing waits until all CPUs have noticed, a grace period of
// RCU of 5 to 20 ms; who comes within the next one doesn't (rcu_sync in
// kernel/rcu/sync.c). So this process moves to the cgroup that it is in, which
// changes nothing, while the shim starts. With the mount option favordynmods
// there is nothing to wait for.
func expectMove() error {
	main, err := mainHierarchy()
	if err != nil {
		return err
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("failed to read the own cgroup: %w", err)
	}
	own, ok := ownCgroup(main, string(groups))
	if !ok {
		return nil
	}
	err = os.WriteFile(filepath.Join(own, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	if err != nil {
		return fmt.Errorf("failed to move to the own cgroup: %w", err)
	}
	return nil
}

// ownCgroup is the directory of the cgroup that /proc/self/cgroup names, where
// that is sure: another part of the hierarchy may be mounted (cgroup_namespaces(7)).
func ownCgroup(mount *mountinfo.Info, groups string) (string, bool) {
	if mount.Root != "/" {
		return "", false
	}
	for line := range strings.Lines(groups) {
		// hierarchy-id:controllers:path (cgroups(7)), without controllers with cgroup v2.
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) == 3 && !strings.Contains(fields[2], "..") &&
			(mount.FSType == "cgroup2" && fields[1] == "" || mount.FSType == "cgroup" && slices.Contains(strings.Split(fields[1], ","), "devices")) {
			return filepath.Join(mount.Mountpoint, fields[2]), true
		}
	}
	return "", false
}

// cgroupDir is where a cgroup is below the root of its hierarchy.
func cgroupDir(cgroupsPath string) (string, error) {
	if filepath.IsAbs(cgroupsPath) {
		return cgroupsPath, nil
	}
	slice, rest, ok := strings.Cut(cgroupsPath, ":")
	if !ok {
		return "", fmt.Errorf("cgroup %q is below one that is not known: %w", cgroupsPath, errdefs.ErrNotFound)
	}
	// The systemd driver's. A slice is in those that its name is made of, "a-b.slice" in "a.slice" (systemd.slice(5)).
	prefix, name, _ := strings.Cut(rest, ":")
	var dir string
	for i, r := range slice + "-" {
		if r == '-' {
			dir = filepath.Join(dir, strings.TrimSuffix(slice[:i], ".slice")+".slice")
		}
	}
	return filepath.Join(dir, prefix+"-"+name+".scope"), nil
}

// processesIn reads the pids in a cgroup.
func processesIn(dir string) ([]int, error) {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for field := range strings.FieldsSeq(string(procs)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

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
	mounts, err := hierarchies()
	if err != nil {
		return err
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
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
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
	pids, err := processesIn(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}
