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
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// recoverTimeout bounds the part of recovery that containerd's start waits for. systemd gives
	// the whole start 90 seconds.
	recoverTimeout = 20 * time.Second
	// probeTimeout bounds the examination of one sandbox, so that one that hangs doesn't delay the
	// others.
	probeTimeout = 5 * time.Second
	// sweepTimeout bounds the deletion of containerd's record and lease of a removed sandbox.
	sweepTimeout = 5 * time.Second
	// recoverParallel is the number of sandboxes that are examined at the same time.
	recoverParallel = 16
)

// recover adopts or rolls back the sandboxes of the previous daemon. containerd's start waits until
// each is examined, and until containerd's own leftovers are swept. Undos continue in the
// background.
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
	c.engine.WhenRemovalCompletes(func(ctx context.Context, key ledger.Key) { sweepRemoved(ctx, client, key) })
	saved := withUnknown(c.ledger.Sandboxes(), records)
	describe := func(key ledger.Key, spec any) lifecycle.Request {
		if spec, ok := spec.(*Spec); ok {
			return request(key, spec)
		}
		req := request(key, c.specOf(key, records[key]))
		req.Created = records[key].CreatedAt
		return req
	}
	actions := c.engine.Restore(ctx, saved, describe, func(s ledger.Sandbox) lifecycle.Outside { return c.outside(s, records) })
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

// outside returns the recovery evidence on a sandbox other than its records.
func (c *Controller) outside(s ledger.Sandbox, records map[ledger.Key]sandbox.Sandbox) lifecycle.Outside {
	record, listed := records[s.Key]
	return lifecycle.Outside{
		// By sequence number, which also holds if a daemon killed since had begun to recover the
		// sandbox.
		Rebooted:   len(s.Records) > 0 && s.Records[0].Seq < c.ledger.BootSeq(),
		Damaged:    damaged(c.ledger.Damage(), s.Key),
		Incomplete: c.ledger.Incomplete(),
		Forgotten:  c.ledger.Forgotten(s.Key),
		Served:     s.Key.Namespace == cri.Namespace,
		Listed:     listed,
		Started:    ran(record),
	}
}

// damaged reports whether records of a sandbox may be missing.
func damaged(all []ledger.Damage, key ledger.Key) bool {
	return slices.ContainsFunc(all, func(d ledger.Damage) bool { return d.Key == key || d.Key == ledger.Key{} })
}

// ran reports whether a sandbox was started. containerd's service adds the spec to its record then.
func ran(record sandbox.Sandbox) bool { return record.Spec != nil && record.Spec.GetTypeUrl() != "" }

// withUnknown adds the sandboxes in containerd's store that the ledger lacks.
func withUnknown(saved []ledger.Sandbox, records map[ledger.Key]sandbox.Sandbox) []ledger.Sandbox {
	known := make(map[ledger.Key]bool, len(saved))
	for _, s := range saved {
		known[s.Key] = true
	}
	for key := range records {
		if !known[key] {
			saved = append(saved, ledger.Sandbox{Key: key})
		}
	}
	return saved
}

// resumeAll resumes each restored sandbox.
func (c *Controller) resumeAll(ctx context.Context, client *containerd.Client, records map[ledger.Key]sandbox.Sandbox) {
	var group errgroup.Group
	group.SetLimit(recoverParallel)
	for _, view := range c.engine.List() {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, view.Key.Namespace), probeTimeout)
			defer cancel()
			if err := lifecycle.Protect(func() error { return c.engine.Resume(ctx, view.Key) }); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, view.Key.ID).WithError(err).Error("failed to examine sandbox after the restart, sandbox kept")
				return nil
			}
			if err := lifecycle.Protect(func() error { return keepProcessLabel(ctx, client, records[view.Key], view) }); err != nil {
				log.G(ctx).WithField(tracing.LogSandbox, view.Key.ID).WithError(err).Warn("new containers may get another SELinux label than their pod")
			}
			return nil
		})
	}
	_ = group.Wait()
}

// sweepLeases deletes leases of sandboxes without a record. containerd's service makes the lease
// first, then the record; if it is killed in between, it never looks for the lease again. The id of
// such a lease is a sandbox id.
func sweepLeases(ctx context.Context, client *containerd.Client, records map[ledger.Key]sandbox.Sandbox, others map[ledger.Key]sandbox.Sandbox) error {
	ctx = namespaces.WithNamespace(ctx, cri.Namespace)
	held, err := client.LeasesService().List(ctx)
	if err != nil {
		return fmt.Errorf("failed to list containerd's leases: %w", err)
	}
	for _, lease := range held {
		if !leaks.SandboxID.MatchString(lease.ID) || len(lease.Labels) > 0 {
			continue
		}
		key := ledger.Key{Namespace: cri.Namespace, ID: lease.ID}
		_, ours := records[key]
		if _, theirs := others[key]; !ours && !theirs {
			sweep(ctx, client, key)
		}
	}
	return nil
}

