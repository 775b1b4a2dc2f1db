package netns

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Await looks for the first time after firstLook, which a shim alone takes to start, and then the more rarely the longer it has waited, so
// that it finds the namespace when it is a sixteenth older at most. A runtime needs 20 ms on an idle node and seconds on a busy one; a look
// costs some microseconds and the wake of a thread.
const (
	firstLook    = 12 * time.Millisecond
	looksTheTime = 16
)

// Await returns the network namespace of the sandbox as soon as a process of its cgroup is in it, while the runtime is still making the
// container: a runtime makes the namespaces first, in processes of that cgroup. The caller closes it. processes returns the pids in the
// cgroup, none before there is one.
//
// Cgroup, user namespace and owner are proven as by [Capture], and that the process is below the sandbox's shim. Which of the processes
// becomes pause nobody knows by then, so what is done with the namespace has to be undone unless a later Capture of pause finds the same one.
//
// It returns when ctx ends, with its cause; and errors: InvalidArgument for an incomplete Expect, and those of processes.
func Await(ctx context.Context, expect Expect, processes func() ([]int, error)) (*Handle, error) {
	if err := expect.validateOwner(); err != nil {
		return nil, err
	}
	if expect.CgroupPath == "" {
		return nil, fmt.Errorf("no cgroup to find the processes of sandbox %q in: %w", expect.ID, errdefs.ErrInvalidArgument)
	}
	if hostErr != nil {
		return nil, fmt.Errorf("failed to tell a pod's namespaces from the host's: %w", hostErr)
	}
	begun := time.Now()
	timer := time.NewTimer(firstLook)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-timer.C:
		}
		pids, err := processes()
		if err != nil {
			return nil, err
		}
		for _, pid := range pids {
			expect.Pid = pid
			if h := look(expect); h != nil {
				return h, nil
			}
		}
		timer.Reset(time.Since(begun) / looksTheTime)
	}
}

// look returns the network namespace of a process if all proofs hold now. If one doesn't, the process may be on its way there.
func look(expect Expect) *Handle {
	if id, err := statNS(procPath(expect.Pid, "ns/net")); err != nil || id == host.net {
		return nil
	}
	pidfd, err := openPidfd(expect.Pid)
	if err != nil {
		return nil
	}
	defer pidfd.Close()
	if proveDescent(expect) != nil || proveCgroup(expect) != nil {
		return nil
	}
	h, err := proveNamespaces(pidfd, expect)
	if err != nil {
		return nil
	}
	if checkAlive(pidfd, expect.Pid) != nil {
		h.Close()
		return nil
	}
	return h
}
