package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// recoverTimeout bounds all of recovery that containerd's start waits for; systemd gives a daemon 90 seconds in all.
	recoverTimeout = 20 * time.Second
	// probeTimeout bounds the look at one sandbox, so that one that hangs doesn't hold up the others.
	probeTimeout = 5 * time.Second
	// sweepTimeout bounds the deletion of what containerd has of a sandbox that is removed at last.
	sweepTimeout = 5 * time.Second
	// recoverParallel is how many sandboxes are looked at at a time.
	recoverParallel = 16
)

// recover takes up what the daemon before this one left. containerd's start waits for the look at each sandbox, and for the sweep of
// containerd's own records and leases; what else has to be undone is undone in the background.
func (c *Controller) recover(ctx context.Context, client *containerd.Client, gc bool) error {
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	records, others, err := storedSandboxes(ctx, client)
	if err != nil {
		return err
	}
	if err := sweepLeases(ctx, client, records, others); err != nil {
		return err
	}
	c.engine.WhenPaid(func(ctx context.Context, key journal.Key) { sweepPaid(ctx, client, key) })
	saved := withUnknown(c.ledger.Sandboxes(), records)
	describe := func(key journal.Key, spec any) lifecycle.Request {
		if spec, ok := spec.(*Spec); ok {
			return request(key, spec)
		}
		req := request(key, c.specOf(key, records[key]))
		req.Created = records[key].CreatedAt
		return req
	}
	actions := c.engine.Restore(ctx, saved, describe, func(s journal.Sandbox) lifecycle.Outside { return c.outside(s, records) })
	if err := c.restoreTasks(ctx); err != nil {
		return err
	}
	c.restoreIDs(ctx, actions, others)
	c.collectNetworks(ctx, client, gc, sandboxIDs(saved, records, others))
	c.resumeAll(ctx, client, records)
	for key, action := range actions {
		if action.Sweep {
			sweep(ctx, client, key)
		}
	}
	return nil
}

// outside is what else than its records says something of a sandbox.
func (c *Controller) outside(s journal.Sandbox, records map[journal.Key]sandbox.Sandbox) lifecycle.Outside {
	record, listed := records[s.Key]
	return lifecycle.Outside{
		// Sequence numbers say so also when a daemon that was killed since has begun to recover the sandbox.
		Rebooted:   len(s.Records) > 0 && s.Records[0].Seq < c.ledger.BootSeq(),
		Damaged:    damaged(c.ledger.Damage(), s.Key),
		Incomplete: c.ledger.Incomplete(),
		Forgotten:  c.ledger.Forgotten(s.Key),
		Served:     s.Key.Namespace == cri.Namespace,
		Listed:     listed,
		Started:    ran(record),
	}
}

// damaged says that records of a sandbox may be missing.
func damaged(all []journal.Damage, key journal.Key) bool {
	return slices.ContainsFunc(all, func(d journal.Damage) bool { return d.Key == key || d.Key == journal.Key{} })
}

// ran says whether a sandbox was started: containerd's service adds the spec to its record then.
func ran(record sandbox.Sandbox) bool { return record.Spec != nil && record.Spec.GetTypeUrl() != "" }

// withUnknown adds the sandboxes that containerd has and the ledger doesn't.
func withUnknown(saved []journal.Sandbox, records map[journal.Key]sandbox.Sandbox) []journal.Sandbox {
	known := make(map[journal.Key]bool, len(saved))
	for _, s := range saved {
		known[s.Key] = true
	}
	for key := range records {
		if !known[key] {
			saved = append(saved, journal.Sandbox{Key: key})
		}
	}
	return saved
}

// resumeAll takes up each restored sandbox.
func (c *Controller) resumeAll(ctx context.Context, client *containerd.Client, records map[journal.Key]sandbox.Sandbox) {
	var group errgroup.Group
	group.SetLimit(recoverParallel)
	for _, view := range c.engine.List() {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, view.Key.Namespace), probeTimeout)
			defer cancel()
			if err := lifecycle.Protect(func() error { return c.engine.Resume(ctx, view.Key) }); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, view.Key.ID).WithError(err).Error("podfsm: failed to look at a sandbox after the restart; it is kept as it was")
				return nil
			}
			if err := lifecycle.Protect(func() error { return keepProcessLabel(ctx, client, records[view.Key], view) }); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, view.Key.ID).WithError(err).Warn("podfsm: containers created from now on may get another SELinux label than their pod")
			}
			return nil
		})
	}
	_ = group.Wait()
}

