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
	// kept is the mark of a group whose plugin has succeeded: what is in there was left on purpose, as a DNS server that all pods of a
	// network use, and ends when it wants to.
	kept = "kept"

	// killTimeout bounds the wait for killed processes. One that hangs in the kernel stays for whoever looks next.
	killTimeout = 10 * time.Second

	// removeTimeout bounds the removal of a group that has no processes.
	removeTimeout = time.Second

	// nobody is in the place of a sandbox's id in commands that are about none. It is no id for CNI.
	nobody = "-"
)

// groupsLink leads, in a daemon's state directory, to the groups for its plugins.
const groupsLink = "cni-cgroups"

// OpenGroups returns the groups for the plugins of the daemon that has a state directory: below its own cgroup, or where the daemon
// before it had them if there are any left.
//
// Errors: as of [host.KeepGroups].
func OpenGroups(stateDir string) (host.Groups, error) {
	// Several daemons may share a cgroup, so the directory's name tells them apart.
	name := "podfsm-" + url.PathEscape(strings.Trim(filepath.Dir(stateDir), "/"))
	return host.KeepGroups(filepath.Join(stateDir, groupsLink), name)
}

// GroupsOf returns the groups of the daemon that has a state directory, also while it is down. Where it has noted none, there are none.
func GroupsOf(stateDir string) (host.Groups, error) {
	groups, err := host.LinkedGroups(filepath.Join(stateDir, groupsLink))
	if errdefs.IsNotFound(err) {
		return host.Groups{}, nil
	}
	return groups, err
}

// run is one command of one plugin. It has a group of its own whose name says which it is, so that its processes are found and ended
// after a restart, too, whatever they are called and however they were forked.
type run struct {
	id              string // the sandbox's
	network, plugin int    // as in PluginState
	command         string
}

// name is that of the run's group. The same command may have left other groups, so they are numbered.
func (r run) name(number int) string {
	return fmt.Sprintf("%s.%d.%d.%s.%d", r.id, r.network, r.plugin, r.command, number)
}

// parseRun reads the name of a group, whose id may have dots.
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

// endGroup ends all processes of a group and removes it, also when ctx has ended.
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

// keep marks what a plugin that has succeeded has left running. Until then it is of a run whose success nobody knows of.
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

// end ends what runs of a sandbox have left, except what was left on purpose: by runs that have succeeded on record. A DEL gets patience
// to come to its end: a half of it can't always be made whole by another, for the bridge plugin removes the interface first and forgets
// its masquerade rules when it doesn't find it. Groups of whatever sandbox whose kept processes have ended are removed.
func end(ctx context.Context, groups host.Groups, id string, patience time.Duration, succeeded func(run) bool) error {
	return eachRun(groups, func(r run, group host.Group, isKept bool) (err error) {
		switch {
		case isKept:
			_ = removeGroup(ctx, group) // fails until its last process has ended, which may be another sandbox's affair
			return nil
		case r.id != id:
			return nil
		case succeeded(r): // this process, or the one before it, was ended before it could say so
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

// RunningError says that what an earlier run of a plugin has started could not be ended, and may still run.
type RunningError struct {
	Command     string // of the run
	ContainerID string
	Err         error
}

func (e *RunningError) Error() string {
	return fmt.Sprintf("failed to end the %s of a CNI plugin of sandbox %q: %v", e.Command, e.ContainerID, e.Err)
}

func (e *RunningError) Unwrap() error { return e.Err }

// eachRun calls f for the group of each run, until it fails. isKept says that the run has left something on purpose.
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

// endRun ends a run that nobody waits for any more.
func endRun(ctx context.Context, group host.Group, r run, patience time.Duration) error {
	if r.command == "DEL" {
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

// Left is what a run of a plugin has left, or runs in at the moment.
type Left struct {
	ID    string // the sandbox's
	Group string // the directory of its cgroup
}

// Leftovers are the groups of runs of sandboxes' plugins, except those that have been left on purpose.
func Leftovers(groups host.Groups) (left []Left, err error) {
	err = eachRun(groups, func(r run, group host.Group, isKept bool) error {
		if !isKept && r.id != nobody {
			left = append(left, Left{r.id, group.Dir()})
		}
		return nil
	})
	return left, err
}

// End returns when no process of a sandbox's plugins is left, except what plugins that have succeeded have left on purpose: those of a
// DEL get patience to come to their end, the others are killed at once. It is for sandboxes that no [Driver] works on.
func End(ctx context.Context, groups host.Groups, id string, patience time.Duration) error {
	return end(ctx, groups, id, patience, never)
}
