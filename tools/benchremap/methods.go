package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/snapshot/remapping"
)

// cost is the cost of giving an image its owners once.
type cost struct {
	wall, cpu     time.Duration
	bytes, inodes int64 // on disk
}

// method is a way to give an image its owners, for one pod or for two pods in sequence.
type method struct {
	name    string
	pods    []string
	measure func(ctx context.Context, s site) ([]cost, error)
}

var methods = []method{
	{"`chown -R`", []string{""}, func(ctx context.Context, s site) ([]cost, error) { return s.chown(ctx) }},
	{"`chown -R`, metacopy", []string{""}, func(ctx context.Context, s site) ([]cost, error) {
		return s.chown(ctx, "index=on", "metacopy=on", "volatile") // like the snapshotter
	}},
	{"podfsm, idmap", twoPods, remap(remapping.IDMap)},
	{"podfsm, metacopy", twoPods, remap(remapping.Metacopy)},
	{"podfsm, chown", twoPods, remap(remapping.Chown)},
}

var twoPods = []string{", first pod", ", second pod"}

const (
	hostID = 1 << 20
	idMap  = "0:1048576:65536"
)

var labels = snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: idMap, snapshots.LabelSnapshotGIDMapping: idMap})

// site is the place of an image.
type site struct {
	root  string // of the snapshotter
	merge string // to mount on
	spare string // for what chown(1) writes
}

func newSite(dir string) (s site, err error) {
	s = site{root: filepath.Join(dir, "snapshotter"), merge: filepath.Join(dir, "merged"), spare: filepath.Join(dir, "spare")}
	for _, dir := range []string{s.root, s.merge} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return s, err
		}
	}
	return s, nil
}

// with opens the snapshotter.
func (s site) with(strategy remapping.Strategy, f func(*remapping.Snapshotter) error) (err error) {
	sn := remapping.New(remapping.Config{Root: s.root, Strategy: strategy})
	defer func() { err = errors.Join(err, sn.Close()) }()
	return f(sn)
}

// chown runs chown(1) on an overlay of the image's layers.
func (s site) chown(ctx context.Context, options ...string) (costs []cost, err error) {
	upper, work := filepath.Join(s.spare, "upper"), filepath.Join(s.spare, "work")
	for _, dir := range []string{upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(s.spare)) }()
	lower, err := s.lowerDirs(ctx)
	if err != nil {
		return nil, err
	}
	options = append(options, lower, "upperdir="+upper, "workdir="+work)
	var c cost
	err = mounted([]mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, s.merge, func(root string) error {
		c, err = timed(s.root, func() error {
			return exec.CommandContext(ctx, "chown", "-R", fmt.Sprintf("%d:%d", hostID, hostID), root).Run()
		})
		if err != nil {
			return err
		}
		return owned(root)
	})
	if err != nil {
		return nil, err
	}
	c.bytes, c.inodes, err = usage(ctx, upper)
	return []cost{c}, err
}

// lowerDirs returns the mount option for the layers of the image.
func (s site) lowerDirs(ctx context.Context) (option string, err error) {
	err = s.with(remapping.IDMap, func(sn *remapping.Snapshotter) error {
		mounts, err := sn.View(ctx, "layers", topLayer)
		if err != nil {
			return err
		}
		for _, o := range mounts[0].Options {
			if strings.HasPrefix(o, "lowerdir=") {
				option = o
			}
		}
		return sn.Remove(ctx, "layers")
	})
	return option, err
}

// remap makes snapshots with the same owners for two pods, one after the other.
func remap(strategy remapping.Strategy) func(context.Context, site) ([]cost, error) {
	return func(ctx context.Context, s site) (costs []cost, err error) {
		err = s.with(strategy, func(sn *remapping.Snapshotter) (err error) {
			if err := s.warmUp(ctx, sn); err != nil {
				return err
			}
			bytes, inodes, err := usage(ctx, s.root)
			if err != nil {
				return err
			}
			for n := range twoPods {
				c, err := s.pod(ctx, sn, fmt.Sprint("pod-", n), bytes, inodes)
				if err != nil {
					return err
				}
				costs = append(costs, c)
				bytes, inodes = bytes+c.bytes, inodes+c.inodes
			}
			return s.clear(ctx, sn, "pod-0", "pod-1")
		})
		return costs, err
	}
}

// warmUp lets the snapshotter probe the node, which a daemon does once.
func (s site) warmUp(ctx context.Context, sn *remapping.Snapshotter) error {
	if _, err := sn.Prepare(ctx, "warm-up", layerKey(0)+"-empty", labels); err != nil {
		return err
	}
	return s.clear(ctx, sn, "warm-up")
}

// pod prepares and mounts the snapshot of a pod, which stays afterwards.
func (s site) pod(ctx context.Context, sn *remapping.Snapshotter, key string, bytes, inodes int64) (c cost, err error) {
	c, err = timed(s.root, func() error {
		mounts, err := sn.Prepare(ctx, key, topLayer, labels)
		if err != nil {
			return err
		}
		return mount.All(mounts, s.merge)
	})
	if err != nil {
		return c, err
	}
	if err := errors.Join(owned(s.merge), mount.UnmountAll(s.merge, 0)); err != nil {
		return c, err
	}
	after, count, err := usage(ctx, s.root)
	c.bytes, c.inodes = after-bytes, count-inodes
	return c, err
}

// clear removes snapshots and what was made for them.
func (s site) clear(ctx context.Context, sn *remapping.Snapshotter, keys ...string) error {
	for _, key := range keys {
		if err := sn.Remove(ctx, key); err != nil {
			return err
		}
	}
	return sn.Cleanup(ctx)
}

// owned fails unless a mounted image has its owners.
func owned(root string) error {
	for _, name := range []string{".", "dir0", "dir0/file0"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			return err
		}
		if st.Uid != hostID || st.Gid != hostID {
			return fmt.Errorf("%q belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
	return nil
}

// timed calls f after a sync, so that earlier writes don't count for f.
func timed(dir string, f func() error) (c cost, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return c, err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return c, err
	}
	cpu, start := cpuTime(), time.Now()
	err = f()
	return cost{wall: time.Since(start), cpu: cpuTime() - cpu}, err
}

// cpuTime returns the CPU time of this process and its reaped children.
func cpuTime() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var usage unix.Rusage
		if err := unix.Getrusage(who, &usage); err != nil {
			panic(err) // it can't fail
		}
		sum += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	return sum
}

func usage(ctx context.Context, dir string) (bytes, inodes int64, err error) {
	u, err := fs.DiskUsage(ctx, dir)
	return u.Size, u.Inodes, err
}