// sweepLeases deletes the leases that containerd's service took for sandboxes right before it was killed: it makes the lease first,
// then its record of the sandbox, and never looks for a lease without one. They are known by their ids, those of sandboxes.
func sweepLeases(ctx context.Context, client *containerd.Client, records map[journal.Key]sandbox.Sandbox, others map[journal.Key]sandbox.Sandbox) error {
	ctx = namespaces.WithNamespace(ctx, cri.Namespace)
	held, err := client.LeasesService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list containerd's leases: %w", err)
	}
	for _, lease := range held {
		if !leaks.SandboxID.MatchString(lease.ID) || len(lease.Labels) > 0 {
			continue
		}
		key := journal.Key{Namespace: cri.Namespace, ID: lease.ID}
		_, ours := records[key]
		if _, theirs := others[key]; !ours && !theirs {
			sweep(ctx, client, key)
		}
	}
	return nil
}

// storedSandboxes are containerd's records of podfsm's sandboxes, and of those of other controllers.
func storedSandboxes(ctx context.Context, client *containerd.Client) (records, others map[journal.Key]sandbox.Sandbox, err error) {
	all, err := client.NamespaceService().List(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("failed to list containerd's namespaces: %w", err)
	}
	records, others = map[journal.Key]sandbox.Sandbox{}, map[journal.Key]sandbox.Sandbox{}
	for _, namespace := range all {
		stored, err := client.SandboxStore().List(namespaces.WithNamespace(ctx, namespace))
		if err != nil {
			return nil, nil, fmt.Errorf("failed to list containerd's sandboxes: %w", err)
		}
		for _, record := range stored {
			key := journal.Key{Namespace: namespace, ID: record.ID}
			if record.Sandboxer == Name {
				records[key] = record
			} else {
				others[key] = record
			}
		}
	}
	return records, others, nil
}

// sweep deletes containerd's record and lease of a sandbox that a kill left unfinished: nobody else would, and containerd's
// service would list it. The record goes last, because the next start finds the rest by it.
func sweep(ctx context.Context, client *containerd.Client, key journal.Key) {
	ctx = namespaces.WithNamespace(ctx, key.Namespace)
	entry := log.G(ctx).WithField(tracing.LogSandbox, key.ID)
	if err := client.LeasesService().Delete(ctx, leases.Lease{ID: key.ID}); err != nil && !errdefs.IsNotFound(err) {
		entry.WithError(err).Warn("podfsm: failed to delete the lease of an unfinished sandbox")
	}
	if err := client.SandboxStore().Delete(ctx, key.ID); err != nil && !errdefs.IsNotFound(err) {
		entry.WithError(err).Warn("podfsm: failed to delete containerd's record of an unfinished sandbox")
	}
}

// sweepPaid deletes what containerd has of a sandbox of the CRI's whose removal is done at last. Its service, which was told that it had
// failed, goes on listing the sandbox until somebody removes it again, but not after the next start.
func sweepPaid(ctx context.Context, client *containerd.Client, key journal.Key) {
	if key.Namespace != cri.Namespace {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	sweep(ctx, client, key)
}

// specOf makes do with containerd's record for a sandbox whose own specification can't be read: enough to remove it by name.
func (c *Controller) specOf(key journal.Key, record sandbox.Sandbox) *Spec {
	config, handlerName := requestOf(record)
	if config.GetMetadata() == nil {
		config = &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: key.ID}}
	}
	// What the front has passed to containerd's service says the node's network.
	if hasNetNS(record) {
		if options := config.GetLinux().GetSecurityContext().GetNamespaceOptions(); options != nil {
			options.Network = runtime.NamespaceMode_POD
		}
	}
	h, _ := c.stock.handler(handlerName)
	mapping, _ := mappingsOfRecord(record) // nil where it can't be read, too
	return &Spec{
		Guessed:        true,
		Config:         config,
		Handler:        handlerName,
		Mapping:        mapping,
		RuntimeType:    record.Runtime.Name,
		RuntimeOptions: runtimeOptions(record), // they say who has made the cgroup
		Snapshotter:    c.stock.snapshotter(h),
	}
}

// requestOf is what containerd's service was asked for, by its record of the sandbox; empty where that can't be read.
func requestOf(record sandbox.Sandbox) (config *runtime.PodSandboxConfig, handlerName string) {
	var metadata sandboxMetadata
	if extension, ok := record.Extensions[metadataExtension]; ok {
		_ = json.Unmarshal(extension.GetValue(), &metadata)
	}
	return metadata.Metadata.Config, metadata.Metadata.RuntimeHandler
}

// hasNetNS says whether a sandbox that was started has a network namespace of its own, by what [instance] told containerd's service.
func hasNetNS(record sandbox.Sandbox) bool {
	var spec specs.Spec
	if !ran(record) || json.Unmarshal(record.Spec.GetValue(), &spec) != nil || spec.Linux == nil {
		return false
	}
	return slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
}
