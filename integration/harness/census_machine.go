package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
)

func (n *Node) countMounts(_ context.Context, c Census) error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.Contains(m.Mountpoint+m.Root+m.Source+m.VFSOptions, n.dir), false
	})
	if err != nil {
		return err
	}
	for _, m := range mounts {
		category := Mounts
		if m.FSType == "nsfs" {
			category = NetNSMounts
		}
		c.add(category, "%s %s %s", m.Mountpoint, m.FSType, m.Root)
	}
	return nil
}

// countLinks lists all links in the network namespace of the node.
func (n *Node) countLinks(_ context.Context, c Census) error {
	return n.Inside(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("failed to list links: %w", err)
		}
		for _, l := range links {
			c.add(Links, "%s (%s)", l.Attrs().Name, l.Type())
		}
		return nil
	})
}

// iptablesNoise matches the parts of the output of iptables-save that change without a rule:
// comments with the time, and the counters of a chain.
var iptablesNoise = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$`)

// countIPTables lists the rules of both variants of iptables. The distribution decides which
// variant plugins use.
func (n *Node) countIPTables(ctx context.Context, c Census) error {
	for _, save := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		out, err := n.Command(ctx, save)
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("%w: `make deps` installs it", err)
		}
		if err != nil {
			return err
		}
		table := ""
		for line := range strings.Lines(iptablesNoise.ReplaceAllString(out, "")) {
			line = strings.TrimSpace(line)
			if name, isTable := strings.CutPrefix(line, "*"); isTable {
				table = name
			} else if line != "COMMIT" {
				c.add(IPTables, "%s %s %s", strings.TrimSuffix(save, "-save"), table, line)
			}
		}
	}
	return nil
}

// countCgroups lists the cgroups below those of pods. The harness makes the cgroups of pods, as the
// kubelet does, and they are removed here when they are empty.
func (n *Node) countCgroups(_ context.Context, c Census) error {
	cgroups, err := nodeCgroups(n.name)
	if err != nil {
		return err
	}
	for _, dir := range slices.Backward(cgroups) {
		if filepath.Base(filepath.Dir(dir)) == nodeCgroup(n.name) && os.Remove(dir) == nil {
			continue
		}
		if filepath.Base(dir) != nodeCgroup(n.name) {
			c.add(Cgroups, "%s", dir)
		}
	}
	return nil
}

// nodeCgroups returns the directories of a node's cgroups in every hierarchy,
// parents first.
func nodeCgroups(name string) ([]string, error) {
	hierarchies, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var cgroups []string
	for _, h := range hierarchies {
		for _, pattern := range cgroupPatterns(name) {
			tops, err := filepath.Glob(filepath.Join(h.Mountpoint, pattern))
			if err != nil {
				return nil, err
			}
			for _, top := range tops {
				err := walk(top, func(path string, d os.DirEntry) error {
					if d.IsDir() {
						cgroups = append(cgroups, path)
					}
					return nil
				})
				if err != nil {
					return nil, err
				}
			}
		}
	}
	slices.Sort(cgroups)
	return slices.Compact(cgroups), nil
}

// cgroupPatterns are the places of cgroups of a node: at the top of a hierarchy, or in the cgroup
// of the daemon, which may be a service of systemd.
func cgroupPatterns(name string) []string {
	patterns := []string{"podfsm-*" + name + "*"} // the daemon names those of CNI plugins by its state directory
	for _, above := range []string{"", "*/", "*/*/"} {
		patterns = append(patterns, above+name, above+sliceName(name)+".slice", above+sliceName(name)+"-*.slice:*")
	}
	return patterns
}

// cniCacheDir is libcni's default, libcni.CacheDir.
const cniCacheDir = "/var/lib/cni/results"

func (n *Node) countCNICache(_ context.Context, c Census) error {
	files, err := nodeCNICache(n.dir)
	for _, f := range files {
		c.add(CNICache, "%s", f)
	}
	return err
}

// nodeCNICache returns libcni's cached results of a node. A network with the name of the node is
// its own, and so is a netns path in the directory of the node.
func nodeCNICache(dir string) ([]string, error) {
	var of []string
	err := walk(cniCacheDir, func(path string, d os.DirEntry) error {
		if !d.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if strings.HasPrefix(d.Name(), filepath.Base(dir)) || strings.Contains(string(content), dir+"/") {
			of = append(of, path)
		}
		return nil
	})
	return of, err
}

// countFiles lists every file of the daemon, its shims and the CNI plugins. The content of blobs
// and snapshots is left out: their records count them.
func (n *Node) countFiles(_ context.Context, c Census) error {
	for _, top := range []string{"root", "state", "tmp", "s", "cni/ipam", "opt"} {
		err := walk(n.path(top), func(path string, d os.DirEntry) error {
			below, err := filepath.Rel(n.dir, path)
			if err != nil {
				return err
			}
			if strings.HasPrefix(d.Name(), doctorsTry) {
				return filepath.SkipDir
			}
			c.add(fileCategory(below, d), "%s", below)
			if opaque(below) {
				return filepath.SkipDir
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// doctorsTry is the prefix of directories in which the doctor tests overlay mounts for some
// milliseconds after each start.
const doctorsTry = ".podfsm-doctor-"

// opaque reports whether the files of a directory come and go without meaning.
func opaque(below string) bool {
	dir, base := filepath.Split(below)
	return base == "rootfs" || base == "io.containerd.content.v1.content" || strings.HasSuffix(dir, "/snapshots/")
}

func fileCategory(below string, d os.DirEntry) string {
	switch {
	case d.Type()&os.ModeNamedPipe != 0:
		return Fifos
	case d.Type()&os.ModeSocket != 0 && strings.HasPrefix(below, "s/"):
		return ShimSockets
	case strings.HasPrefix(below, "cni/ipam/"):
		return IPAM
	case strings.Contains(below, "/sandboxes/"):
		return SandboxDirs
	}
	return Files
}

// walk calls visit for root and everything below it, except for files that are missing or vanish.
func walk(root string, visit func(path string, d os.DirEntry) error) error {
	return filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return visit(path, d)
	})
}

// countDescriptors lists the namespaces that the daemon has open. Pidfds are left out: Go closes
// those of os.FindProcess at the next garbage collection.
func (n *Node) countDescriptors(_ context.Context, c Census) error {
	fds := fmt.Sprintf("/proc/%d/fd", n.Pid())
	entries, err := os.ReadDir(fds)
	if err != nil {
		return err
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(fds, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if kind, _, _ := strings.Cut(target, ":["); slices.Contains([]string{"net", "user", "mnt"}, kind) {
			c.add(Descriptors, "%s", target)
		}
	}
	return nil
}

func (n *Node) countProcesses(_ context.Context, c Census) error {
	processes, err := nodeProcesses(n.dir)
	if err != nil {
		return err
	}
	for _, p := range processes {
		switch {
		case p.pid == n.Pid():
		case strings.HasPrefix(p.name, "containerd-shim"):
			c.add(Shims, "%v", p)
		default:
			c.add(Processes, "%v", p)
		}
	}
	return nil
}
