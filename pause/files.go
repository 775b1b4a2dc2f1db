package pause

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	hostShm        = "/dev/shm"
	hostHosts      = "/etc/hosts"
	hostResolvConf = "/etc/resolv.conf"

	// shmOptions are of tmpfs(5); the size is 64 MiB.
	shmOptions = "mode=1777,size=67108864"
	shmFlags   = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

	// A mount or a directory is busy for moments, or stays busy.
	busyTries = 10
	busyDelay = 50 * time.Millisecond
)

// Files are the files and directories of sandboxes that containerd's CRI service
// mounts into their containers, at the places where it looks for them.
//
// Its methods are safe for concurrent use on different sandboxes.
type Files struct {
	// RootDir holds sandboxes/ID/{hostname,hosts,resolv.conf}.
	RootDir string

	// StateDir holds sandboxes/ID/shm, a tmpfs.
	StateDir string
}

// Setup makes a sandbox's files, over what an earlier try left. Pods in the
// node's IPC namespace get no shm of their own.
//
// An id that is not a plain name is an InvalidArgument error.
func (f Files) Setup(id string, config *runtime.PodSandboxConfig) error {
	if err := f.setup(id, config); err != nil {
		return fmt.Errorf("failed to set up the files of sandbox %q: %w", id, err)
	}
	return nil
}

// Remove deletes all that Setup made, and unmounts what is mounted below. It
// succeeds when there is nothing to remove. ctx bounds the wait for busy
// directories, half a second at most.
//
// An id that is not a plain name is an InvalidArgument error.
func (f Files) Remove(ctx context.Context, id string) error {
	if err := validateID(id); err != nil {
		return fmt.Errorf("failed to remove the files of sandbox %q: %w", id, err)
	}
	err := retryBusy(ctx, func() error {
		return removeTrees(f.stateDir(id), f.rootDir(id))
	})
	if err != nil {
		return fmt.Errorf("failed to remove the files of sandbox %q: %w", id, err)
	}
	return nil
}

// Exist says whether anything of what Setup made is there.
//
// An id that is not a plain name is an InvalidArgument error.
func (f Files) Exist(id string) (bool, error) {
	if err := validateID(id); err != nil {
		return false, fmt.Errorf("failed to find the files of sandbox %q: %w", id, err)
	}
	for _, dir := range []string{f.stateDir(id), f.rootDir(id)} {
		_, err := os.Lstat(dir)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("failed to find the files of sandbox %q: %w", id, err)
		}
	}
	return false, nil
}

// UnmountShm unmounts the pod's shm, with what is mounted below it. Containers
// that have it mounted keep it. It succeeds when nothing is mounted.
//
// An id that is not a plain name is an InvalidArgument error.
func (f Files) UnmountShm(id string) error {
	if err := f.unmountShm(id); err != nil {
		return fmt.Errorf("failed to unmount the shm of sandbox %q: %w", id, err)
	}
	return nil
}

