// Package netns takes the network namespace of a pod's pause process, proves whose it is, and pins it to a path.
//
// A pid is a number that the kernel hands out again, so "/proc/PID/ns/net" alone may be a stranger's by the time it is opened.
// [Capture] therefore holds the process by a pidfd, proves by several independent facts that the process is the pod's, and asks
// last whether that very process still lives: a pid isn't reused while its process does, so everything read in between was its.
package netns

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// IDMap is one extent of a user namespace's uid or gid mapping, as in user_namespaces(7).
type IDMap struct {
	ContainerID, HostID, Size uint32
}

// Expect says what the process must be whose network namespace is captured.
type Expect struct {
	// Pid is the process's id in containerd's pid namespace. [Await] needs none.
	Pid int
	// Namespace and ID are the containerd namespace and the sandbox id that the parent, the pod's shim, was started for.
	Namespace, ID string
	// CgroupPath is the OCI spec's linux.cgroupsPath: "slice:prefix:name" with the systemd driver, else a path, where an
	// absolute one is below the root of the hierarchy and a relative one below the runtime's own cgroup. Empty means that the
	// runtime was told none (containerd's disable_cgroup): there is nothing to compare then, and the other proofs must do.
	CgroupPath string
	// UIDs and GIDs are the mapping that the pod's user namespace must have. Both nil is a pod in the host's user namespace,
	// whose network namespace must not be the host's.
	UIDs, GIDs []IDMap
	// Alive asks containerd whether the pod's task still runs under Pid; any error means it doesn't, or that nobody knows. [Await]
	// doesn't ask.
	Alive func(context.Context) error
}

// Handle holds an open network namespace, which lives at least as long as the handle. It is safe for concurrent use.
type Handle struct {
	ns *os.File
	id nsID
}

// Capture returns the network namespace of the process, once all proofs hold; the caller closes it.
//
// Errors: InvalidArgument for an incomplete Expect, NotFound when the process has ended, FailedPrecondition when a proof fails,
// naming the proof. What Alive returns is wrapped. A ctx that ends is noticed only by Alive, since nothing else blocks.
func Capture(ctx context.Context, expect Expect) (*Handle, error) {
	if err := expect.validate(); err != nil {
		return nil, err
	}
	if hostErr != nil {
		return nil, fmt.Errorf("failed to tell a pod's namespaces from the host's: %w", hostErr)
	}
	pidfd, err := openPidfd(expect.Pid)
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()

	h, err := capture(ctx, pidfd, expect)

	// Asked last, and even after an error: if the process has ended, its pid may have become another's at any moment before, and
	// whatever the proofs have said may be about that one. If it lives, it has lived since pidfd_open(2) found it.
	if ended := checkAlive(pidfd, expect.Pid); ended != nil {
		if h != nil {
			h.Close()
		}
		return nil, ended
	}
	return h, err
}

func (e Expect) validate() error {
	switch {
	case e.Pid <= 0:
		return fmt.Errorf("pid %d of the pause process is not a process: %w", e.Pid, errdefs.ErrInvalidArgument)
	case e.Alive == nil:
		return fmt.Errorf("no way to ask containerd for the task: %w", errdefs.ErrInvalidArgument)
	}
	return e.validateOwner()
}

// validateOwner is about whose process it is.
func (e Expect) validateOwner() error {
	switch {
	case e.Namespace == "" || e.ID == "":
		return fmt.Errorf("containerd namespace %q and sandbox id %q must both be known to prove a process: %w", e.Namespace, e.ID, errdefs.ErrInvalidArgument)
	case (e.UIDs == nil) != (e.GIDs == nil):
		return fmt.Errorf("uid and gid mapping must both be given or both be absent: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// capture proves the process and takes its network namespace. It relies on its caller to check that the process has lived on.
func capture(ctx context.Context, pidfd *os.File, expect Expect) (_ *Handle, retErr error) {
	parent, err := proveParent(expect)
	if err != nil {
		return nil, err
	}
	if err := proveCgroup(expect); err != nil {
		return nil, err
	}
	h, err := proveNamespaces(pidfd, expect)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			h.Close()
		}
	}()
	// All above would hold as well for a process that a shim of the same sandbox started earlier or beside pause. Only containerd
	// knows which one is pause; it is asked after the pidfd was opened, so its answer is about the process that the pidfd holds.
	if err := expect.Alive(ctx); err != nil {
		return nil, fmt.Errorf("failed to confirm with containerd that sandbox %q runs as process %d: %w", expect.ID, expect.Pid, err)
	}
	if err := proveSameParent(expect, parent); err != nil {
		return nil, err
	}
	return h, nil
}

// proveNamespaces takes the process's network namespace and proves it by its own and the user namespace.
func proveNamespaces(pidfd *os.File, expect Expect) (_ *Handle, retErr error) {
	owner, err := proveUserNS(pidfd, expect)
	if err != nil {
		return nil, err
	}
	netns, err := openNS(pidfd, expect.Pid, netNS)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			netns.Close()
		}
	}()
	id, err := proveNetNS(netns, owner, expect)
	if err != nil {
		return nil, err
	}
	return &Handle{ns: netns, id: id}, nil
}

// Same says whether both are the same namespace.
func (h *Handle) Same(other *Handle) bool { return h.id == other.id }

// Inode is the namespace's inode number on nsfs, as in the text of /proc/PID/ns/net.
func (h *Handle) Inode() uint64 { return h.id.ino }

// Close lets go of the namespace; a pin keeps it.
func (h *Handle) Close() error { return h.ns.Close() }

// Open opens the network namespace at path, following symlinks, for a caller that brings its own. The caller closes it.
//
// Errors: NotFound when there is nothing at path, InvalidArgument when it is not a network namespace.
func Open(path string) (*Handle, error) {
	ns, err := openPath(path, 0)
	if err != nil {
		return nil, err
	}
	id, err := identify(ns)
	if err == nil {
		err = checkNetNS(ns)
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return &Handle{ns: ns, id: id}, nil
}

// checkNetNS returns InvalidArgument unless file is a network namespace: a file of nsfs whose type is CLONE_NEWNET.
func checkNetNS(file *os.File) error {
	pinned, err := onNSFS(file)
	if err != nil {
		return err
	}
	if !pinned {
		return fmt.Errorf("%q is not a namespace: %w", file.Name(), errdefs.ErrInvalidArgument)
	}
	kind, err := unix.IoctlRetInt(int(file.Fd()), unix.NS_GET_NSTYPE)
	if err != nil {
		return fmt.Errorf("failed to read the namespace type of %q: %w", file.Name(), err)
	}
	if kind != unix.CLONE_NEWNET {
		return fmt.Errorf("%q is a namespace of type %#x, not a network namespace: %w", file.Name(), kind, errdefs.ErrInvalidArgument)
	}
	return nil
}
