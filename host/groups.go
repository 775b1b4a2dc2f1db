package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// Groups are the cgroups that one podfsm makes for the processes that it starts, in one directory.
// They have no controllers: they limit nothing and only track their members. So the daemon may stay
// in the cgroup above them: the "no internal processes" rule of v2 applies only to cgroups that
// enable controllers for their children, see cgroups(7).
type Groups struct{ dir string }

// GroupsBelow returns the groups in a directory below the cgroup of this process. The first Make
// makes the directory. It is in the v2 hierarchy, also in hybrid mode, or else in one of v1. In a
// service with Delegate=yes, systemd doesn't touch the groups.
//
// Errors: FailedPrecondition if no writable hierarchy is mounted.
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

// KeepGroups returns the groups to which a symbolic link leads, if they exist. Otherwise it returns
// [GroupsBelow] the cgroup of this process, and sets the link to them. So a daemon that is
// restarted in another cgroup, or a reader of the link, finds the groups of the previous daemon.
// The link must be in a directory of root.
//
// Errors: those of GroupsBelow; others if the link can't be made.
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
		return Groups{}, fmt.Errorf("failed to link the cgroups of this process: %w", err)
	}
	if err := errors.Join(os.Symlink(groups.dir, made), os.Rename(made, link)); err != nil {
		return Groups{}, fmt.Errorf("failed to link the cgroups of this process: %w", err)
	}
	return groups, nil
}

// LinkedGroups returns the groups to which a link of [KeepGroups] leads. They may not exist any
// more.
//
// Errors: NotFound if there is no link.
func LinkedGroups(link string) (Groups, error) {
	dir, err := os.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) {
		return Groups{}, fmt.Errorf("no link to cgroups at %q: %w", link, errdefs.ErrNotFound)
	}
	if err != nil {
		return Groups{}, fmt.Errorf("failed to read the link to the cgroups of the daemon: %w", err)
	}
	return Groups{dir}, nil
}

// checkName refuses a name that leads out of the directory of the groups.
func checkName(name string) error {
	if name == "" || name == "." || !filepath.IsLocal(name) || strings.ContainsAny(name, "/\n") {
		return fmt.Errorf("invalid cgroup name %q: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Dir returns the directory of the groups.
func (g Groups) Dir() string { return g.dir }

// Make makes a new group.
//
// Errors: AlreadyExists; InvalidArgument for an invalid name.
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
		} // else the directory was just removed with the last of the other groups
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		return Group{}, fmt.Errorf("cgroup %q: %w", group.dir, errdefs.ErrAlreadyExists)
	case err != nil:
		return Group{}, fmt.Errorf("failed to make a cgroup: %w", err)
	}
	return group, nil
}

// Get returns a group, also if it doesn't exist. Such a group has no processes, and can be killed
// and removed.
//
// Errors: InvalidArgument for an invalid name.
func (g Groups) Get(name string) (Group, error) {
	if err := checkName(name); err != nil {
		return Group{}, err
	}
	return Group{filepath.Join(g.dir, name), g.dir}, nil
}

// Names returns the names of the existing groups, sorted; none for the zero value.
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
