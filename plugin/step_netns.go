package plugin

import (
	"context"
	"fmt"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// captureNetNS takes the network namespace that pause is started in and pins it by a bind mount, as soon as the runtime has made it: so that
// the network is attached meanwhile. It is done when containerd has said which process is pause, and that one is proven to be in there.
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
	coming := r.Offered(states.StartPause).(*comingPause)
	path := s.netNSPath(r.Key.ID)
	early := s.early(ctx, r, coming)
	if early != nil {
		defer early.Close()
		if err := early.Pin(path); err != nil {
			return nil, err
		}
		r.Offer(path)
	}
	handle, err := s.prove(ctx, r, coming)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	if early != nil && !handle.Same(early) {
		return nil, fmt.Errorf("pause is in network namespace %d, and what its runtime started before it in %d: %w",
			handle.Inode(), early.Inode(), errdefs.ErrFailedPrecondition)
	}
	if err := handle.Pin(path); err != nil {
		return nil, err
	}
	return &NetNS{Path: path, Inode: handle.Inode()}, nil
}

// early is the namespace of a pause that its runtime is still making; nil where that is made before.
func (s *captureNetNS) early(ctx context.Context, r *lifecycle.Run, coming *comingPause) *netns.Handle {
	if !coming.early {
		return nil
	}
	handle, err := netns.Await(coming.making, expect(r, coming), func() ([]int, error) { return pause.Processes(coming.CgroupPath) })
	if err != nil && coming.making.Err() == nil {
		log.G(ctx).WithError(err).Debug("podfsm: the network waits until pause is created")
	}
	return handle
}

// prove captures the namespace of the process that containerd says is pause.
func (s *captureNetNS) prove(ctx context.Context, r *lifecycle.Run, coming *comingPause) (*netns.Handle, error) {
	pid, err := coming.created(ctx)
	if err != nil {
		return nil, err
	}
	expect := expect(r, coming)
	expect.Pid = int(pid)
	expect.Alive = func(ctx context.Context) error {
		return runsAs(ctx, s.node, r.Key.ID, pid, containerd.Created, containerd.Running)
	}
	return netns.Capture(ctx, expect)
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

// expect is what a process must be whose network namespace this is.
func expect(r *lifecycle.Run, coming *comingPause) netns.Expect {
	expect := netns.Expect{Namespace: r.Key.Namespace, ID: r.Key.ID, CgroupPath: coming.CgroupPath}
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
