package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/snapshot/remapping"
)

// networks checks the CNI configurations and their plugins.
func networks(ctx context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	same := func(a, b cni.Config) bool {
		return a.ConfDir == b.ConfDir && a.MaxConfNum == b.MaxConfNum && slices.Equal(a.BinDirs, b.BinDirs)
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) cni.Config { return h.Network }, same) {
		f := networksIn(ctx, n.Plugins, g.of)
		f.Subject = g.subject()
		found = append(found, f)
	}
	return orNone(found)
}

func networksIn(ctx context.Context, plugins host.Groups, config cni.Config) Finding {
	loaded, err := cni.Load(config)
	if err != nil {
		return fail(NoPods, err.Error(), "put a CNI configuration that can be read into "+config.ConfDir)
	}
	var texts, missing []string
	for _, network := range loaded {
		if err := cni.Validate(ctx, plugins, config, network); err != nil {
			missing = append(missing, fmt.Sprintf("network %q: %v", network.Name, err))
		}
		texts = append(texts, describe(network))
	}
	if len(missing) > 0 {
		return fail(NoPods, strings.Join(missing, "; "), "install the plugins that are missing or too old into "+strings.Join(config.BinDirs, " or "))
	}
	return ok(strings.Join(texts, "; "))
}

// describe returns a network's name, plugins and version.
func describe(n cni.Network) string {
	var list struct {
		Version string `json:"cniVersion"`
		Plugins []struct{ Type string }
	}
	_ = json.Unmarshal(n.Conflist, &list) // never fails: Load has decoded it
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Type)
	}
	text := fmt.Sprintf("%s: %s, CNI %s", n.Name, strings.Join(types, ", "), list.Version)
	if !n.Collected() {
		text += ", without GC"
	}
	return text
}

// netNSDirectory checks that namespaces can be pinned in the directory, and that other mount
// namespaces see the pins.
func netNSDirectory(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	dir := existing(n.Config.NetNSDir) // the first pod makes the directory
	if err := tryDirectory(dir); err != nil {
		return []Finding{fail(NetworkPods, err.Error(), fmt.Sprintf("make %s a directory on a filesystem that can be written", dir))}
	}
	cover, err := netns.Covered(n.Config.NetNSDir)
	if err != nil {
		return []Finding{unknown(err.Error(), "findmnt -t nsfs")}
	}
	if pins := ofSandboxes(cover.Pins); len(pins) > 0 {
		return []Finding{warn(fmt.Sprintf("a mount on %s covers pins of pods (%d), such as %s: these pods can't be stopped", cover.Over, len(pins), pins[0]), cover.Remedy())}
	}
	shared, mount, err := isShared(dir)
	switch {
	case err != nil:
		return []Finding{unknown(err.Error(), "findmnt -o TARGET,PROPAGATION -T "+dir)}
	case !shared:
		return []Finding{warn(fmt.Sprintf("the mount of %s, %s, is private: no process in another mount namespace sees what is pinned there, such as a network add-on's", n.Config.NetNSDir, mount),
			"mount --make-shared "+mount)} // a mount of the directory on itself would cover the pins
	default:
		return []Finding{ok(dir + " can be written, and is on a shared mount")}
	}
}

// ofSandboxes returns the pins with podfsm's names. Other pins may be covered on purpose.
func ofSandboxes(pins []string) []string {
	return slices.DeleteFunc(pins, func(name string) bool {
		_, ours := leaks.Pinned(name)
		return !ours
	})
}

// tryDirectory makes an unnamed file in dir, and a shared mount of dir in a new mount namespace.
// Nothing of both stays.
func tryDirectory(dir string) error {
	file, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_WRONLY, 0o444)
	switch {
	case err == nil:
		file.Close()
	case !errors.Is(err, unix.EOPNOTSUPP): // some filesystems have no unnamed files
		return fmt.Errorf("failed to make a file in %s: %w", dir, errors.Unwrap(err))
	}
	return remapping.InMountNamespace(func() error {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("failed to mount %s on itself: %w", dir, err)
		}
		if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
			return fmt.Errorf("failed to make a shared mount of %s: %w", dir, err)
		}
		return nil
	})
}

// isShared says whether dir is on a shared mount, and returns the mount's path.
func isShared(dir string) (shared bool, mount string, err error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, "", err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(real))
	if err != nil || len(mounts) == 0 {
		return false, "", errors.Join(err, fs.ErrNotExist)
	}
	// The mount with the longest path. If there are several, the last one covers the others.
	over := mounts[0]
	for _, m := range mounts {
		if len(m.Mountpoint) >= len(over.Mountpoint) {
			over = m
		}
	}
	return strings.Contains(over.Optional, "shared:"), over.Mountpoint, nil
}
