package remapping

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// adapt changes the mounts of a snapshot that the layer below it, or the lack of
// any, asks for. All others stay as containerd's overlayfs has made them.
func (b *backend) adapt(ctx context.Context, key string, mounts []mount.Mount) ([]mount.Mount, error) {
	from, err := b.lineage(ctx, key)
	if err != nil || !from.remapped && !from.scratch {
		return mounts, err
	}
	for i := range mounts {
		// The owners are on disk: a layer has them, and an empty snapshot's directory.
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

// openOverlay mounts an overlay and opens its root. The options name directories
// below dir. Nobody else ever sees the mount, as it is made in a mount namespace of
// its own; it ends with the last descriptor in it, also when this process is killed.
func openOverlay(dir string, options []string) (root *os.File, err error) {
	err = InMountNamespace(func() error {
		if err := unix.Chdir(dir); err != nil {
			return &os.PathError{Op: "chdir", Path: dir, Err: err}
		}
		if err := mountOverlay(dir, options); err != nil {
			return err
		}
		if root, err = os.Open(dir); err != nil { // the overlay: it covers what it is made of
			return err
		}
		return unix.Unmount(dir, unix.MNT_DETACH)
	})
	return root, err
}

// mountOverlay mounts an overlay over a directory. Linux has volatile since 5.10;
// without it all is the same, but slower.
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

// InMountNamespace runs f on a thread with mounts and a working directory of its
// own, which ends with f: what it mounts nobody else sees, and a kill leaves none of
// it.
func InMountNamespace(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread would stay, and show the process as in that namespace.
			done <- InMountNamespace(f)
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the thread ends with the goroutine.
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			done <- fmt.Errorf("failed to make a mount namespace: %w", err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			done <- fmt.Errorf("failed to make the mounts private: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
