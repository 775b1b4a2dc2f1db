package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Overlays tells what overlay mounts can do whose layers are in a directory. Both methods fail with the kernel's error where they can't.
type Overlays interface {
	// IDMap has layers shown under other ids.
	IDMap(dir string) error
	// Metacopy has owners changed without a copy of the content.
	Metacopy(dir string) error
}

const (
	// tryID is the host id that tries map root to. It is below those that pods may have, so that nobody takes a try for one.
	tryID = 65533
	// tryMap is that id map in containerd's form.
	tryMap = "0:65533:1"
	// tryDir begins the name of the directory that a try is made in; the process's id follows.
	tryDir = ".podfsm-doctor-"
)

// overlays tries both on the filesystem of each snapshotter.
func overlays(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.overlaysIn(group[Snapshotter]{of: Snapshotter{Root: n.Root, RemapIDs: true}})
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) Snapshotter { return h.Snapshotter }, equal) {
		if !g.of.Loaded || g.of.Root == "" {
			continue // the check of snapshotters tells
		}
		found = append(found, n.overlaysIn(g)...)
	}
	if len(found) == 0 {
		found = []Finding{unknown("no snapshotter of podfsm's handlers tells where its directory is", "see the check snapshotter")}
	}
	return found
}

func (n Node) overlaysIn(g group[Snapshotter]) []Finding {
	if _, err := os.Stat(g.of.Root); err != nil {
		return []Finding{unknown(err.Error(), "start containerd, which makes the directory")}
	}
	idmap, metacopy := n.Overlays.IDMap(g.of.Root), n.Overlays.Metacopy(g.of.Root)
	mapped, copied := ok("idmapped overlay mounts work in "+g.of.Root), ok("metacopy works in "+g.of.Root)
	if idmap != nil {
		mapped = warn(fmt.Sprintf("no idmapped overlay mounts in %s: %v", g.of.Root, idmap),
			"put the directory on ext4, xfs or btrfs, with Linux 5.19 or later")
		if g.of.RemapIDs && g.of.Name != ownSnapshotter {
			mapped.Verdict, mapped.Stops, mapped.Handlers = Fail, UserNSPods, g.handlers
		}
	}
	if metacopy != nil {
		copied.Evidence = fmt.Sprintf("no metacopy in %s: %v", g.of.Root, metacopy)
		if idmap != nil {
			copied = warn(copied.Evidence, "mount the filesystem with extended attributes, and boot a kernel with CONFIG_OVERLAY_FS_METACOPY's feature, Linux 4.19 or later")
		} else {
			copied.Evidence += "; not needed, as idmapped mounts work"
		}
	}
	mapped.Subject, copied.Subject = "idmap", "metacopy"
	return []Finding{mapped, copied}
}

// ownSnapshotter is podfsm's, which needs no idmapped mounts.
const ownSnapshotter = "podfsm"

// KernelOverlays tries it: with a small overlay in a directory of its own, mounted in a mount namespace that ends with the try.
type KernelOverlays struct{}

// IDMap implements [Overlays], in the way of containerd's mounts: the lower layer is mapped.
func (KernelOverlays) IDMap(dir string) error {
	users, err := mount.GetUsernsFD(tryMap, tryMap)
	if err != nil {
		return fmt.Errorf("failed to make a user namespace: %w", err)
	}
	defer users.Close()
	return tryOverlay(dir, func(t overlayTry) error {
		if err := mount.IDMapMountWithAttrs(t.path("lower"), t.path("mapped"), int(users.Fd()), unix.MOUNT_ATTR_RDONLY, 0); err != nil {
			return err
		}
		if err := t.mount("lowerdir=" + t.path("mapped")); err != nil {
			return err
		}
		var stat unix.Stat_t
		if err := unix.Lstat(t.path("merged/file"), &stat); err != nil {
			return err
		}
		if stat.Uid != tryID || stat.Gid != tryID {
			return fmt.Errorf("a file of root's is %d:%d's instead of %d:%d's", stat.Uid, stat.Gid, tryID, tryID)
		}
		return nil
	})
}

// Metacopy implements [Overlays].
func (KernelOverlays) Metacopy(dir string) error {
	return tryOverlay(dir, func(t overlayTry) error {
		if err := t.mount("lowerdir=" + t.path("lower") + ",index=on,metacopy=on"); err != nil {
			return err
		}
		if err := os.Lchown(t.path("merged/file"), tryID, tryID); err != nil {
			return err
		}
		if _, err := unix.Lgetxattr(t.path("upper/file"), "trusted.overlay.metacopy", nil); err != nil {
			return fmt.Errorf("a change of owner has copied the file: %w", err)
		}
		return nil
	})
}

// overlayTry is the directory of a try.
type overlayTry string

func (t overlayTry) path(name string) string { return filepath.Join(string(t), name) }

// mount mounts the overlay on merged.
func (t overlayTry) mount(options string) error {
	options += ",upperdir=" + t.path("upper") + ",workdir=" + t.path("work")
	if err := unix.Mount("overlay", t.path("merged"), "overlay", 0, options); err != nil {
		return fmt.Errorf("failed to mount an overlay: %w", err)
	}
	return nil
}

// tryOverlay runs try with the directories of an overlay below dir, in a mount namespace of its own: a kill leaves no mount, and the
// directories are removed by the next try.
func tryOverlay(dir string, try func(overlayTry) error) (err error) {
	if err := removeTries(dir); err != nil {
		return err
	}
	made, err := os.MkdirTemp(dir, fmt.Sprintf("%s%d-*", tryDir, os.Getpid()))
	if err != nil {
		return fmt.Errorf("failed to make a directory in %s: %w", dir, errors.Unwrap(err))
	}
	defer func() { err = nameless(errors.Join(err, os.RemoveAll(made)), made) }()
	t := overlayTry(made)
	for _, name := range []string{"lower", "mapped", "upper", "work", "merged"} {
		if err := os.Mkdir(t.path(name), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(t.path("lower/file"), bytes.Repeat([]byte("content\n"), 1024), 0o644); err != nil {
		return err
	}
	return inPrivateMounts(func() error { return try(t) })
}

// nameless is err without the random name of a try's directory: what is said of a node is the same each time.
func nameless(err error, made string) error {
	if err == nil {
		return nil
	}
	return errors.New(strings.ReplaceAll(err.Error(), made, filepath.Join(filepath.Dir(made), tryDir+"PID")))
}

// removeTries removes the directories of processes that were killed in a try.
func removeTries(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), tryDir)
		pid, _, _ := strings.Cut(rest, "-")
		if _, err := os.Stat("/proc/" + pid); !ours || err == nil {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// inPrivateMounts runs f in a mount namespace of its own, which goes with it. It never uses the process's main thread, whose namespaces
// are those that /proc shows of the whole process, and which doesn't end before that.
func inPrivateMounts(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			result <- inPrivateMounts(f) // on another thread, while this goroutine has the main one
			runtime.UnlockOSThread()
			return
		}
		result <- func() error { // the thread stays locked, and so ends
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("failed to make a mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("failed to make the mounts private: %w", err)
			}
			return f()
		}()
	}()
	return <-result
}
