package remapping

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/snapshot/owners"
	"github.com/podfsm/podfsm/userns"
)

// Result is the result of the probe of one strategy in a directory.
type Result struct {
	Strategy Strategy
	Works    bool
	Evidence string // what was seen
	Remedy   string // "" if the strategy works
}

// Report holds a result per strategy, the cheapest strategy first.
type Report []Result

// Best returns the cheapest strategy that works. If none works, it returns a FailedPrecondition
// error with all evidence and remedies.
func (r Report) Best() (Strategy, error) {
	for _, v := range r {
		if v.Works {
			return v.Strategy, nil
		}
	}
	return "", r.refusal()
}

// check fails with FailedPrecondition if a strategy does not work.
func (r Report) check(strategy Strategy) error {
	for _, v := range r {
		if v.Strategy == strategy && v.Works {
			return nil
		}
		if v.Strategy == strategy {
			return Report{v}.refusal()
		}
	}
	return fmt.Errorf("strategy %q isn't one of auto, idmap, metacopy and chown: %w", strategy, errdefs.ErrFailedPrecondition)
}

func (r Report) refusal() error {
	var reasons []string
	for _, v := range r {
		reasons = append(reasons, fmt.Sprintf("%s doesn't work: %s; %s", v.Strategy, v.Evidence, v.Remedy))
	}
	return fmt.Errorf("failed to find a strategy to remap owners on this node: %s: %w", strings.Join(reasons, ". "), errdefs.ErrFailedPrecondition)
}

// probePattern is the pattern of names of probe directories.
const probePattern = "probe-*"

// Ids of the files in probes.
const (
	probeID = 0
	hostID  = userns.TryHostID
)

// Probe tries each strategy on its own files in a directory, which must be on the filesystem of the
// snapshots. It removes the files.
func Probe(ctx context.Context, dir string) (Report, error) {
	var report Report
	for _, try := range []struct {
		strategy Strategy
		try      func(ctx context.Context, strategy Strategy, dir string) (string, error)
		remedy   string
	}{
		{IDMap, tryIDMap, "it needs Linux 5.19 or later, and a filesystem whose ids the kernel maps, such as ext4, xfs or btrfs"},
		{Metacopy, tryLayer, "it needs Linux 4.19 or later with overlayfs, and a filesystem with extended attributes and file handles, such as ext4, xfs or btrfs"},
		{Chown, tryLayer, "it needs overlayfs, and a filesystem with extended attributes and file handles, such as ext4, xfs or btrfs"},
	} {
		probe, err := os.MkdirTemp(dir, probePattern)
		if err != nil {
			return nil, fmt.Errorf("failed to make a directory to probe strategies in: %w", err)
		}
		v := Result{Strategy: try.strategy, Works: true}
		v.Evidence, err = try.try(ctx, try.strategy, probe)
		if transient(err) {
			return nil, errors.Join(fmt.Errorf("failed to probe strategy %q: %w", try.strategy, err), os.RemoveAll(probe))
		}
		if err != nil {
			v.Works, v.Evidence, v.Remedy = false, err.Error(), try.remedy
		}
		if err := os.RemoveAll(probe); err != nil {
			return nil, fmt.Errorf("failed to remove the files of a probe: %w", err)
		}
		report = append(report, v)
	}
	return report, nil
}

// transient reports whether an error tells about the moment, not about the capabilities of the
// node.
func transient(err error) bool {
	return slices.ContainsFunc([]error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN, unix.EINTR}, func(one error) bool { return errors.Is(err, one) })
}

// strategy returns the strategy to use on this node. The capabilities of the node are probed once.
func (s *Snapshotter) strategy(ctx context.Context, b *backend) (Strategy, error) {
	s.probing.Lock()
	defer s.probing.Unlock()
	if s.probed != "" {
		return s.probed, nil
	}
	report, err := Probe(context.WithoutCancel(ctx), b.root) // shared by all callers, and takes milliseconds
	if err != nil {
		return "", err
	}
	strategy := s.config.Strategy
	if strategy == "" || strategy == auto {
		strategy, err = report.Best()
	} else {
		err = report.check(strategy)
	}
	if err != nil {
		return "", err
	}
	log.G(ctx).WithFields(log.Fields{"strategy": strategy, "configured": s.config.Strategy, "report": report}).
		Info("chose the strategy to remap the owners of images")
	s.probed = strategy
	return strategy, nil
}

