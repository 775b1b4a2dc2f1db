package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

// floor is the minimum for a pod with a pause process and a CNI network:
//
//	start:  make cgroups -> clone pause into them, with its namespaces and id maps; exec -> CNI ADD, plugin by plugin
//	stop:   kill pause, reap it -> CNI DEL, plugin by plugin
//	                            -> remove the cgroups
//
// It has no daemon, shim, OCI runtime, record, image or sync.
type floor struct {
	node  *harness.Node // without a running daemon
	group cgroup
	pods  podCgroups
	pause string
	chain *libcni.NetworkConfigList
	count atomic.Int64
}

func newFloor(ctx context.Context) (_ *floor, err error) {
	n, err := harness.NewNode(ctx, harness.Config{Daemon: harness.Stock})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close(context.WithoutCancel(ctx)))
		}
	}()
	if err := n.Stop(ctx); err != nil {
		return nil, err
	}
	f := &floor{node: n}
	if f.group, err = newCgroup(n); err != nil {
		return nil, err
	}
	if f.pods, err = newPodCgroups(n); err != nil {
		return nil, err
	}
	if f.chain, err = libcni.NetworkConfFromFile(filepath.Join(n.CNIConfDir(), "10-pods.conflist")); err != nil {
		return nil, err
	}
	// A copy: the ids of a pod may not be able to traverse to the build folder.
	program, err := os.ReadFile(n.Program("pause"))
	if err != nil {
		return nil, err
	}
	f.pause = filepath.Join(n.Dir(), "pause")
	return f, os.WriteFile(f.pause, program, 0o755)
}

// bare is a pod of the floor.
type bare struct {
	floor   *floor
	kind    kind
	number  int
	id      string
	netns   string // where its network namespace is pinned
	cgroups []string
	pause   *exec.Cmd
	network *libcni.RuntimeConf
}

// newLife prepares what is not measured: the file on which the network namespace is pinned.
func (f *floor) newLife(_ context.Context, k kind) (life, error) {
	n := int(f.count.Add(1))
	b := &bare{floor: f, kind: k, number: n, id: fmt.Sprint("floor-", n)}
	b.netns = filepath.Join(f.node.Dir(), "state", b.id)
	b.network = &libcni.RuntimeConf{ContainerID: b.id, NetNS: b.netns, IfName: "eth0"}
	return b, os.WriteFile(b.netns, nil, 0o644)
}

func (b *bare) start(ctx context.Context) (float64, error) {
	return timed(func() error {
		if err := b.clone(); err != nil {
			return err
		}
		pid := b.pause.Process.Pid
		if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/net", pid), b.netns, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("failed to pin the network namespace of %s: %w", b.id, err)
		}
		return b.floor.inside(func() error {
			_, err := b.cni().AddNetworkList(ctx, b.floor.chain, b.network)
			return err
		})
	})
}

// clone starts pause in its namespaces and cgroups.
func (b *bare) clone() (err error) {
	if b.cgroups, err = b.floor.pods.make(b.id); err != nil {
		return err
	}
	b.pause = exec.Command(b.floor.pause)
	b.pause.Env = []string{}
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWNET}
	if b.kind.userns {
		const length = 65536
		ids := []syscall.SysProcIDMap{{HostID: (1 + b.number%60000) * length, Size: length}}
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings, attr.GidMappings, attr.GidMappingsEnableSetgroups = ids, ids, true
		attr.Credential = &syscall.Credential{} // root, of the ids above
	}
	b.pause.SysProcAttr = attr
	return b.floor.node.Inside(func() error { return b.floor.pods.start(b.pause, b.cgroups) })
}

func (b *bare) stop(ctx context.Context) (float64, error) {
	return timed(func() error {
		if err := b.pause.Process.Kill(); err != nil {
			return err
		}
		if err := b.pause.Wait(); !errors.As(err, new(*exec.ExitError)) {
			return fmt.Errorf("pause of %s was not killed: %w", b.id, err)
		}
		both, ctx := errgroup.WithContext(ctx)
		both.Go(func() error {
			return b.floor.inside(func() error { return b.cni().DelNetworkList(ctx, b.floor.chain, b.network) })
		})
		both.Go(func() error { return removeCgroups(b.cgroups) })
		if err := both.Wait(); err != nil {
			return err
		}
		return unix.Unmount(b.netns, unix.MNT_DETACH)
	})
}

// remove has nothing to do: a stopped pod of the floor leaves nothing.
func (b *bare) remove(context.Context) (float64, error) { return 0, os.Remove(b.netns) }

func (b *bare) cni() *libcni.CNIConfig {
	dir := b.floor.node.Dir()
	return libcni.NewCNIConfigWithCacheDir([]string{filepath.Join(dir, "cni/bin")}, filepath.Join(dir, "cni/cache"), nil)
}

// inside runs f where CNI plugins run: in the network namespace of the node, and in the measured
// cgroup.
func (f *floor) inside(run func() error) error {
	return f.node.Inside(func() error {
		if err := f.group.addThread(); err != nil {
			return err
		}
		return run()
	})
}
