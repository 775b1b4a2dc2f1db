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
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
)

const (
	// settling is how long new resources, and those of a sandbox that has just ended, can't be
	// leaks. containerd's service makes a sandbox's lease before its record, and the record before
	// it calls podfsm; it deletes the record after the last call.
	settling = 30 * time.Second
	// betweenLooks is the time between the two searches that must both find a leak. What is being
	// removed is gone by then.
	betweenLooks = time.Second
	// fixTimeout bounds the removal of the leaks of one sandbox, and pluginPatience the part of it
	// in which a CNI plugin's DEL may finish.
	fixTimeout     = 30 * time.Second
	pluginPatience = 10 * time.Second
)

// leaks returns the leaked resources, and sets their metric.
func (c *Controller) leaks(ctx context.Context) ([]leaks.Thing, error) {
	found, err := c.lookTwice(ctx)
	if err == nil {
		c.meters.leaked(len(found))
	}
	return found, err
}

// lookTwice returns what two searches in a row have found.
func (c *Controller) lookTwice(ctx context.Context) ([]leaks.Thing, error) {
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

// lookForLeaks returns the resources without a sandbox. A sandbox counts if it is known before or
// after the search.
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

// owners returns all ids that may own resources: sandboxes of the engine and of other controllers,
// and containers other than podfsm's pauses.
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

// things returns all resources that are named after a sandbox, except cgroups.
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

// storedThings returns the resources in containerd's stores, in the namespace of ctx.
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
		if err != nil && !errdefs.IsFailedPrecondition(err) { // a handler may name a snapshotter that isn't loaded
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

// host returns where this node keeps the resources of its sandboxes.
func (n *node) host() leaks.Host {
	return leaks.Host{
		NetNSDirs: []string{n.stock.netNSDir()},
		Plugins:   n.groups,
		Files:     n.settings.Files,
		Bundles:   n.shimDirs.State,
		Namespace: cri.Namespace,
	}
}

// fix removes leaks and returns the errors by sandbox. The caller has to search again to learn what
// is gone.
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

// removeLeaks removes all resources of an unknown sandbox: first its processes, then what they have
// used. If a process can't be ended, the resources stay.
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
	sweep(ctx, c.node.client, ledger.Key{Namespace: cri.Namespace, ID: id})
	return nil
}

// unused fails if a container belongs to the sandbox: the container's shim may be the sandbox's.
func (c *Controller) unused(ctx context.Context, id string) error {
	stored, err := c.node.client.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list containerd's containers: %w", err)
	}
	for _, record := range stored {
		if record.SandboxID == id && record.ID != id {
			return fmt.Errorf("container %q belongs to the sandbox; remove the container first: %w", record.ID, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// endLeaked ends the processes of an unknown sandbox: CNI plugins, then shims, then what is left in
// its cgroups.
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

// unpinUnused unpins a network namespace, unless processes run in it. They may be another
// containerd's.
func unpinUnused(ctx context.Context, path string) error {
	users, err := netns.Users(ctx, path)
	if err != nil {
		return err
	}
	if len(users) > 0 {
		return fmt.Errorf("network namespace %q is in use by processes %v: %w", path, users, errdefs.ErrFailedPrecondition)
	}
	return netns.Unpin(ctx, path)
}
