package plugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/states"
)

// captureNetNS captures the network namespace that pause was cloned in, and pins it by a bind
// mount.
type captureNetNS struct{ *node }

var _ lifecycle.Checker = (*captureNetNS)(nil)

// CaptureNetNS is the name of the step captureNetNS.
const CaptureNetNS states.Event = "capture_netns"

func (s *captureNetNS) Declaration() lifecycle.Declaration {
	return s.bounded(lifecycle.Declaration{
		Step: states.Step{
			Name:    CaptureNetNS,
			Done:    "Its network namespace was captured and pinned.",
			State:   "NetNSCaptured",
			Meaning: "The pause process's network namespace is proven to be the pod's own, and pinned.",
		},
		AtStop: true,
	})
}

func (s *captureNetNS) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *captureNetNS) Do(_ context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if spec.OnNodeNetwork() {
		return &lifecycle.Skipped{Reason: onNodeNetwork}, nil
	}
	if spec.NetNSPath != "" {
		return s.adopt(spec.NetNSPath)
	}
	process, err := s.pauses.Process(holderID(r.Key))
	if err != nil {
		return nil, err
	}
	handle, err := netns.Capture(process)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	path := s.netNSPath(r.Key.ID)
	if err := handle.Pin(path); err != nil {
		return nil, err
	}
	return &NetNS{Path: path, Inode: handle.Inode()}, nil
}

// adopt opens a namespace that the caller made and keeps.
func (s *captureNetNS) adopt(path string) (any, error) {
	handle, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	return &NetNS{Path: path, Inode: handle.Inode()}, nil
}

const onNodeNetwork = "the pod is on the node's network"

// Find finds the namespace by the name of its pin. It is the pod's if pause runs in it.
func (s *captureNetNS) Find(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if spec.OnNodeNetwork() {
		return &lifecycle.Skipped{Reason: onNodeNetwork}, nil
	}
	path := s.netNSPath(r.Key.ID)
	if spec.NetNSPath != "" {
		path = spec.NetNSPath
	}
	started, ok := r.Result(StartPause).(*Pause)
	if !ok {
		return nil, fmt.Errorf("no record of pause of sandbox %q: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	return findNetNS(ctx, path, int(started.Pid))
}

// findNetNS returns the namespace at a path. It fails with NotFound unless the process is in it.
func findNetNS(ctx context.Context, path string, pid int) (*NetNS, error) {
	handle, err := netns.Open(path)
	if err != nil {
		return nil, asNotFound(err)
	}
	defer handle.Close()
	in, err := host.Readlink(ctx, pid, "ns/net")
	if err != nil {
		return nil, err
	}
	if in != fmt.Sprintf("net:[%d]", handle.Inode()) {
		return nil, fmt.Errorf("process %d is in %s, not in %q: %w", pid, in, path, errdefs.ErrNotFound)
	}
	return &NetNS{Path: path, Inode: handle.Inode()}, nil
}

// asNotFound returns err as NotFound if something else is in the place of a lost resource: the
// resource is not there.
func asNotFound(err error) error {
	if errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// Check pins the namespace again if the pin is gone.
func (s *captureNetNS) Check(ctx context.Context, r *lifecycle.Run) error { return s.keepPin(ctx, r) }

// keepPin pins a sandbox's network namespace again if the pin is gone and pause still runs in the
// namespace. "ip netns delete" removes pins, and mounts over their directory hide them. Without a
// pin, the namespace would end with pause, before CNI DEL.
func (n *node) keepPin(ctx context.Context, r *lifecycle.Run) error {
	captured, ok := n.pinOf(r)
	if !ok || isPinned(captured) {
		return nil
	}
	process, err := n.pauses.Process(holderID(r.Key))
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	handle, err := netns.Capture(process)
	if errdefs.IsNotFound(err) {
		return nil // pause has ended
	}
	if err != nil {
		return err
	}
	defer handle.Close()
	if handle.Inode() != captured.Inode {
		return fmt.Errorf("pause of sandbox %q is in network namespace %d, not in %d: %w", r.Key.ID, handle.Inode(), captured.Inode, errdefs.ErrInternal)
	}
	if err := handle.Pin(captured.Path); err != nil {
		return fmt.Errorf("failed to pin the network namespace of sandbox %q again: %w", r.Key.ID, err)
	}
	log.G(ctx).WithField("path", captured.Path).Warn("network namespace pin was missing, pinned again")
	return nil
}

// keepPinForDel is keepPin before CNI DEL. It fails if something else is in the place of the pin:
// no plugin may look into that. But a pin that can't be made, as on a full filesystem, must not
// block the undo.
func (n *node) keepPinForDel(ctx context.Context, r *lifecycle.Run) error {
	err := n.keepPin(ctx, r)
	if err == nil || errdefs.IsAlreadyExists(err) || errdefs.IsFailedPrecondition(err) {
		return err
	}
	log.G(ctx).WithError(err).Warn("failed to pin network namespace again, CNI DEL runs without it")
	return nil
}

// pinOf returns the recorded pin of a sandbox, false if podfsm didn't make one.
func (n *node) pinOf(r *lifecycle.Run) (*NetNS, bool) {
	captured, ok := r.Result(CaptureNetNS).(*NetNS)
	return captured, ok && r.Spec.(*Spec).NetNSPath == ""
}

// isPinned reports whether the recorded namespace is still pinned at its path.
func isPinned(captured *NetNS) bool {
	info, err := netns.Inspect(captured.Path)
	return err == nil && info.Pinned && info.Inode == captured.Inode
}

func (s *captureNetNS) Undo(ctx context.Context, r *lifecycle.Run) error {
	var errs []error
	for _, path := range s.pinPaths(r) {
		errs = append(errs, netns.Unpin(ctx, path))
	}
	return errors.Join(errs...)
}

func (s *captureNetNS) Probe(_ context.Context, r *lifecycle.Run) (bool, error) {
	for _, path := range s.pinPaths(r) {
		if info, err := netns.Inspect(path); err != nil || info.Pinned {
			return info.Pinned, err
		}
	}
	return false, nil
}

// pinPaths returns where the namespace of a sandbox may be pinned: the recorded path, else all
// names that podfsm may have used. Looking at the files doesn't suffice, because a mount can cover
// a pin.
func (s *captureNetNS) pinPaths(r *lifecycle.Run) (paths []string) {
	if captured, ok := s.pinOf(r); ok {
		return []string{captured.Path}
	}
	for _, name := range leaks.Pins(r.Key.ID) {
		paths = append(paths, filepath.Join(s.stock.netNSDir(), name))
	}
	return paths
}
