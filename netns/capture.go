// Package netns takes the network namespace of a pod's pause process, and pins it to a path.
package netns

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// Handle holds an open network namespace, which lives at least as long as the handle. It is safe for concurrent use.
type Handle struct {
	ns *os.File
	id nsID
}

// Capture returns the network namespace of a process. The caller closes it. The process is held by
// its pidfd, so its pid can't have been reused.
//
// Errors: NotFound if the process has ended, FailedPrecondition if it is in the host's network
// namespace.
func Capture(process *host.Process) (*Handle, error) {
	h, err := capture(process)
	// Check that the process lives last, and even after an error: older kernels open namespaces
	// only by /proc/PID, and if this process has ended meanwhile, PID may be another one.
	if !process.Alive() {
		if h != nil {
			h.Close()
		}
		return nil, fmt.Errorf("process %d has ended: %w", process.Pid(), errdefs.ErrNotFound)
	}
	return h, err
}

func capture(process *host.Process) (*Handle, error) {
	if hostErr != nil {
		return nil, fmt.Errorf("failed to identify the host's network namespace: %w", hostErr)
	}
	ns, err := openNetNS(process)
	if err != nil {
		return nil, err
	}
	id, err := identify(ns)
	if err == nil && id == hostNS {
		err = fmt.Errorf("process %d is in the host's network namespace: %w", process.Pid(), errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return &Handle{ns: ns, id: id}, nil
}

// Inode is the namespace's inode number on nsfs, as in the text of /proc/PID/ns/net.
func (h *Handle) Inode() uint64 { return h.id.ino }

// File returns the open namespace. The Handle closes it.
func (h *Handle) File() *os.File { return h.ns }

// Close closes the handle. A pinned namespace stays.
func (h *Handle) Close() error { return h.ns.Close() }

// Open opens the network namespace at path, following symlinks, for callers that bring their own.
// The caller closes it.
//
// Errors: NotFound if path does not exist, InvalidArgument if it is not a network namespace.
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
