package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/host"
)

// InFlight is a process that runs an ADD or a DEL from the plugin directories, or in this process's network namespace: whoever
// started it, it may be about to take or free what belongs to a network of this node. It is 0 when there is none.
//
// Other runtimes' plugins are known only by their environment, which any process can make up. So it is read of no process that a pod or
// a user can have made: only of root's, by all its user ids, in the user, pid and mount namespaces of this process or of pid 1. A
// container has a mount namespace of its own, and to enter another takes CAP_SYS_ADMIN on the host; a program that is setuid root keeps
// the real user id of whoever has started it. Daemons that podfsm's own plugins have left on purpose don't count.
func (d *Driver) InFlight(ctx context.Context, config Config) (pid int, err error) {
	own, err := spacesOf(ctx, os.Getpid())
	if err != nil {
		return 0, fmt.Errorf("failed to look at the namespaces of this process: %w", err)
	}
	hosts := []spaces{own}
	if first, err := spacesOf(ctx, 1); err == nil {
		hosts = append(hosts, first)
	}
	here, err := os.Readlink("/proc/thread-self/ns/net") // the first thread may be in a namespace for good
	if err != nil {
		return 0, err
	}
	daemons, err := d.daemons()
	if err != nil {
		return 0, err
	}
	pids, err := host.Pids()
	if err != nil {
		return 0, err
	}
	path := "CNI_PATH=" + pathOf(config.BinDirs)
	for _, pid := range pids {
		if daemons[pid] {
			continue
		}
		environ, err := rootEnviron(ctx, pid, hosts)
		if errdefs.IsNotFound(err) || errors.Is(err, fs.ErrPermission) {
			continue // it has ended, or has capabilities that this process lacks, which no plugin of a runtime beside it needs
		}
		if err != nil {
			return 0, err
		}
		if !slices.Contains(environ, "CNI_COMMAND=ADD") && !slices.Contains(environ, "CNI_COMMAND=DEL") {
			continue
		}
		// A plugin may be in a pod's namespace at the moment.
		netns, _ := host.Readlink(ctx, pid, "ns/net")
		if slices.Contains(environ, path) || netns == here {
			return pid, nil
		}
	}
	return 0, nil
}

// daemons are the processes that plugins have left on purpose.
func (d *Driver) daemons() (map[int]bool, error) {
	daemons := map[int]bool{}
	err := eachRun(d.groups, func(_ run, group host.Group, isKept bool) error {
		if !isKept {
			return nil
		}
		pids, err := group.Procs()
		for _, pid := range pids {
			daemons[pid] = true
		}
		return err
	})
	return daemons, err
}

// spaces are the namespaces that tell a process of the host from one of a pod, which could be in the others of the host.
type spaces struct{ user, pid, mount string }

func spacesOf(ctx context.Context, pid int) (s spaces, err error) {
	for _, link := range []struct {
		name string
		into *string
	}{{"ns/mnt", &s.mount}, {"ns/user", &s.user}, {"ns/pid", &s.pid}} {
		if *link.into, err = host.Readlink(ctx, pid, link.name); err != nil {
			return spaces{}, err
		}
	}
	return s, nil
}

// rootEnviron is the environment of a process of root's on the host, and none of others: it isn't even read, because that hangs when a
// process wants it to.
func rootEnviron(ctx context.Context, pid int, hosts []spaces) ([]string, error) {
	in, err := spacesOf(ctx, pid)
	if err != nil || !slices.Contains(hosts, in) {
		return nil, err
	}
	status, err := host.Read(ctx, pid, "status")
	if err != nil || !allRoot(string(status)) {
		return nil, err
	}
	environ, err := host.Read(ctx, pid, "environ")
	return strings.Split(string(bytes.TrimRight(environ, "\x00")), "\x00"), err
}

// allRoot says whether the real, effective, saved and filesystem user ids of a /proc/PID/status are root's.
func allRoot(status string) bool {
	for line := range strings.Lines(status) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			return slices.Equal(strings.Fields(ids), []string{"0", "0", "0", "0"})
		}
	}
	return false
}
