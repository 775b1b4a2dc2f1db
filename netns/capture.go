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

// Capture returns the network namespace of a process; the caller closes it. The process is held by its pidfd, so its pid can't be
// another's by then.
//
// Errors: NotFound when the process has ended, FailedPrecondition when it is in the host's network namespace.
func Capture(process *host.Process) (*Handle, error) {
	h, err := capture(process)
	// Asked last, and even after an error: where the kernel opens namespaces only by a path below /proc, that may have been another
	// process's if this one has ended meanwhile.
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
		return nil, fmt.Errorf("failed to tell a pod's network namespace from the host's: %w", hostErr)
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

// File is the namespace, the Handle's to close.
func (h *Handle) File() *os.File { return h.ns }

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