// List returns the names of the sandboxes that have a directory, each once, in
// order.
func (f Files) List() ([]string, error) {
	var ids []string
	for _, dir := range []string{f.RootDir, f.StateDir} {
		below, err := subdirs(filepath.Join(dir, "sandboxes"))
		if err != nil {
			return nil, fmt.Errorf("failed to list the files of sandboxes: %w", err)
		}
		ids = append(ids, below...)
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// subdirs returns the names of the directories in dir, none if it does not exist.
func subdirs(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if entry.IsDir() {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

func (f Files) rootDir(id string) string    { return filepath.Join(f.RootDir, "sandboxes", id) }
func (f Files) stateDir(id string) string   { return filepath.Join(f.StateDir, "sandboxes", id) }
func (f Files) hostname(id string) string   { return filepath.Join(f.rootDir(id), "hostname") }
func (f Files) hosts(id string) string      { return filepath.Join(f.rootDir(id), "hosts") }
func (f Files) resolvConf(id string) string { return filepath.Join(f.rootDir(id), "resolv.conf") }
func (f Files) shm(id string) string        { return filepath.Join(f.stateDir(id), "shm") }
func (f Files) rootfs(id string) string     { return filepath.Join(f.stateDir(id), "rootfs") }

// validateID refuses ids that lead out of a directory, as "../x" does.
func validateID(id string) error {
	if err := identifiers.Validate(id); err != nil {
		return fmt.Errorf("invalid sandbox id: %w", err)
	}
	return nil
}

func (f Files) setup(id string, config *runtime.PodSandboxConfig) error {
	if err := validateID(id); err != nil {
		return err
	}
	for _, dir := range []string{f.rootDir(id), f.stateDir(id)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := writeHostname(f.hostname(id), config.GetHostname()); err != nil {
		return err
	}
	if err := copyFile(f.hosts(id), hostHosts); err != nil {
		return err
	}
	if err := writeResolvConf(f.resolvConf(id), config.GetDnsConfig()); err != nil {
		return err
	}
	if config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == runtime.NamespaceMode_NODE {
		return checkHostShm()
	}
	return mountShm(f.shm(id))
}

// writeHostname writes the node's name for a pod that has none of its own.
func writeHostname(file, hostname string) error {
	if hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return err
		}
	}
	return os.WriteFile(file, []byte(hostname+"\n"), 0o644)
}

// writeResolvConf copies the node's configuration for a pod without one.
func writeResolvConf(file string, dns *runtime.DNSConfig) error {
	if dns == nil {
		return copyFile(file, hostResolvConf)
	}
	var text strings.Builder
	if searches := dns.GetSearches(); len(searches) > 0 {
		fmt.Fprintf(&text, "search %s\n", strings.Join(searches, " "))
	}
	for _, server := range dns.GetServers() {
		fmt.Fprintf(&text, "nameserver %s\n", server)
	}
	if options := dns.GetOptions(); len(options) > 0 {
		fmt.Fprintf(&text, "options %s\n", strings.Join(options, " "))
	}
	return os.WriteFile(file, []byte(text.String()), 0o644)
}

func copyFile(destination, source string) error {
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	return os.WriteFile(destination, content, 0o644)
}

func checkHostShm() error {
	if _, err := os.Stat(hostShm); err != nil {
		return fmt.Errorf("pods in the node's IPC namespace need its shm: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func mountShm(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	mounted, err := isMounted(dir)
	if err != nil || mounted {
		return err
	}
	if err := unix.Mount("shm", dir, "tmpfs", shmFlags, shmOptions); err != nil {
		return fmt.Errorf("failed to mount tmpfs on %q: %w", dir, err)
	}
	return nil
}

func (f Files) unmountShm(id string) error {
	if err := validateID(id); err != nil {
		return err
	}
	for {
		mounted, err := isMounted(f.shm(id))
		if err != nil || !mounted {
			return err
		}
		if err := detach(f.shm(id)); err != nil {
			return err
		}
	}
}

// isMounted is false for a path that does not exist.
func isMounted(path string) (bool, error) {
	mounted, err := mountinfo.Mounted(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return mounted, err
}

// removeTrees removes directories with all they hold. It unmounts first. If an unmount fails,
// removeTrees removes nothing, because the files of the mount may belong to others.
func removeTrees(dirs ...string) error {
	if err := unmountTrees(dirs); err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// unmountTrees unmounts all that is mounted on and below the directories, and
// fails with EBUSY when something is mounted there afterwards.
func unmountTrees(dirs []string) error {
	if !slices.ContainsFunc(dirs, mayHoldMounts) {
		return nil
	}
	mounts, err := mountsBelow(dirs)
	if err != nil || len(mounts) == 0 {
		return err
	}
	for _, mount := range mounts {
		// EINVAL: it went along with a mount it shares a peer group with. ENOENT: another mount hides it.
		if err := detach(mount); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	mounts, err = mountsBelow(dirs)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("%q is still mounted: %w", mounts[0], unix.EBUSY)
	}
	return nil
}

// mayHoldMounts reports whether something is mounted on or below a directory, or may be. It is a
// cheap test before all mounts are listed, which is expensive on a full node. It looks at the files
// that removing the directory reads, and stops at the first mount, so it never reads files of a pod.
func mayHoldMounts(dir string) (may bool) {
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && !mayBeMount(path) {
			return nil
		}
		may = true
		return fs.SkipAll
	})
	return may
}

// mayBeMount is false if the kernel says that path is no mount point (Linux 5.8). It does not wait
// for a server of the filesystem.
func mayBeMount(path string) bool {
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, flags, 0, &stat)
	return err != nil || stat.Attributes_mask&^stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0
}

// listMounts lists all mounts of the node. Tests count its calls.
var listMounts = mountinfo.GetMounts

// mountsBelow returns the mount points on and below the directories, the deepest
// first. It returns a mount point once per mount on it.
func mountsBelow(dirs []string) ([]string, error) {
	var filters []mountinfo.FilterFunc
	for _, dir := range dirs {
		// The kernel lists mount points without symbolic links.
		resolved, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("failed to resolve %q: %w", dir, err)
		}
		filters = append(filters, mountinfo.PrefixFilter(resolved))
	}
	if len(filters) == 0 {
		return nil, nil
	}
	infos, err := listMounts(func(info *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(filters, func(filter mountinfo.FilterFunc) bool {
			other, _ := filter(info)
			return !other
		}), false
	})
	if err != nil {
		return nil, err
	}
	var mounts []string
	for _, info := range infos {
		mounts = append(mounts, info.Mountpoint)
	}
	slices.SortFunc(mounts, func(a, b string) int { return len(b) - len(a) })
	return mounts, nil
}

// detach unmounts lazily, with all that is mounted below, so that open files do
// not keep it from success (umount2(2), MNT_DETACH).
func detach(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("failed to unmount %q: %w", path, err)
	}
	return nil
}

// retryBusy retries f while it fails with EBUSY.
func retryBusy(ctx context.Context, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if !errors.Is(err, unix.EBUSY) || try == busyTries {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(busyDelay):
		}
	}
}
