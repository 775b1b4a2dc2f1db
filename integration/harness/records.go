package harness

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
)

// PodfsmSnapshotter is podfsm's own snapshotter.
const PodfsmSnapshotter = "podfsm"

const (
	// snapshotter is the default snapshotter of pods.
	snapshotter = "overlayfs"
	// scratchKey is the key of a snapshot that is made only to be removed.
	scratchKey = "census-scratch"
)

// criNamespace is the containerd namespace of CRI.
const criNamespace = "k8s.io"

// countRecords lists the records in the daemon's stores, in every namespace.
func (n *Node) countRecords(ctx context.Context, c Census) error {
	all, err := n.Containerd.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list namespaces: %w", err)
	}
	snapshotters, err := n.snapshotters(ctx)
	if err != nil {
		return err
	}
	for _, ns := range all {
		if err := n.countNamespace(namespaces.WithNamespace(ctx, ns), ns, snapshotters, c); err != nil {
			return fmt.Errorf("namespace %q: %w", ns, err)
		}
	}
	return nil
}

func (n *Node) countNamespace(ctx context.Context, ns string, snapshotters []string, c Census) error {
	containers, err := n.Containerd.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list containers: %w", err)
	}
	for _, i := range containers {
		c.add(Containers, "%s/%s", ns, i.ID)
	}
	sandboxes, err := n.Containerd.SandboxStore().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list sandboxes: %w", err)
	}
	for _, i := range sandboxes {
		c.add(Sandboxes, "%s/%s", ns, i.ID)
	}
	held, err := n.Containerd.LeasesService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list leases: %w", err)
	}
	for _, i := range held {
		if _, expires := i.Labels["containerd.io/gc.expire"]; expires {
			continue // of an interrupted call; containerd's client lets the lease expire within a day
		}
		c.add(Leases, "%s/%s", ns, i.ID)
	}
	running, err := n.Containerd.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return fmt.Errorf("failed to list tasks: %w", err)
	}
	for _, i := range running.GetTasks() {
		c.add(Tasks, "%s/%s", ns, i.GetID())
	}
	for _, s := range snapshotters {
		err := n.Containerd.SnapshotService(s).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			c.add(Snapshots, "%s/%s %s", ns, s, i.Name)
			return nil
		})
		if err != nil {
			return fmt.Errorf("failed to list snapshots of %q: %w", s, err)
		}
	}
	return nil
}

// collectGarbage removes what nothing refers to, such as the directories of removed snapshots, and
// waits for the end of the collection.
//
// containerd only looks for such directories after it has removed a snapshot. A daemon that was
// killed in between leaves them until the next removal, so collectGarbage makes and removes a
// snapshot.
func (n *Node) collectGarbage(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, criNamespace)
	for _, name := range n.usedSnapshotters() {
		scratch := n.Containerd.SnapshotService(name)
		if _, err := scratch.Prepare(ctx, scratchKey, ""); err != nil && !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("failed to prepare a snapshot to remove: %w", err)
		}
		if err := scratch.Remove(ctx, scratchKey); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("failed to remove a snapshot: %w", err)
		}
	}
	lease, err := n.Containerd.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return fmt.Errorf("failed to create a lease: %w", err)
	}
	if err := n.Containerd.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		return fmt.Errorf("failed to collect garbage: %w", err)
	}
	return nil
}

// usedSnapshotters returns the default snapshotter of pods, and podfsm's if it is in use.
func (n *Node) usedSnapshotters() []string {
	if _, err := os.Stat(n.path("root/io.containerd.snapshotter.v1." + PodfsmSnapshotter + "/metadata.db")); err != nil {
		return []string{snapshotter}
	}
	return []string{snapshotter, PodfsmSnapshotter}
}

// snapshotters returns the names of the snapshotters that work on this machine.
func (n *Node) snapshotters(ctx context.Context) ([]string, error) {
	loaded, err := n.Containerd.IntrospectionService().Plugins(ctx, "type=="+plugins.SnapshotPlugin.String())
	if err != nil {
		return nil, fmt.Errorf("failed to list snapshotters: %w", err)
	}
	var names []string
	for _, p := range loaded.GetPlugins() {
		if p.GetInitErr() == nil {
			names = append(names, p.GetID())
		}
	}
	return names, nil
}
