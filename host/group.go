package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Group is one cgroup for processes that podfsm starts together. Its members are the processes that
// were started in it, and all their descendants, however they were forked. Only root can leave it.
type Group struct{ dir, parent string }

// Dir returns the group's directory.
func (g Group) Dir() string { return g.dir }

// Start starts a process in the group, as [Cgroups.Start] does.
func (g Group) Start(start func(cgroupFD int) error) error { return Cgroups{g.dir}.Start(start) }

// Procs returns the pids of the processes in the group and in cgroups below it. It leaves out
// processes that have ended, and this process: v1 lists it for a moment while a thread of it starts
// another process in the group.
//
// Errors: FailedPrecondition for a process of another pid namespace, which v2 lists as 0. v1
// doesn't list such a process: then only Remove fails.
func (g Group) Procs() ([]int, error) {
	pids, err := g.procs()
	if err == nil && slices.Contains(pids, 0) {
		err = foreign(g)
	}
	return pids, err
}

func foreign(g Group) error {
	return fmt.Errorf("cgroup %q has a process of another pid namespace: %w", g.dir, errdefs.ErrFailedPrecondition)
}

// procs returns the group's processes except this one; 0 for each process of another pid namespace.
func (g Group) procs() ([]int, error) {
	pids, err := g.members()
	return without(pids, os.Getpid()), err
}

func without(pids []int, pid int) []int {
	return slices.DeleteFunc(slices.Clone(pids), func(other int) bool { return other == pid })
}

// members returns the group's processes, including this one.
func (g Group) members() ([]int, error) {
	dirs, err := g.tree()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("failed to list the processes of cgroup %q: %w", dir, err)
		}
		for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
			pid, err := strconv.Atoi(lines.Text())
			if err != nil || pid < 0 {
				return nil, fmt.Errorf("cgroup %q lists %q: %w", dir, lines.Text(), errdefs.ErrDataLoss)
			}
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// tree returns the group's directory and all directories below it, parents first.
func (g Group) tree() (dirs []string, err error) {
	err = filepath.WalkDir(g.dir, func(path string, entry fs.DirEntry, err error) error {
		if gone(err) {
			return nil
		}
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("failed to list cgroup %q: %w", g.dir, err)
	}
	return dirs, nil
}

// gone says that a cgroup doesn't exist. ENODEV means that it was removed after its file was
// opened. ENOTDIR and ENAMETOOLONG mean that no cgroup can have the name.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENAMETOOLONG)
}

// pollIntervals yields the waits between two polls of a cgroup: 1 ms, doubled up to 50 ms.
func pollIntervals(yield func(time.Duration) bool) {
	for pause := time.Millisecond; yield(pause); pause = min(2*pause, 50*time.Millisecond) {
	}
}

// Wait returns once no process is left in the group.
//
// Errors: the cause of ctx's end, with the remaining processes.
func (g Group) Wait(ctx context.Context) error {
	return g.untilEmpty(ctx, func([]int, bool) error { return nil })
}

