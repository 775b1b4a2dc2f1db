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
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Groups are the cgroups that one podfsm makes for what it starts, below one directory of their own. They have no controllers: they
// limit nothing and tell only who is in there, so the daemon may stay in the cgroup above them ("no internal processes" of v2 is about
// controllers that a cgroup gives to its children, cgroups(7)).
type Groups struct{ dir string }

// GroupsBelow returns the groups in a directory, which the first that is made makes, of the cgroup of this process: in the v2
// hierarchy where there is one, also beside v1, and else in one of v1. systemd leaves them alone in a service with Delegate=yes.
//
// Errors: FailedPrecondition when no hierarchy is mounted that can be written to.
func GroupsBelow(name string) (Groups, error) {
	if err := checkName(name); err != nil {
		return Groups{}, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return Groups{}, fmt.Errorf("failed to read the cgroup of this process: %w", err)
	}
	mounts, err := hierarchies()
	if err != nil {
		return Groups{}, err
	}
	dir, ok := ownCgroup(ParseCgroups(own), mounts)
	if !ok {
		return Groups{}, fmt.Errorf("no cgroup of this process is below a mount that it can write to: mount cgroup2 on /sys/fs/cgroup: %w", errdefs.ErrFailedPrecondition)
	}
	return Groups{filepath.Join(dir, name)}, nil
}

// KeepGroups returns the groups that a symbolic link in a directory of root's leads to, as long as they exist, and else
// [GroupsBelow] the cgroup of this process, to which it makes the link lead. So a daemon that is started again in another cgroup finds
// what the one before has left, and so does whoever knows the link.
//
// Errors: as of GroupsBelow; others when the link can't be made.
func KeepGroups(link, name string) (Groups, error) {
	groups, err := LinkedGroups(link)
	if err != nil && !errdefs.IsNotFound(err) {
		return Groups{}, err
	}
	if _, statErr := os.Stat(groups.dir); err == nil && statErr == nil {
		return groups, nil
	}
	if groups, err = GroupsBelow(name); err != nil {
		return Groups{}, err
	}
	made := link + ".new"
	if err := os.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Groups{}, fmt.Errorf("failed to note the cgroups of this process: %w", err)
	}
	if err := errors.Join(os.Symlink(groups.dir, made), os.Rename(made, link)); err != nil {
		return Groups{}, fmt.Errorf("failed to note the cgroups of this process: %w", err)
	}
	return groups, nil
}

// LinkedGroups returns the groups that a link of [KeepGroups] leads to, which may have gone since.
//
// Errors: NotFound when there is no link.
func LinkedGroups(link string) (Groups, error) {
	dir, err := os.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) {
		return Groups{}, fmt.Errorf("no cgroups are noted in %q: %w", link, errdefs.ErrNotFound)
	}
	if err != nil {
		return Groups{}, fmt.Errorf("failed to look for the cgroups of the daemon: %w", err)
	}
	return Groups{dir}, nil
}

