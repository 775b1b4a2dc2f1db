package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
)

const (
	// settling is how long something isn't judged that is new, or whose sandbox has just ended: containerd's service makes a
	// sandbox's lease before its record, and its record before it tells us, and deletes the record after it has told us.
	settling = 30 * time.Second
	// betweenLooks is the time between the two looks that must both find a leak. What is on its way out is gone by then.
	betweenLooks = time.Second
	// fixTimeout bounds the removal of what one sandbox has left, pluginPatience the part of it that a CNI plugin's DEL gets to
	// come to its end.
	fixTimeout     = 30 * time.Second
	pluginPatience = 10 * time.Second
)

// leaks is what has leaked, found in two looks.
func (c *Controller) leaks(ctx context.Context) ([]leaks.Thing, error) {
	first, err := c.lookForLeaks(ctx)
	if err != nil || len(first) == 0 {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(betweenLooks):
	}
	second, err := c.lookForLeaks(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(second, func(t leaks.Thing) bool { return !slices.Contains(first, t) }), nil
}

// lookForLeaks returns what belongs to no sandbox that was known before the look or is known after it.
func (c *Controller) lookForLeaks(ctx context.Context) ([]leaks.Thing, error) {
	known, err := c.owners(ctx)
	if err != nil {
		return nil, err
	}
	things, err := c.things(ctx)
	if err != nil {
		return nil, err
	}
	after, err := c.owners(ctx)
	if err != nil {
		return nil, err
	}
	maps.Copy(known, after)
	things = slices.DeleteFunc(things, func(t leaks.Thing) bool { return known[t.ID] })
	cgroups, err := leaks.Cgroups(things)
	if err != nil {
		return nil, err
	}
	things = append(things, cgroups...)
	leaks.Sort(things)
	return things, nil
}

// owners are the ids of all that may have things: sandboxes of the engine, those of other controllers, and containers that aren't
// podfsm's pauses.
func (c *Controller) owners(ctx context.Context) (map[string]bool, error) {
	known := map[string]bool{}
	for _, view := range c.engine.List() {
		known[view.Key.ID] = true
	}
	for _, key := range c.ended.within(settling) {
		known[key.ID] = true
	}
	records, others, err := storedSandboxes(ctx, c.node.client)
	if err != nil {
		return nil, err
	}
	for key := range others {
		known[key.ID] = true
	}
	for key, record := range records {
		if time.Since(record.CreatedAt) < settling {
			known[key.ID] = true
		}
	}
	stored, err := c.node.client.ContainerService().List(namespaces.WithNamespace(ctx, cri.Namespace))
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's containers: %w", err)
	}
	for _, record := range stored {
		if !pause.IsPause(record) {
			known[record.ID] = true
		}
	}
	return known, nil
}

// things are all that there are of sandboxes, whosever they are; cgroups aside.
func (c *Controller) things(ctx context.Context) ([]leaks.Thing, error) {
	marked, err := c.node.host().Marked()
	if err != nil {
		return nil, err
	}
	unmarked, err := c.node.host().Unmarked(ctx)
	if err != nil {
		return nil, err
	}
	stored, err := c.storedThings(namespaces.WithNamespace(ctx, cri.Namespace))
	if err != nil {
		return nil, err
	}
	return slices.Concat(marked, unmarked, stored), nil
}

// storedThings are those in containerd's stores, in the namespace of ctx.
func (c *Controller) storedThings(ctx context.Context) ([]leaks.Thing, error) {
	var things []leaks.Thing
	add := func(kind leaks.Kind, id, name string) {
		if leaks.SandboxID.MatchString(id) {
			things = append(things, leaks.Thing{Kind: kind, ID: id, Name: name})
		}
	}
	client := c.node.client
	containers, err := client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's containers: %w", err)
	}
	for _, record := range containers {
		if pause.IsPause(record) {
			add(leaks.Container, record.ID, record.ID)
		}
	}
	for _, snapshotter := range c.stock.snapshotters() {
		keys, err := c.node.snapshots.Keys(ctx, snapshotter)
		if err != nil && !errdefs.IsFailedPrecondition(err) { // a handler may name one that isn't loaded
			return nil, err
		}
		for _, key := range keys {
			add(leaks.Snapshot, key, snapshotter)
		}
	}
	held, err := client.LeasesService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's leases: %w", err)
	}
	for _, lease := range held {
		if len(lease.Labels) == 0 && time.Since(lease.CreatedAt) > settling {
			add(leaks.Lease, lease.ID, lease.ID)
		}
	}
	sandboxes, err := client.SandboxStore().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's sandboxes: %w", err)
	}
	for _, record := range sandboxes {
		if record.Sandboxer == Name {
			add(leaks.Record, record.ID, record.ID)
		}
	}
	return things, nil
}

