package pause

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// MountRootfs mounts the root filesystem of a sandbox and returns it as a mount that is attached nowhere, without setuid programs and
// devices, and with an SELinux label unless that is empty. The caller closes it. Nothing stays mounted on the host; what a kill leaves
// there goes with [Files.Remove].
func (f Files) MountRootfs(id string, mounts []mount.Mount, label string) (_ *os.File, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("failed to mount the root filesystem of sandbox %q: %w", id, err)
		}
	}()
	if err := validateID(id); err != nil {
		return nil, err
	}
	dir := f.rootfs(id)
	if err := unmountTrees([]string{dir}); err != nil { // of a daemon that was killed
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	rootfs, err := attach(labelled(mounts, label), dir)
	if err != nil {
		return nil, errors.Join(err, unmountTrees([]string{dir}), os.Remove(dir)) // the first of several may be mounted
	}
	if err := errors.Join(detach(dir), os.Remove(dir)); err != nil {
		return nil, errors.Join(err, rootfs.Close())
	}
	return rootfs, nil
}

func attach(mounts []mount.Mount, dir string) (*os.File, error) {
	if len(mounts) == 0 {
		return nil, fmt.Errorf("the snapshot has no mounts: %w", errdefs.ErrInvalidArgument)
	}
	if err := mount.All(mounts, dir); err != nil {
		return nil, err
	}
	return detached(dir, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
}

// labelled are mounts with an SELinux label, as containerd's client mounts the snapshot of a container.
func labelled(mounts []mount.Mount, label string) []mount.Mount {
	mounts = slices.Clone(mounts)
	for i := range mounts {
		if label != "" {
			mounts[i].Options = append(slices.Clone(mounts[i].Options), fmt.Sprintf("context=%q", label))
		}
	}
	return mounts
}

// detached returns a copy of the mount at path, or of the tree below it where that is no mount, that is attached nowhere (open_tree(2),
// Linux 5.2, and mount_setattr(2), Linux 5.12).
func detached(path string, attributes uint64) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("failed to copy the mount of %q: %w", path, err)
	}
	tree := os.NewFile(uintptr(fd), path)
	attr := &unix.MountAttr{Attr_set: attributes, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return nil, errors.Join(fmt.Errorf("failed to change the mount of %q: %w", path, err), tree.Close())
	}
	return tree, nil
}

// openBinds opens the sources of the bind mounts, in their order. On an error it returns those that it has opened, too.
func openBinds(mounts []specs.Mount) (files []*os.File, err error) {
	for _, m := range mounts {
		if m.Type != "bind" {
			continue
		}
		var attributes uint64
		for _, option := range m.Options {
			attributes |= bindAttributes[option]
		}
		file, err := detached(m.Source, attributes)
		if err != nil {
			return files, err
		}
		files = append(files, file)
	}
	return files, nil
}

// bindAttributes are the mount options of [bindMount] as mount_setattr(2) has them.
var bindAttributes = map[string]uint64{
	"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
}
