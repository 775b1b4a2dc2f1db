package harness

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
)

// Census is what exists of a node, by category, each item in one line.
type Census map[string][]string

// The categories of a census.
const (
	Cgroups     = "cgroups"
	CNICache    = "libcni cache"
	Containers  = "containers"
	Descriptors = "namespaces held by containerd"
	Fifos       = "fifos"
	Files       = "files"
	HostIDs     = "host ids held"
	IPAM        = "IPAM files"
	IPTables    = "iptables rules"
	Ledger      = "ledger entries"
	Leases      = "leases"
	Links       = "links"
	Mounts      = "mounts"
	NetNSMounts = "netns mounts"
	Processes   = "processes"
	SandboxDirs = "sandbox dirs"
	Sandboxes   = "sandbox records"
	ShimSockets = "shim sockets"
	Shims       = "shims"
	Snapshots   = "snapshots"
	Tasks       = "tasks"

	cleanTimeout   = 10 * time.Second
	censusInterval = 50 * time.Millisecond
)

// Census looks at everything of the node that a pod can leave behind: on the
// machine, in the node's network namespace, and in all namespaces of its
// containerd, which has to run.
func (n *Node) Census(ctx context.Context) (Census, error) {
	c := Census{}
	looks := []func(context.Context, Census) error{
		n.countCgroups, n.countMounts, n.countProcesses, n.countFiles, n.countCNICache,
		n.countLinks, n.countIPTables, n.countDescriptors, n.countRecords, n.countLedger, n.countHostIDs,
	}
	for _, look := range looks {
		if err := look(ctx, c); err != nil {
			return nil, fmt.Errorf("failed to take a census of node %q: %w", n.name, err)
		}
	}
	for _, items := range c {
		slices.Sort(items)
	}
	return c, nil
}

