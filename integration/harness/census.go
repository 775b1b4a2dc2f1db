package harness

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Census lists the resources of a node by category, one item per line.
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

	cleanTimeout   = 30 * time.Second
	censusInterval = 50 * time.Millisecond
)

// Census lists everything of the node that a pod can leave behind: on the machine, in the network
// namespace of the node, and in all namespaces of its containerd, which must run.
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

// WaitClean waits until the node is as it was before. Much is cleaned up after the call that caused
// it. The error shows the difference, and the last lines of the log that tell why something stays.
func (n *Node) WaitClean(ctx context.Context, before Census) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Patience(cleanTimeout), fmt.Errorf("not as before within %v", Patience(cleanTimeout)))
	defer cancel()
	err := poll(ctx, censusInterval, func() error {
		after, err := n.TidyCensus(ctx)
		if err != nil {
			return err
		}
		if diff := before.Diff(after); diff != "" {
			return fmt.Errorf("census of node %q differs:\n%s: %w", n.name, diff, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\n%s", err, tail(strings.Join(staysBehind.FindAllString(n.Log(), -1), "\n"), 20))
}

// staysBehind matches the lines of the log about a cleanup that containerd or podfsm has not made.
var staysBehind = regexp.MustCompile(`.*(?:failed to clean up after shim disconnected|cleaning leaked shim process|failed to record the processes that a CNI plugin left running).*`)

// TidyCensus takes a census after containerd's garbage collection. It does not end with ctx, whose
// error would hide the difference.
func (n *Node) TidyCensus(ctx context.Context) (Census, error) {
	ctx = context.WithoutCancel(ctx)
	if err := n.collectGarbage(ctx); err != nil {
		return nil, err
	}
	return n.Census(ctx)
}

// idle are the categories that must be empty on a node without pods.
var idle = []string{Cgroups, CNICache, Containers, Descriptors, Fifos, HostIDs, Leases, Ledger, Processes, SandboxDirs, Sandboxes, ShimSockets, Shims, Tasks}

// WarmUp runs and removes a pod with a container on a node without pods, and returns the census
// afterwards. The first pod makes resources that stay, such as the bridge and empty iptables
// chains.
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

// Settle returns the census of a node without pods once nothing changes any more.
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

// Rest returns the census of a node with pods once nothing changes any more and all containers have
// executed their program. The checks of a starting daemon run plugins and hold namespaces for a
// moment.
func (n *Node) Rest(ctx context.Context) (Census, error) {
	return n.rest(ctx, func(c Census) error {
		if processes := strings.Join(c[Processes], "\n"); strings.Contains(processes, "(runc:[") {
			return fmt.Errorf("a container is being started:\n%s: %w", processes, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// rest waits for two equal censuses in a row that pass the check.
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
			return fmt.Errorf("node %q still changes:\n%s: %w", n.name, diff, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	return last, err
}

// Diff returns the difference by category: "+ item" for an item that is only in after, "- item" for
// an item that is only in before. It is empty without a difference.
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

// difference returns the items of a that are not in b, counting duplicates.
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