// storedSandboxes returns containerd's records of podfsm's sandboxes and of other controllers'
// sandboxes.
func storedSandboxes(ctx context.Context, client *containerd.Client) (records, others map[ledger.Key]sandbox.Sandbox, err error) {
	all, err := client.NamespaceService().List(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("failed to list containerd's namespaces: %w", err)
	}
	records, others = map[ledger.Key]sandbox.Sandbox{}, map[ledger.Key]sandbox.Sandbox{}
	for _, namespace := range all {
		stored, err := client.SandboxStore().List(namespaces.WithNamespace(ctx, namespace))
		if err != nil {
			return nil, nil, fmt.Errorf("failed to list containerd's sandboxes: %w", err)
		}
		for _, record := range stored {
			key := ledger.Key{Namespace: namespace, ID: record.ID}
			if record.Sandboxer == Name {
				records[key] = record
			} else {
				others[key] = record
			}
		}
	}
	return records, others, nil
}

// sweep deletes containerd's record and lease of a sandbox that a kill left unfinished. Otherwise
// containerd's service would list it forever. The record goes last, because the next start finds
// the sandbox by it.
func sweep(ctx context.Context, client *containerd.Client, key ledger.Key) {
	ctx = namespaces.WithNamespace(ctx, key.Namespace)
	entry := log.G(ctx).WithField(tracing.LogSandbox, key.ID)
	if err := client.LeasesService().Delete(ctx, leases.Lease{ID: key.ID}); err != nil && !errdefs.IsNotFound(err) {
		entry.WithError(err).Warn("failed to delete the lease of an unfinished sandbox")
	}
	if err := client.SandboxStore().Delete(ctx, key.ID); err != nil && !errdefs.IsNotFound(err) {
		entry.WithError(err).Warn("failed to delete containerd's record of an unfinished sandbox")
	}
}

// sweepRemoved deletes containerd's record and lease of a CRI sandbox whose pending cleanup has
// completed its removal. containerd's service was told that the removal had failed, and lists the
// sandbox until the next removal or restart.
func sweepRemoved(ctx context.Context, client *containerd.Client, key ledger.Key) {
	if key.Namespace != cri.Namespace {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	sweep(ctx, client, key)
}

// specOf builds a specification from containerd's record, for a sandbox whose own can't be read. It
// suffices to remove the sandbox by name.
func (c *Controller) specOf(key ledger.Key, record sandbox.Sandbox) *Spec {
	config, handlerName := requestOf(record)
	if config.GetMetadata() == nil {
		config = &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: key.ID}}
	}
	// The front replaces the network mode by NODE, so containerd's record doesn't have the pod's.
	if hasNetNS(record) {
		if options := config.GetLinux().GetSecurityContext().GetNamespaceOptions(); options != nil {
			options.Network = runtime.NamespaceMode_POD
		}
	}
	h, _ := c.stock.handler(handlerName)
	mapping, _ := mappingsOfRecord(record) // nil on an error, too
	return &Spec{
		Guessed:        true,
		Config:         config,
		Handler:        handlerName,
		Mapping:        mapping,
		RuntimeType:    record.Runtime.Name,
		RuntimeOptions: runtimeOptions(record), // they tell whether systemd made the cgroup
		Snapshotter:    c.stock.snapshotter(h),
	}
}

// requestOf returns the pod's configuration in containerd's record of a sandbox, empty if it can't
// be read.
func requestOf(record sandbox.Sandbox) (config *runtime.PodSandboxConfig, handlerName string) {
	var metadata sandboxMetadata
	if extension, ok := record.Extensions[metadataExtension]; ok {
		_ = json.Unmarshal(extension.GetValue(), &metadata)
	}
	return metadata.Metadata.Config, metadata.Metadata.RuntimeHandler
}

// hasNetNS reports whether a started sandbox has its own network namespace, by what [instance]
// returned to containerd's service.
func hasNetNS(record sandbox.Sandbox) bool {
	var spec specs.Spec
	if !ran(record) || json.Unmarshal(record.Spec.GetValue(), &spec) != nil || spec.Linux == nil {
		return false
	}
	return slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
}
