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
	"github.com/podfsm/podfsm/states"
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
	saved := c.withUnknown(c.ledger.Sandboxes(), records)
	lost := map[journal.Key]bool{}
	for _, s := range saved {
		// What containerd's service knows as started was ready: a result that is missing was on record. Where the creation is whole, what is
		// missing can only be of its end, which is found out by looking.
		wasReady := s.Key.Namespace == cri.Namespace && ran(records[s.Key])
		missing := !lifecycle.Whole(s) && (wasReady || damaged(c.ledger.Damage(), s.Key))
		lost[s.Key] = fromBefore(s, c.ledger.BootSeq()) || onlyLasting(s) || missing
	}
	c.engine.Restore(ctx, saved, func(key journal.Key, spec any) (lifecycle.Request, lifecycle.Past) {
		past := lifecycle.Recorded
		switch record, listed := records[key]; {
		case lost[key] && listed && ran(record):
			past = lifecycle.LostReady
		case lost[key]:
			past = lifecycle.Lost
		}
		if spec, ok := spec.(*Spec); ok {
			return request(key, spec), past
		}
		req := request(key, c.specOf(key, records[key]))
		req.Created = records[key].CreatedAt
		return req, past
	})
	if err := c.restoreTasks(ctx); err != nil {
		return err
	}
	c.restoreIDs(ctx, lost, others)
	c.collectNetworks(ctx, client, gc, sandboxIDs(saved, records, others))
	c.resumeAll(ctx, client, records, lost)
	return nil
}

// fromBefore says that a sandbox was begun before this boot: nothing of it that the kernel had is there any more, also when a daemon
// that was killed since has begun to recover it.
func fromBefore(s journal.Sandbox, bootSeq uint64) bool {
	return len(s.Records) > 0 && s.Records[0].Seq < bootSeq
}

// onlyLasting says that the log in the state directory is gone, and with it all that the steps had recorded there.
func onlyLasting(s journal.Sandbox) bool {
	return !slices.ContainsFunc(s.Records, func(r journal.Record) bool { return !r.Durable })
}

// damaged says that records of a sandbox may be missing.
func damaged(all []journal.Damage, key journal.Key) bool {
	return slices.ContainsFunc(all, func(d journal.Damage) bool { return d.Key == key || d.Key == journal.Key{} })
}

// ran says whether a sandbox was started: containerd's service adds the spec to its record then.
func ran(record sandbox.Sandbox) bool { return record.Spec != nil && record.Spec.GetTypeUrl() != "" }

// withUnknown adds the sandboxes that containerd has as started and the ledger doesn't know: it was lost, or set aside as
// damaged. Their records are all that leads to pods that may well run; they come back quarantined. So do those that weren't started
// yet, when the ledger is incomplete: else they were never begun, and nothing of them is there. Those of sandboxes that were removed are
// left over from a kill.
func (c *Controller) withUnknown(saved []journal.Sandbox, records map[journal.Key]sandbox.Sandbox) []journal.Sandbox {
	known := make(map[journal.Key]bool, len(saved))
	for _, s := range saved {
		known[s.Key] = true
	}
	for key, record := range records {
		if !known[key] && (ran(record) || c.ledger.Incomplete()) && !c.ledger.Forgotten(key) {
			saved = append(saved, journal.Sandbox{Key: key})
		}
	}
	return saved
}

// resumeAll decides what becomes of each restored sandbox, and sweeps what containerd keeps of sandboxes that won't stay.
func (c *Controller) resumeAll(ctx context.Context, client *containerd.Client, records map[journal.Key]sandbox.Sandbox, lost map[journal.Key]bool) {
	var group errgroup.Group
	group.SetLimit(recoverParallel)
	doomed := map[journal.Key]bool{} // what containerd has of them goes
	for key := range records {
		doomed[key] = true
	}
	for _, view := range c.engine.List() {
		_, listed := records[view.Key]
		verdict := lifecycle.Keep
		switch {
		case !listed && view.Key.Namespace == cri.Namespace:
			verdict = lifecycle.Discard // containerd's service doesn't know it any more, so nobody will ask for it
		case neverShown(view, records[view.Key]):
			verdict = lifecycle.Discard
		case lost[view.Key]:
			verdict = lifecycle.Gone
		}
		if verdict == lifecycle.Discard && finished(view) {
			c.engine.Discard(view.Key, lifecycle.Taken) // it goes a little later, and a retry must not take it meanwhile
		}
		doomed[view.Key] = !staysListed(view) || neverShown(view, records[view.Key])
		if damaged(c.ledger.Damage(), view.Key) {
			c.engine.Claim(ctx, view.Key, lifecycle.Taken) // who has claimed it may have been on record
		}
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, view.Key.Namespace), probeTimeout)
			defer cancel()
			if err := lifecycle.Protect(func() error { return c.engine.Resume(ctx, view.Key, verdict) }); err != nil {
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
	for key, goes := range doomed {
		if goes {
			sweep(ctx, client, key)
		}
	}
}

// neverShown says that nobody can know of a sandbox of the CRI's: it was discarded, or containerd's service hadn't taken it over yet from
// the creation.
func neverShown(view lifecycle.View, record sandbox.Sandbox) bool {
	return view.Claim == lifecycle.Discarded || view.Claim == lifecycle.Unclaimed && !ran(record)
}

// staysListed says whether containerd's service goes on listing the sandbox. One whose removal was begun is podfsm's alone to finish:
// its containers and its network are gone, and a record that outlives podfsm's own would bring it back.
func staysListed(view lifecycle.View) bool {
	switch view.State {
	case states.RollingBack, states.RolledBack, states.Removing, states.Removed:
		return false
	case states.CleanupOwed:
		return view.Goal != states.RolledBack && view.Goal != states.Removed
	default:
		return !view.HalfMade
	}
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
