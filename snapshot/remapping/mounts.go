package remapping

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// adapt changes the mounts of a snapshot for the layer below it, or for an empty snapshot. Other
// mounts stay as containerd's overlayfs made them.
func (b *backend) adapt(ctx context.Context, key string, mounts []mount.Mount) ([]mount.Mount, error) {
	from, err := b.lineage(ctx, key)
	if err != nil || !from.remapped && !from.scratch {
		return mounts, err
	}
	for i := range mounts {
		// The owners are on disk: in the layer, or in the directory of an empty snapshot.
		options := slices.DeleteFunc(mounts[i].Options, hasKey("uidmap", "gidmap"))
		if from.remapped && from.layer.strategy == Metacopy && mounts[i].Type == "overlay" {
			// Without it the kernel refuses to open what has no content.
			options = append(slices.DeleteFunc(options, hasKey("metacopy", "redirect_dir")), "metacopy=on")
		}
		mounts[i].Options = options
	}
	return mounts, nil
}

func hasKey(keys ...string) func(option string) bool {
	return func(option string) bool {
		key, _, _ := strings.Cut(option, "=")
		return slices.Contains(keys, key)
	}
}

// openOverlay mounts an overlay and opens its root. The options name directories below dir. The
// mount is in a mount namespace of its own, so no other process sees it. It ends with its last
// descriptor, even if this process is killed.
func openOverlay(dir string, options []string) (root *os.File, err error) {
	err = InMountNamespace(func() error {
		if err := unix.Chdir(dir); err != nil {
			return &os.PathError{Op: "chdir", Path: dir, Err: err}
		}
		if err := mountOverlay(dir, options); err != nil {
			return err
		}
		if root, err = os.Open(dir); err != nil { // the root of the overlay, which is mounted over dir
			return err
		}
		return unix.Unmount(dir, unix.MNT_DETACH)
	})
	return root, err
}

// mountOverlay mounts an overlay over a directory. Before Linux 5.10, which lacks volatile, it
// mounts without that option; the result is the same, but slower.
func mountOverlay(target string, options []string) error {
	err := unix.Mount("overlay", target, "overlay", 0, strings.Join(options, ","))
	if errors.Is(err, unix.EINVAL) && slices.Contains(options, "volatile") {
		options = slices.DeleteFunc(slices.Clone(options), hasKey("volatile"))
		err = unix.Mount("overlay", target, "overlay", 0, strings.Join(options, ","))
	}
	if err != nil {
		return &os.PathError{Op: "mount overlay (" + strings.Join(options, ",") + ") on", Path: filepath.Clean(target), Err: err}
	}
	return nil
}

// InMountNamespace runs f on a thread with its own mount namespace and working directory. The
// namespace ends with f, also after a kill, and no other process sees its mounts.
func InMountNamespace(f func() error) error {
	return host.OnLastThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("failed to make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("failed to make the mounts private: %w", err)
		}
		return f()
	})
}