// checkName keeps a group in its directory.
func checkName(name string) error {
	if name == "" || name == "." || !filepath.IsLocal(name) || strings.ContainsAny(name, "/\n") {
		return fmt.Errorf("%q names no cgroup: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Dir is the directory of the groups.
func (g Groups) Dir() string { return g.dir }

// Make makes a group, which nobody else has.
//
// Errors: AlreadyExists; InvalidArgument for a name that isn't one.
func (g Groups) Make(name string) (Group, error) {
	group, err := g.Get(name)
	if err != nil {
		return Group{}, err
	}
	for {
		if err = os.Mkdir(g.dir, 0o755); err == nil || errors.Is(err, fs.ErrExist) {
			err = os.Mkdir(group.dir, 0o755)
		}
		if _, statErr := os.Stat(filepath.Dir(g.dir)); statErr != nil || !errors.Is(err, fs.ErrNotExist) {
			break
		} // else the last of the other groups was just removed, and the directory with it
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		return Group{}, fmt.Errorf("cgroup %q: %w", group.dir, errdefs.ErrAlreadyExists)
	case err != nil:
		return Group{}, fmt.Errorf("failed to make a cgroup: %w", err)
	}
	return group, nil
}

// Get returns a group, whether it exists or not. One that doesn't exist has no processes, and can be killed and removed.
//
// Errors: InvalidArgument for a name that isn't one.
func (g Groups) Get(name string) (Group, error) {
	if err := checkName(name); err != nil {
		return Group{}, err
	}
	return Group{filepath.Join(g.dir, name), g.dir}, nil
}

// Names are those of the groups that exist, sorted; the zero value has none.
func (g Groups) Names() ([]string, error) {
	entries, err := os.ReadDir(g.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("failed to list cgroups: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if entry.IsDir() {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// Group is a cgroup of its own for what podfsm starts together. Its members are all that was started in it and all descendants of
// these, however they were forked; only root can leave it.
type Group struct{ dir, parent string }

// Dir is the group's directory.
func (g Group) Dir() string { return g.dir }

// Start has start make a process in the group, as [Cgroups.Start] does.
func (g Group) Start(start func(cgroupFD int) error) error { return Cgroups{g.dir}.Start(start) }

// Procs are the pids of the processes in the group and in cgroups below it. This process isn't one of them: a thread of it that starts
// another in a v1 cgroup is listed there for a moment. Processes that have ended aren't either.
//
// Errors: FailedPrecondition for a process of another pid namespace, which v2 lists as 0. v1 leaves such processes out, and only Remove
// tells that there are some.
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

// procs are the group's processes but for this one, 0 for each of another pid namespace.
func (g Group) procs() ([]int, error) {
	pids, err := g.members()
	return without(pids, os.Getpid()), err
}

func without(pids []int, pid int) []int {
	return slices.DeleteFunc(slices.Clone(pids), func(other int) bool { return other == pid })
}

// members are the group's processes, this one included.
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

// tree are the group's directory and all below it, each behind the one that it is in.
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
		return nil, fmt.Errorf("failed to look at cgroup %q: %w", g.dir, err)
	}
	return dirs, nil
}

// gone says that a cgroup was removed, also between the opening and the reading of its file, or that there can't be one of its name.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENAMETOOLONG)
}

// pauses are the waits between two looks at a cgroup, until it is as it will be: 1 ms, doubled up to 50 ms.
func pauses(yield func(time.Duration) bool) {
	for pause := time.Millisecond; yield(pause); pause = min(2*pause, 50*time.Millisecond) {
	}
}

// Wait returns when no process is left in the group.
//
// Errors: what ended ctx, naming the processes that are left.
func (g Group) Wait(ctx context.Context) error {
	return g.untilEmpty(ctx, func([]int, bool) error { return nil })
}

// Kill ends the processes of the group, never this one, and returns when none is left: by cgroup.kill (Linux 5.14), which no fork
// escapes, else one by one behind their pidfds until there are no more. The group may be used again.
//
// Errors: what ended ctx, naming the processes that are left; FailedPrecondition for a process of another pid namespace that only
// cgroup.kill could reach.
func (g Group) Kill(ctx context.Context) error {
	spent, err := g.killAll(ctx)
	if err != nil || !spent {
		return err
	}
	// Linux counts the uses of cgroup.kill, and a process that is born in a cgroup is killed if the count is not that of its parent's
	// cgroup (seen on 6.18). So the group begins anew.
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

// killAll kills until no process is left. A group that is spent can't be used again.
func (g Group) killAll(ctx context.Context) (spent bool, err error) {
	err = g.untilEmpty(ctx, func(pids []int, among bool) error {
		if !among { // else cgroup.kill would end this process, too
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

// untilEmpty does something about the processes of the group until none is left. among says that this process is there, too.
func (g Group) untilEmpty(ctx context.Context, do func(pids []int, among bool) error) error {
	for pause := range pauses {
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

// killOne kills a process of the group, if it still is one when it is held.
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

// writeFile writes to a file that exists.
func writeFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// Remove removes the group and all cgroups below it, and returns when they are gone. The kernel keeps a cgroup for a moment after the
// end of its last process. The directory of the groups goes with the last of them.
//
// Errors: FailedPrecondition when the group has processes, naming them; what ended ctx.
func (g Group) Remove(ctx context.Context) error {
	for pause := range pauses {
		busy, err := g.remove()
		if err == nil {
			_ = unix.Rmdir(g.parent) // fails while there are others
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

// remove removes what it can, and says what it couldn't.
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

// Mark puts a mark on the group, which stays for as long as the group does: an extended attribute that only root can set and see
// (trusted attributes, xattr(7); cgroups have had them since Linux 3.7).
func (g Group) Mark(name string) error {
	if err := unix.Setxattr(g.dir, markPrefix+name, []byte{'1'}, 0); err != nil {
		return fmt.Errorf("failed to mark cgroup %q as %s: %w", g.dir, name, err)
	}
	return nil
}

// Marked says whether the group has a mark. One that doesn't exist has none.
func (g Group) Marked(name string) (bool, error) {
	_, err := unix.Getxattr(g.dir, markPrefix+name, nil)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("failed to look for the mark %s of cgroup %q: %w", name, g.dir, err)
	}
	return true, nil
}

const markPrefix = "trusted.podfsm."