// Kill kills the processes of the group, except this one, and returns once none is left. It uses
// cgroup.kill (Linux 5.14), which no fork escapes. Otherwise it kills one process after the other
// by pidfd until none is left. The group can be used again.
//
// Errors: the cause of ctx's end, with the remaining processes; FailedPrecondition for a process of
// another pid namespace that only cgroup.kill could kill.
func (g Group) Kill(ctx context.Context) error {
	spent, err := g.killAll(ctx)
	if err != nil || !spent {
		return err
	}
	// Linux counts the uses of cgroup.kill. A process that is born in a cgroup with another count
	// than its parent's cgroup is killed (seen on 6.18). So the group is made again.
	if err := g.Remove(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(g.dir, 0o755); err != nil && !gone(err) {
		return fmt.Errorf("failed to make a cgroup: %w", err)
	}
	return nil
}

// end kills the group's processes and removes the group.
func (g Group) end(ctx context.Context) error {
	if _, err := g.killAll(ctx); err != nil {
		return err
	}
	return g.Remove(ctx)
}

// killAll kills until no process is left. spent says that it used cgroup.kill, so that the group
// can't be used again.
func (g Group) killAll(ctx context.Context) (spent bool, err error) {
	err = g.untilEmpty(ctx, func(pids []int, among bool) error {
		if !among { // cgroup.kill would kill this process, too
			err := writeFile(filepath.Join(g.dir, "cgroup.kill"), "1")
			spent = spent || err == nil
			if !gone(err) {
				return err
			}
		}
		return g.kill(pids)
	})
	return spent, err
}

// untilEmpty calls do with the processes of the group until none is left. among says that this
// process is in the group, too.
func (g Group) untilEmpty(ctx context.Context, do func(pids []int, among bool) error) error {
	for pause := range pollIntervals {
		members, err := g.members()
		pids := without(members, os.Getpid())
		if err != nil || len(pids) == 0 {
			return err
		}
		if err := do(pids, len(members) > len(pids)); err != nil {
			return fmt.Errorf("failed to end the processes of cgroup %q: %w", g.dir, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("processes %d of cgroup %q don't end: %w", pids, g.dir, context.Cause(ctx))
		}
	}
	return nil
}

// kill kills processes of the group one by one.
func (g Group) kill(pids []int) error {
	for _, pid := range pids {
		if pid == 0 {
			return foreign(g)
		}
		if err := g.killOne(pid); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// killOne kills a process of the group. It checks that the process is in the group once its pidfd
// is open.
func (g Group) killOne(pid int) error {
	process, err := Open(pid)
	if err != nil {
		return err
	}
	defer process.Close()
	if pids, err := g.procs(); err != nil || !slices.Contains(pids, pid) {
		return err
	}
	return process.Kill()
}

// writeFile writes to an existing file.
func writeFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// Remove removes the group and all cgroups below it. It waits while the kernel keeps a cgroup, for
// a moment after the end of its last process. It removes the directory of the groups with the last
// group.
//
// Errors: FailedPrecondition with the processes that are in the group; the cause of ctx's end.
func (g Group) Remove(ctx context.Context) error {
	for pause := range pollIntervals {
		busy, err := g.remove()
		if err == nil {
			_ = unix.Rmdir(g.parent) // fails while there are other groups
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		pids, listErr := g.procs()
		if listErr != nil {
			return listErr
		}
		if len(pids) > 0 {
			return fmt.Errorf("cgroup %q has processes %d: %w", busy, pids, errdefs.ErrFailedPrecondition)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
	return nil
}

// remove removes the group's directories, innermost first. busy is the directory that it could not
// remove.
func (g Group) remove() (busy string, err error) {
	dirs, err := g.tree()
	if err != nil {
		return "", err
	}
	for _, dir := range slices.Backward(dirs) {
		if err := unix.Rmdir(dir); err != nil && !gone(err) {
			return dir, fmt.Errorf("failed to remove cgroup %q: %w", dir, err)
		}
	}
	return "", nil
}

// Mark sets a mark on the group, an extended attribute. Only root can set and see it: trusted
// attributes, see xattr(7), on cgroups since Linux 3.7.
func (g Group) Mark(name string) error {
	if err := unix.Setxattr(g.dir, markPrefix+name, []byte{'1'}, 0); err != nil {
		return fmt.Errorf("failed to mark cgroup %q as %s: %w", g.dir, name, err)
	}
	return nil
}

// Marked says whether the group has a mark; false for a group that doesn't exist.
func (g Group) Marked(name string) (bool, error) {
	_, err := unix.Getxattr(g.dir, markPrefix+name, nil)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("failed to read the mark %s of cgroup %q: %w", name, g.dir, err)
	}
	return true, nil
}

const markPrefix = "trusted.podfsm."
