package netns

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What isn't the pod's, or isn't yet, is passed over until what is turns up.
func TestAwait(t *testing.T) {
	requireRoot(t)
	userns := shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET}
	for name, test := range map[string]struct {
		pod     shimOptions
		another shimOptions
	}{
		"no cgroup yet":                                {pod: userns},
		"host's namespaces":                            {pod: userns, another: shimOptions{}},
		"user namespace alone":                         {pod: userns, another: shimOptions{Flags: unix.CLONE_NEWUSER}},
		"network namespace alone":                      {pod: userns, another: shimOptions{Flags: unix.CLONE_NEWNET}},
		"another mapping":                              {pod: userns, another: shimOptions{Flags: userns.Flags, IDs: []IDMap{{0, 700000, 65536}}}},
		"network namespace of the host's users":        {pod: userns, another: shimOptions{Flags: unix.CLONE_NEWUSER, ShimInNetNS: true}},
		"pod on the host's users":                      {pod: shimOptions{Flags: unix.CLONE_NEWNET}, another: shimOptions{}},
		"pod on the host's users, a user namespace":    {pod: shimOptions{Flags: unix.CLONE_NEWNET}, another: userns},
		"pod on the host's users, only user namespace": {pod: shimOptions{Flags: unix.CLONE_NEWNET}, another: shimOptions{Flags: unix.CLONE_NEWUSER}},
	} {
		t.Run(name, func(t *testing.T) {
			p := startPod(t, test.pod)
			test.another.ID = p.id
			other := startPod(t, test.another)
			other.join(t, p)
			expect := p.expect()
			expect.Pid, expect.Alive = 0, nil
			looks, open := 0, countFDs(t)
			h, err := Await(t.Context(), expect, func() ([]int, error) {
				switch looks++; looks {
				case 1:
					return nil, nil
				case 2:
					return []int{other.pid}, nil
				default:
					return []int{other.pid, p.pid}, nil
				}
			})
			require.NoError(t, err)
			require.Equal(t, p.netnsInode(t), h.Inode())
			require.Equal(t, 3, looks)

			captured, err := Capture(t.Context(), p.expect())
			require.NoError(t, err)
			require.True(t, captured.Same(h))
			require.NoError(t, captured.Close())
			require.NoError(t, h.Close())
			require.LessOrEqual(t, countFDs(t), open, "file descriptors leak")
		})
	}
}

// A process of another pod's may be moved into the cgroup, by an agent that runs as root.
func TestAwaitPassesOverWhatIsNotTheShims(t *testing.T) {
	requireRoot(t)
	for name, flags := range map[string]uintptr{"host users": unix.CLONE_NEWNET, "userns": unix.CLONE_NEWUSER | unix.CLONE_NEWNET} {
		t.Run(name, func(t *testing.T) {
			p, other := startPod(t, shimOptions{Flags: flags}), startPod(t, shimOptions{Flags: flags})
			other.join(t, p)
			h, err := Await(t.Context(), p.expect(), func() ([]int, error) { return []int{other.pid, p.pid}, nil })
			require.NoError(t, err)
			require.Equal(t, p.netnsInode(t), h.Inode())
			require.NoError(t, h.Close())
		})
	}
}

func TestAwaitPassesOver(t *testing.T) {
	requireRoot(t)
	p, other := startPod(t, shimOptions{Flags: unix.CLONE_NEWNET}), startPod(t, shimOptions{Flags: unix.CLONE_NEWNET})
	gone := startPod(t, shimOptions{Flags: unix.CLONE_NEWNET})
	gone.kill(t)
	h, err := Await(t.Context(), p.expect(), func() ([]int, error) { return []int{os.Getpid(), gone.pid, other.pid, p.pid}, nil })
	require.NoError(t, err)
	require.Equal(t, p.netnsInode(t), h.Inode(), "not that of another cgroup")
	require.NoError(t, h.Close())
}

func TestAwaitEnds(t *testing.T) {
	requireRoot(t)
	expect := Expect{Namespace: testNamespace, ID: "id", CgroupPath: "/pod/id"}
	none := func() ([]int, error) { return nil, nil }

	ctx, cancel := context.WithCancelCause(t.Context())
	made := errors.New("made")
	_, err := Await(ctx, expect, func() ([]int, error) { cancel(made); return nil, nil })
	require.ErrorIs(t, err, made)

	failed := errors.New("failed")
	_, err = Await(t.Context(), expect, func() ([]int, error) { return nil, failed })
	require.ErrorIs(t, err, failed)

	for name, change := range map[string]func(*Expect){
		"no namespace": func(e *Expect) { e.Namespace = "" },
		"no id":        func(e *Expect) { e.ID = "" },
		"no cgroup":    func(e *Expect) { e.CgroupPath = "" },
		"no gids":      func(e *Expect) { e.UIDs = podIDs() },
	} {
		incomplete := expect
		change(&incomplete)
		_, err := Await(t.Context(), incomplete, none)
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", name, err)
	}
}
