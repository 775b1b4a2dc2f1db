package pause

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// MountRootfs mounts the root filesystem of a sandbox and returns it as a detached mount with nosuid and nodev, and
// with an SELinux label unless that is empty. The caller closes the mount. Nothing stays mounted on the host.
// [Files.Remove] removes what a kill leaves there.
//
// Mounts that ask for id mappings get those of the user namespace. userns may be nil if no mount asks.
func (f Files) MountRootfs(id string, mounts []mount.Mount, label string, userns *os.File) (rootfs *os.File, err error) {
	defer func() {
		if err != nil {
			if rootfs != nil {
				rootfs.Close()
				rootfs = nil
			}
			err = fmt.Errorf("failed to mount the root filesystem of sandbox %q: %w", id, err)
		}
	}()
	if err := validateID(id); err != nil {
		return nil, err
	}
	if len(mounts) == 0 {
		return nil, fmt.Errorf("the snapshot has no mounts: %w", errdefs.ErrInvalidArgument)
	}
	dir := f.rootfs(id)
	if _, err := os.Lstat(dir); err == nil { // left by a daemon that was killed
		if err := removeTrees(dir); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var points mountPoints
	defer func() { err = errors.Join(err, points.remove(), os.Remove(dir)) }()
	if userns != nil {
		if mounts, err = idmapped(mounts, &points, dir, userns); err != nil {
			return nil, err
		}
	}
	target, err := points.add(dir)
	if err != nil {
		return nil, err
	}
	if err := mount.All(labelled(mounts, label), target); err != nil {
		return nil, err
	}
	return detached(target, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
}

// mountPoints are temporary directories.
type mountPoints []string

func (p *mountPoints) add(dir string) (string, error) {
	point := filepath.Join(dir, strconv.Itoa(len(*p)))
	if err := os.Mkdir(point, 0o700); err != nil {
		return "", err
	}
	*p = append(*p, point)
	return point, nil
}

// remove unmounts and removes the directories. It removes only empty ones, so it never deletes what is still
// mounted.
func (p mountPoints) remove() error {
	var failed []error
	for _, point := range slices.Backward(p) {
		for {
			err := detach(point)
			if errors.Is(err, unix.EINVAL) { // not mounted
				failed = append(failed, os.Remove(point))
				break
			}
			if err != nil {
				failed = append(failed, err)
				break
			}
		}
	}
	return errors.Join(failed...)
}

// idmapped returns the mounts, with the layers of each overlay that asks for id mappings replaced by idmapped mounts
// below dir. containerd would start a process per layer for its user namespace. idmapped uses the pod's.
func idmapped(mounts []mount.Mount, points *mountPoints, dir string, userns *os.File) ([]mount.Mount, error) {
	mapped := slices.Clone(mounts)
	for i, m := range mapped {
		if m.Type != "overlay" {
			continue
		}
		mapped[i].Options = nil
		maps, layers := false, ""
		for _, option := range m.Options {
			switch key, value, _ := strings.Cut(option, "="); key {
			case "uidmap", "gidmap":
				maps = true
				continue
			case "lowerdir":
				layers = value
				continue
			}
			mapped[i].Options = append(mapped[i].Options, option)
		}
		if !maps {
			mapped[i].Options = m.Options
			continue
		}
		var below []string
		for layer := range strings.SplitSeq(layers, ":") {
			target, err := points.add(dir)
			if err != nil {
				return nil, err
			}
			if err := mount.IDMapMountWithAttrs(layer, target, int(userns.Fd()), unix.MOUNT_ATTR_RDONLY, 0); err != nil {
				return nil, err
			}
			below = append(below, target)
		}
		mapped[i].Options = append(mapped[i].Options, "lowerdir="+strings.Join(below, ":"))
	}
	return mapped, nil
}

// labelled returns the mounts with an SELinux label, as containerd's client mounts a container's snapshot.
func labelled(mounts []mount.Mount, label string) []mount.Mount {
	mounts = slices.Clone(mounts)
	for i := range mounts {
		if label != "" {
			mounts[i].Options = append(slices.Clone(mounts[i].Options), fmt.Sprintf("context=%q", label))
		}
	}
	return mounts
}

// detached returns a detached copy of the mount at path, or of the tree below path if it is no mount (open_tree(2),
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

// openBinds opens the sources of the bind mounts, in their order. The caller closes them, also after an error.
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

// bindAttributes has the mount_setattr(2) attributes of [bindMount]'s options.
var bindAttributes = map[string]uint64{
	"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
}
