package cni

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/host"
)

const (
	// kept marks the group of a plugin that has succeeded and has left a daemon running, such as a
	// DNS server for all pods of a network. The daemon ends by itself.
	kept = "kept"

	// removeTimeout bounds the removal of a group that has no processes.
	removeTimeout = time.Second

	// addPatience is how long an ADD whose caller has gone may take to end by itself.
	addPatience = 2 * time.Second

	// noSandbox replaces the sandbox id in commands that belong to no sandbox. It is not a valid id
	// for CNI.
	noSandbox = "-"
)

// killTimeout bounds the wait for killed processes. A process that hangs in the kernel stays in its
// group. It is a variable because tests wait less.
var killTimeout = 10 * time.Second

// groupsLink is the link in a daemon's state directory to the groups of its plugins.
const groupsLink = "cni-cgroups"

// OpenGroups returns the groups for the plugins of the daemon that has a state directory. They are
// below the daemon's own cgroup, or where the daemon before it had them if any are left there.
//
// Errors: as of [host.KeepGroups].
func OpenGroups(stateDir string) (host.Groups, error) {
	// Several daemons may share a cgroup, so the directory's name tells them apart.
	name := "podfsm-" + url.PathEscape(strings.Trim(filepath.Dir(stateDir), "/"))
	return host.KeepGroups(filepath.Join(stateDir, groupsLink), name)
}

// GroupsOf returns the groups of the daemon that has a state directory, also while the daemon is
// down. They are empty if the daemon has recorded none.
func GroupsOf(stateDir string) (host.Groups, error) {
	groups, err := host.LinkedGroups(filepath.Join(stateDir, groupsLink))
	if errdefs.IsNotFound(err) {
		return host.Groups{}, nil
	}
	return groups, err
}

// run is one command of one plugin. It has its own group, and the name of the group identifies the
// run. So its processes are found and killed after a restart, too, however they were forked.
type run struct {
	id              string // the sandbox's
	network, plugin int    // as in PluginState
	command         string
}

// name returns the name of the run's group. It has a number, since the same command may have left
// other groups.
func (r run) name(number int) string {
	return fmt.Sprintf("%s.%d.%d.%s.%d", r.id, r.network, r.plugin, r.command, number)
}

// parseRun parses the name of a group. Ids may have dots.
func parseRun(name string) (r run, ok bool) {
	fields := strings.Split(name, ".")
	if len(fields) < 5 {
		return run{}, false
	}
	last := len(fields) - 4
	network, err1 := strconv.Atoi(fields[last])
	plugin, err2 := strconv.Atoi(fields[last+1])
	_, err3 := strconv.Atoi(fields[last+3])
	r = run{strings.Join(fields[:last], "."), network, plugin, fields[last+2]}
	return r, errors.Join(err1, err2, err3) == nil && r.id != "" && r.command != ""
}

// makeGroup makes the group of a run.
func makeGroup(groups host.Groups, r run) (host.Group, error) {
	for number := 1; ; number++ {
		group, err := groups.Make(r.name(number))
		if !errdefs.IsAlreadyExists(err) {
			return group, err
		}
	}
}

// endGroup kills all processes of a group and removes the group, also when ctx has ended.
func endGroup(ctx context.Context, group host.Group) error {
	cause := fmt.Errorf("not within %s: %w", killTimeout, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), killTimeout, cause)
	defer cancel()
	return errors.Join(group.Kill(ctx), removeGroup(ctx, group))
}

func removeGroup(ctx context.Context, group host.Group) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	return group.Remove(ctx)
}

// keep marks the processes that a successful plugin has left running. The group of a plugin whose
// success is not recorded has no mark.
func keep(ctx context.Context, group host.Group) error {
	pids, err := group.Procs()
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return removeGroup(ctx, group)
	}
	log.G(ctx).WithField("pids", pids).Debug("CNI plugin has left processes running")
	return group.Mark(kept)
}

// end kills the processes that runs of a sandbox have left, except for daemons of runs that have
// succeeded. A DEL gets patience to end by itself, because a second DEL can't always complete a
// killed one: ovs-cni fails without the cache that the first DEL has removed. Groups of any sandbox
// whose daemons have ended are removed.
func end(ctx context.Context, groups host.Groups, id string, patience time.Duration, succeeded func(run) bool) error {
	return eachRun(groups, func(r run, group host.Group, isKept bool) (err error) {
		switch {
		case isKept:
			_ = removeGroup(ctx, group) // fails while a process runs
			return nil
		case r.id != id:
			return nil
		case succeeded(r): // the daemon was killed before it could mark the group
			err = keep(ctx, group)
		default:
			err = endRun(ctx, group, r, patience)
		}
		if err != nil {
			return &RunningError{Command: r.command, ContainerID: id, Err: err}
		}
		return nil
	})
}

// RunningError says that processes of an earlier run of a plugin could not be killed, and may still
// run.
type RunningError struct {
	Command     string // of the run
	ContainerID string
	Err         error
}

func (e *RunningError) Error() string {
	return fmt.Sprintf("failed to end the %s of a CNI plugin of sandbox %q: %v", e.Command, e.ContainerID, e.Err)
}

func (e *RunningError) Unwrap() error { return e.Err }

// eachRun calls f for the group of each run, until f fails. isKept says that the group has the mark
// of a daemon.
func eachRun(groups host.Groups, f func(r run, group host.Group, isKept bool) error) error {
	names, err := groups.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		r, ok := parseRun(name)
		if !ok {
			continue
		}
		group, err := groups.Get(name)
		if err != nil {
			return err
		}
		isKept, err := group.Marked(kept)
		if err != nil {
			return err
		}
		if err := f(r, group, isKept); err != nil {
			return err
		}
	}
	return nil
}

// endRun ends a run whose caller has gone.
func endRun(ctx context.Context, group host.Group, r run, patience time.Duration) error {
	switch r.command {
	case "DEL":
	case "ADD": // the host-local plugin, killed between open(2) and write(2), leaves an address that no DEL finds
		patience = min(patience, addPatience)
	default:
		patience = 0
	}
	if patience > 0 {
		patient, cancel := context.WithTimeout(ctx, patience)
		err := group.Wait(patient)
		cancel()
		if err != nil && patient.Err() == nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return endGroup(ctx, group)
}

func never(run) bool { return false }

// Left is a run of a plugin that has left processes, or that runs at the moment.
type Left struct {
	ID    string // the sandbox's
	Group string // the directory of its cgroup
}

// Leftovers returns the groups of runs of sandboxes' plugins, without those of daemons.
func Leftovers(groups host.Groups) (left []Left, err error) {
	err = eachRun(groups, func(r run, group host.Group, isKept bool) error {
		if !isKept && r.id != noSandbox {
			left = append(left, Left{r.id, group.Dir()})
		}
		return nil
	})
	return left, err
}

// End ends all processes of the plugins of a sandbox, except for daemons of plugins that have
// succeeded. Those of a DEL get patience to end by themselves, those of an ADD at most two seconds
// of it, and the others are killed at once. Do not call it for a sandbox that a [Driver] works on.
func End(ctx context.Context, groups host.Groups, id string, patience time.Duration) error {
	return end(ctx, groups, id, patience, never)
}