// host is where this node has the things of its sandboxes.
func (n *node) host() leaks.Host {
	return leaks.Host{
		NetNSDirs: []string{n.stock.netNSDir()},
		Plugins:   n.groups,
		Files:     n.settings.Files,
		Bundles:   n.shimDirs.State,
		Namespace: cri.Namespace,
	}
}

// fix removes what has leaked. It returns, by sandbox, why something could not be removed; what is gone, another look says.
func (c *Controller) fix(ctx context.Context, found []leaks.Thing) map[string]error {
	failed := map[string]error{}
	for _, id := range leaks.IDs(found) {
		of := slices.DeleteFunc(slices.Clone(found), func(t leaks.Thing) bool { return t.ID != id })
		if err := c.removeLeaks(ctx, id, of); err != nil {
			failed[id] = err
		}
	}
	return failed
}

// removeLeaks removes all of a sandbox that nobody knows: its processes, then what they have used. When a process can't be ended,
// the rest stays.
func (c *Controller) removeLeaks(ctx context.Context, id string, found []leaks.Thing) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, cri.Namespace), fixTimeout)
	defer cancel()
	if err := c.unused(ctx, id); err != nil {
		return err
	}
	if err := c.endLeaked(ctx, id, found); err != nil {
		return err
	}
	var failed []error
	for _, thing := range found {
		switch thing.Kind {
		case leaks.Snapshot:
			failed = append(failed, c.node.snapshots.Remove(ctx, thing.Name, id))
		case leaks.Files:
			failed = append(failed, c.node.settings.Files.Remove(ctx, id))
		case leaks.NetNS:
			failed = append(failed, unpinUnused(ctx, thing.Name))
		}
	}
	if err := errors.Join(failed...); err != nil {
		return err
	}
	sweep(ctx, c.node.client, journal.Key{Namespace: cri.Namespace, ID: id})
	return nil
}

// unused fails while a container names the sandbox as its own: its shim may be the sandbox's.
func (c *Controller) unused(ctx context.Context, id string) error {
	stored, err := c.node.client.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list containerd's containers: %w", err)
	}
	for _, record := range stored {
		if record.SandboxID == id && record.ID != id {
			return fmt.Errorf("container %q is in it, remove that first: %w", record.ID, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// endLeaked ends the processes, in the order of their dependence.
func (c *Controller) endLeaked(ctx context.Context, id string, found []leaks.Thing) error {
	if err := cni.End(ctx, c.node.groups, id, pluginPatience); err != nil {
		return err
	}
	if err := errors.Join(c.node.shims.End(ctx, id), c.node.shims.EndUnknown(ctx, id)); err != nil {
		return err
	}
	for _, thing := range found {
		if thing.Kind == leaks.Cgroup {
			if err := host.EndCgroupDir(ctx, thing.Name); err != nil {
				return err
			}
		}
	}
	return c.node.containers.Delete(ctx, id)
}

// unpinUnused leaves a network namespace alone that processes are in: they are nobody's that we know, so perhaps another
// containerd's.
func unpinUnused(ctx context.Context, path string) error {
	users, err := netns.Users(ctx, path)
	if err != nil {
		return err
	}
	if len(users) > 0 {
		return fmt.Errorf("processes %v are in network namespace %q: %w", users, path, errdefs.ErrFailedPrecondition)
	}
	return netns.Unpin(ctx, path)
}
