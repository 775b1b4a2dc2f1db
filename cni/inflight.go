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

// InFlight returns the pid of a process that runs an ADD or a DEL, either from the plugin
// directories or in this process's network namespace; 0 without such a process. Whichever runtime
// started it, it may be about to take or free resources of a network of this node.
//
// Plugins of other runtimes are known only by their environment, which any process can forge. So
// InFlight only trusts processes that neither a pod nor a user can have started. All user ids of
// such a process are root. Its user, pid and mount namespaces are those of this process or of pid 1.
// A container has its own mount namespace, and needs CAP_SYS_ADMIN on the host to enter another. A
// setuid program keeps the real user id of its caller. Daemons that podfsm's own plugins have left
// running don't count.
func (d *Driver) InFlight(ctx context.Context, config Config) (pid int, err error) {
	own, err := spacesOf(ctx, os.Getpid())
	if err != nil {
		return 0, fmt.Errorf("failed to look at the namespaces of this process: %w", err)
	}
	hosts := []spaces{own}
	if first, err := spacesOf(ctx, 1); err == nil {
		hosts = append(hosts, first)
	}
	here, err := os.Readlink("/proc/thread-self/ns/net") // the first thread may be in another namespace
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
			continue // ended, or with more capabilities than this process, which no CNI plugin has
		}
		if err != nil {
			return 0, err
		}
		if !slices.Contains(environ, "CNI_COMMAND=ADD") && !slices.Contains(environ, "CNI_COMMAND=DEL") {
			continue
		}
		// A plugin may have entered a pod's namespace.
		netns, _ := host.Readlink(ctx, pid, "ns/net")
		if slices.Contains(environ, path) || netns == here {
			return pid, nil
		}
	}
	return 0, nil
}

// daemons returns the processes that successful plugins have left running.
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

// spaces are the namespaces that distinguish the host's processes from those of pods. A pod may use
// the host's other namespaces.
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

// rootEnviron returns the environment of a process of root on the host, and nil for any other
// process. Reading the environment of a hostile process may hang.
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

// allRoot reports whether the real, effective, saved and filesystem user ids in a /proc/PID/status
// are root.
func allRoot(status string) bool {
	for line := range strings.Lines(status) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			return slices.Equal(strings.Fields(ids), []string{"0", "0", "0", "0"})
		}
	}
	return false
}
