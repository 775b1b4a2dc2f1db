package plugin

import (
	"context"
	"fmt"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// captureNetNS takes the network namespace that pause is started in, proves whose it is, and pins it by a bind mount.
type captureNetNS struct {
	*node
	facts lifecycle.Facts
}

func (s *captureNetNS) Facts() lifecycle.Facts { return s.facts }

func (s *captureNetNS) Plan(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *captureNetNS) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if spec.OnNodeNetwork() {
		return &lifecycle.Skipped{Reason: "the pod is on the node's network"}, nil
	}
	if spec.NetNSPath != "" {
		return s.adopt(spec.NetNSPath)
	}
	of := r.Offered(states.StartPause).(*offeredPause)
	handle := of.netns
	if handle == nil {
		var err error
		if handle, err = s.capture(ctx, r, of.pause); err != nil {
			return nil, err
		}
		defer handle.Close()
	}
	path := s.netNSPath(r.Key.ID)
	if err := handle.Pin(path); err != nil {
		return nil, err
	}
	return &NetNS{Path: path, Inode: handle.Inode()}, nil
}

// adopt takes a namespace that the caller made and keeps.
func (s *captureNetNS) adopt(path string) (any, error) {
	handle, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	return &NetNS{Path: path, Inode: handle.Inode()}, nil
}

// capture takes the network namespace of a pause that containerd knows the pid of.
func (n *node) capture(ctx context.Context, r *lifecycle.Run, p Pause) (*netns.Handle, error) {
	expect := expect(r, p)
	expect.Pid = int(p.Pid)
	expect.Alive = func(ctx context.Context) error {
		return runsAs(ctx, n, r.Key.ID, p.Pid, containerd.Created, containerd.Running)
	}
	return netns.Capture(ctx, expect)
}

// expect is what a process must be whose network namespace this is.
func expect(r *lifecycle.Run, p Pause) netns.Expect {
	expect := netns.Expect{Namespace: r.Key.Namespace, ID: r.Key.ID, CgroupPath: p.CgroupPath}
	if allocated, ok := r.Result(states.AllocateIDs).(*userns.Mappings); ok {
		expect.UIDs, expect.GIDs = extent(allocated.UIDs), extent(allocated.GIDs)
	}
	return expect
}

func extent(m userns.Mapping) []netns.IDMap {
	return []netns.IDMap{{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Length}}
}

// runsAs fails unless containerd says that the sandbox's task has pid, and is in one of the states.
func runsAs(ctx context.Context, n *node, id string, pid uint32, in ...containerd.ProcessStatus) error {
	status, err := n.containers.Status(ctx, id)
	switch {
	case err != nil:
		return err
	case !slices.Contains(in, status.State):
		return fmt.Errorf("pause is %s: %w", status.State, errdefs.ErrFailedPrecondition)
	case status.Pid != pid:
		return fmt.Errorf("pause runs under pid %d now, it was started under %d: %w", status.Pid, pid, errdefs.ErrFailedPrecondition)
	default:
		return nil
	}
}

func (s *captureNetNS) Undo(ctx context.Context, r *lifecycle.Run) error {
	return netns.Unpin(ctx, s.netNSPath(r.Key.ID))
}

func (s *captureNetNS) Probe(_ context.Context, r *lifecycle.Run) (bool, error) {
	info, err := netns.Inspect(s.netNSPath(r.Key.ID))
	return info.Pinned, err
}