// makeDirs makes the directories of an overlay, with a hard-linked file in the lower one.
func makeDirs(dir string) error {
	for _, name := range []string{"lower", "upper", "work", "merged", "mapped"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	file := filepath.Join(dir, "lower/a")
	if err := os.WriteFile(file, []byte(strings.Repeat("content ", 1024)), 0o644); err != nil {
		return err
	}
	return os.Link(file, filepath.Join(dir, "lower/b"))
}

// tryIDMap mounts an overlay on an idmapped layer.
func tryIDMap(_ context.Context, _ Strategy, dir string) (evidence string, err error) {
	if err := makeDirs(dir); err != nil {
		return "", err
	}
	text := fmt.Sprintf("%d:%d:%d", probeID, hostID, 1)
	users, err := mount.GetUsernsFD(text, text)
	if err != nil {
		return "", fmt.Errorf("failed to make a user namespace: %w", err)
	}
	defer users.Close()
	err = InMountNamespace(func() error {
		mapped := filepath.Join(dir, "mapped")
		err := mount.IDMapMountWithAttrs(filepath.Join(dir, "lower"), mapped, int(users.Fd()), unix.MOUNT_ATTR_RDONLY, 0)
		if err != nil {
			return fmt.Errorf("failed to map the ids of the filesystem of %s: %w", dir, err)
		}
		merged := filepath.Join(dir, "merged")
		options := []string{"index=off", "lowerdir=" + mapped, "upperdir=" + filepath.Join(dir, "upper"), "workdir=" + filepath.Join(dir, "work")}
		if err := mountOverlay(merged, options); err != nil {
			return err
		}
		stat, err := statOf(filepath.Join(merged, "a"))
		if err == nil && stat.Uid != hostID {
			err = fmt.Errorf("a file of uid %d is shown as of uid %d instead of %d", probeID, stat.Uid, hostID)
		}
		return errors.Join(err, unix.Unmount(merged, unix.MNT_DETACH), unix.Unmount(mapped, unix.MNT_DETACH))
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("overlayfs on a mapped layer shows a file of uid %d as of uid %d", probeID, hostID), nil
}

// tryLayer makes a layer as for an image, and reads the files through it.
func tryLayer(ctx context.Context, strategy Strategy, dir string) (evidence string, err error) {
	if err := makeDirs(dir); err != nil {
		return "", err
	}
	extents := []specs.LinuxIDMapping{{ContainerID: probeID, HostID: hostID, Size: 1}}
	l := layer{strategy: strategy, maps: owners.Map{UIDs: extents, GIDs: extents}}
	upper := filepath.Join(dir, "upper")
	mounts := []mount.Mount{{Options: []string{
		"lowerdir=" + filepath.Join(dir, "lower"), "upperdir=" + upper, "workdir=" + filepath.Join(dir, "work"),
	}}}
	root, err := openOverlay(dir, remapOptions(dir, strategy, mounts))
	if err != nil {
		return "", err
	}
	_, err = owners.Shift(ctx, root, l.maps)
	if err := errors.Join(err, root.Close()); err != nil {
		return "", err
	}
	copied, err := statOf(filepath.Join(upper, "a"))
	if err != nil {
		return "", err
	}
	if strategy == Metacopy && copied.Blocks > 8 {
		return "", fmt.Errorf("overlayfs copies the content of a file when its owner changes, %d bytes", copied.Blocks*512)
	}
	if err := os.RemoveAll(filepath.Join(dir, "work")); err != nil {
		return "", err
	}
	return fmt.Sprintf("overlayfs has given a file and its hard link a new owner, with %d bytes for its %d", copied.Blocks*512, copied.Size),
		lookThrough(dir, strategy)
}

// lookThrough mounts a layer as for a pod.
func lookThrough(dir string, strategy Strategy) error {
	options := []string{"index=off", "lowerdir=upper:lower"}
	if strategy == Metacopy {
		options = append(options, "metacopy=on")
	}
	root, err := openOverlay(dir, options)
	if err != nil {
		return err
	}
	defer root.Close()
	files := fmt.Sprintf("/proc/self/fd/%d/", root.Fd())
	a, err := statOf(files + "a")
	if err != nil {
		return err
	}
	b, err := statOf(files + "b")
	if err != nil {
		return err
	}
	content, err := os.ReadFile(files + "a")
	if err != nil {
		return err
	}
	if a.Uid != hostID || a.Ino != b.Ino || !strings.HasPrefix(string(content), "content ") {
		return fmt.Errorf("a hard linked file of uid %d is seen as two (inodes %d and %d) of uid %d with %d bytes of content",
			probeID, a.Ino, b.Ino, a.Uid, len(content))
	}
	return nil
}

func statOf(file string) (*syscall.Stat_t, error) {
	info, err := os.Lstat(file)
	if err != nil {
		return nil, err
	}
	return info.Sys().(*syscall.Stat_t), nil
}