// WaitClean returns once the node is as it was before. Much is cleaned up a
// little after the call that asked for it. The error shows the difference.
func (n *Node) WaitClean(ctx context.Context, before Census) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Patience(cleanTimeout), fmt.Errorf("not as before within %v", Patience(cleanTimeout)))
	defer cancel()
	return poll(ctx, censusInterval, func() error {
		after, err := n.TidyCensus(ctx)
		if err != nil {
			return err
		}
		if diff := before.Diff(after); diff != "" {
			return fmt.Errorf("census of node %q differs:\n%s: %w", n.name, diff, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// TidyCensus takes a census without containerd's garbage, which it would collect
// some time later. It does not end with ctx: its error would hide what differs.
func (n *Node) TidyCensus(ctx context.Context) (Census, error) {
	ctx = context.WithoutCancel(ctx)
	if err := n.collectGarbage(ctx); err != nil {
		return nil, err
	}
	return n.Census(ctx)
}

// idle are the categories that are empty on a node without pods.
var idle = []string{Cgroups, CNICache, Containers, Descriptors, Fifos, HostIDs, Leases, Ledger, Processes, SandboxDirs, Sandboxes, ShimSockets, Shims, Tasks}

// WarmUp runs and removes a pod with a container on a node without pods, and
// returns the census after it: the first pod makes what stays, such as the
// bridge and empty iptables chains.
func (n *Node) WarmUp(ctx context.Context, handler string) (Census, error) {
	pod, err := n.RunPod(ctx, handler, n.PodConfig("warm-up"))
	if err != nil {
		return nil, fmt.Errorf("failed to run the warm-up pod: %w", err)
	}
	if _, err := pod.StartContainer(ctx, "busybox"); err != nil {
		return nil, fmt.Errorf("failed to start the warm-up container: %w", err)
	}
	if err := pod.StopAndRemove(ctx); err != nil {
		return nil, err
	}
	return n.Settle(ctx)
}

// Settle returns the census of a node without pods once it is at rest.
func (n *Node) Settle(ctx context.Context) (Census, error) {
	return n.rest(ctx, func(c Census) error {
		for _, category := range idle {
			if len(c[category]) > 0 {
				return fmt.Errorf("a node without pods has %s: %v: %w", category, c[category], errdefs.ErrFailedPrecondition)
			}
		}
		return nil
	})
}

// Rest returns the census of a node with pods once it is at rest, and what their
// containers are to run has been executed. A daemon that has just started still
// makes its doctor's checks, which run plugins and hold namespaces for a moment.
func (n *Node) Rest(ctx context.Context) (Census, error) {
	return n.rest(ctx, func(c Census) error {
		if processes := strings.Join(c[Processes], "\n"); strings.Contains(processes, "(runc:[") {
			return fmt.Errorf("a container is being started:\n%s: %w", processes, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// rest waits for two censuses in a row that are the same and pass the check.
func (n *Node) rest(ctx context.Context, check func(Census) error) (Census, error) {
	ctx, cancel := context.WithTimeout(ctx, Patience(cleanTimeout))
	defer cancel()
	var last Census
	err := poll(ctx, censusInterval, func() error {
		before := last
		var err error
		if last, err = n.TidyCensus(ctx); err != nil {
			return err
		}
		if err := check(last); err != nil {
			return err
		}
		if diff := before.Diff(last); diff != "" {
			return fmt.Errorf("node %q changes:\n%s: %w", n.name, diff, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	return last, err
}

// Diff returns what differs, in lines "+ item" for what is only in after and
// "- item" for what is only in before, below the name of their category. It is
// empty when nothing differs.
func (before Census) Diff(after Census) string {
	categories := slices.Sorted(maps.Keys(before))
	for category := range after {
		if _, found := before[category]; !found {
			categories = append(categories, category)
		}
	}
	slices.Sort(categories)

	var diff strings.Builder
	for _, category := range categories {
		gone, come := difference(before[category], after[category]), difference(after[category], before[category])
		if len(gone)+len(come) == 0 {
			continue
		}
		diff.WriteString(category + ":\n")
		for _, item := range gone {
			diff.WriteString("  - " + item + "\n")
		}
		for _, item := range come {
			diff.WriteString("  + " + item + "\n")
		}
	}
	return diff.String()
}

// difference returns the items of a that are not in b. An item that is twice in
// a must be twice in b.
func difference(a, b []string) []string {
	counts := map[string]int{}
	for _, item := range b {
		counts[item]++
	}
	var only []string
	for _, item := range a {
		if counts[item]--; counts[item] < 0 {
			only = append(only, item)
		}
	}
	return only
}

func (c Census) add(category string, format string, args ...any) {
	c[category] = append(c[category], fmt.Sprintf(format, args...))
}

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

// countLinks lists all of the network namespace, which is the node's alone.
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

// iptablesNoise is what changes in the output of iptables-save without any
// rule: comments with the time, and the counters of a chain.
var iptablesNoise = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$`)

// countIPTables lists the rules of both variants of iptables: which of them is
// in use depends on the distribution.
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

// countCgroups lists the cgroups below those of pods. The latter are the
// kubelet's, here the harness's, and removed as soon as they are empty.
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

// cgroupPatterns are where cgroups of a node may be: at the top of a hierarchy,
// or in the cgroup that the daemon is in, as a service of systemd is.
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

// nodeCNICache returns the results that libcni keeps of a node's attachments:
// the network has the node's name, and the netns path of any network is in the
// node's directory.
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

// countFiles lists every file that the daemon, its shims and the CNI plugins
// have made. The content of blobs and snapshots is left out, and counted by
// their records.
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

// doctorsTry begins the name of a directory in which the doctor tries, for some
// milliseconds after each start, what overlay mounts can do.
const doctorsTry = ".podfsm-doctor-"

// opaque tells whether a directory's files come and go without meaning.
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

// walk calls visit for root and all below it. What is not there, or goes away
// meanwhile, is not visited.
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

// countDescriptors lists the namespaces that the daemon has open. Its pidfds are
// left out: Go closes those of os.FindProcess when it next collects garbage.
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
