package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Strategy is a way in which files get the owners of a user namespace, and whether it works.
type Strategy struct {
	Name     string // as "idmap" or "metacopy"
	Works    bool
	Evidence string // what was seen
	Remedy   string // what would make it work; "" where it does
}

const (
	// tryID is the host id that tries map root to. It is below those that pods may have, so that nobody takes a try for one.
	tryID = 65533
	// tryMap is that id map in containerd's form.
	tryMap = "0:65533:1"
	// tryDir begins the name of the directory that a try is made in; the process's id follows.
	tryDir = ".podfsm-doctor-"
)

// overlays tries the strategies on the filesystem of each snapshotter.
func overlays(ctx context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.overlaysIn(ctx, group[Snapshotter]{of: Snapshotter{Root: n.Root, RemapIDs: true}})
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) Snapshotter { return h.Snapshotter }, equal) {
		if g.of.Loaded && g.of.Root != "" { // else the check of snapshotters tells
			found = append(found, n.overlaysIn(ctx, g)...)
		}
	}
	if len(found) == 0 {
		found = []Finding{unknown("no snapshotter of podfsm's handlers tells where its directory is", "see the check snapshotter")}
	}
	return found
}

// ownSnapshotter is podfsm's, for which any strategy will do.
const ownSnapshotter = "podfsm"

// overlaysIn has a finding for each strategy: a failure where it is the one that the snapshotter needs, a warning where none works, else
// none is missed.
func (n Node) overlaysIn(ctx context.Context, g group[Snapshotter]) (found []Finding) {
	dir := g.of.Root
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		dir = n.Root // as with a snapshotter that nobody has used yet
	}
	strategies, err := n.Strategies(ctx, dir)
	if err != nil {
		return []Finding{unknown(err.Error(), "see that the directory is there and can be written")}
	}
	working := slices.ContainsFunc(strategies, func(s Strategy) bool { return s.Works })
	for _, s := range strategies {
		f := ok(fmt.Sprintf("%s in %s", s.Evidence, dir))
		switch needed := s.Name == StrategyIDMap && g.of.RemapIDs && g.of.Name != ownSnapshotter; {
		case s.Works:
		case needed || !working && g.of.Name == ownSnapshotter:
			f = fail(UserNSPods, f.Evidence, s.Remedy)
			f.Handlers = g.handlers
		case !working || s.Name == StrategyIDMap:
			f = warn(f.Evidence, s.Remedy)
		default:
			f.Evidence += "; not needed, as another way works"
		}
		f.Subject = s.Name
		found = append(found, f)
	}
	return found
}

// StrategyIDMap is the strategy that containerd's own snapshotters need.
const StrategyIDMap = "idmap"

// TryStrategies tries idmapped layers, and copies of the metadata alone, with a small overlay in a directory below dir, mounted in a mount
// namespace that ends with the try.
func TryStrategies(_ context.Context, dir string) ([]Strategy, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	var strategies []Strategy
	for _, s := range []struct {
		name, works, remedy string
		try                 func(dir string) error
	}{
		{StrategyIDMap, "idmapped overlay mounts work", "put the directory on ext4, xfs or btrfs, with Linux 5.19 or later", tryIDMap},
		{"metacopy", "overlay mounts copy metadata alone", "put the directory on a filesystem with extended attributes, such as ext4, xfs or btrfs", tryMetacopy},
	} {
		strategy := Strategy{Name: s.name, Works: true, Evidence: s.works}
		if err := s.try(dir); err != nil {
			strategy = Strategy{Name: s.name, Evidence: err.Error(), Remedy: s.remedy}
		}
		strategies = append(strategies, strategy)
	}
	return strategies, nil
}

// tryIDMap has a layer shown under other ids, in the way of containerd's mounts.
func tryIDMap(dir string) error {
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

// tryMetacopy has the owner of a file changed without a copy of its content.
func tryMetacopy(dir string) error {
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
