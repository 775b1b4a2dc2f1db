package plugin

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
)

const (
	// gcTimeout bounds the collection of all networks; containerd's start waits for it, and gcGrace for the plugins to be killed.
	gcTimeout = 5 * time.Second
	gcGrace   = time.Second
	// gcInterfaces is how many interfaces of a container are kept at least, eth0 and on: what a network is called in there depends on
	// the configuration that there was when the pod was made.
	gcInterfaces = 8
)

// collectNetworks has the plugins of podfsm's networks free what belongs to no container that this containerd knows: above all what
// podfsm's own pods had whose ledger was lost. It is called before anything is undone and before containerd serves, so that this
// daemon runs no ADD and no DEL beside it, as the CNI specification demands. It never fails the start.
func (c *Controller) collectNetworks(ctx context.Context, client *containerd.Client, wanted bool, sandboxes map[string]bool) {
	ctx, cancel := context.WithTimeoutCause(ctx, gcTimeout, fmt.Errorf("the collection took more than %s: %w", gcTimeout, context.DeadlineExceeded))
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := lifecycle.Protect(func() error { c.collect(ctx, client, wanted, sandboxes); return nil }); err != nil {
			log.G(ctx).WithError(err).Error("podfsm: the collection of CNI networks failed")
		}
	}()
	select {
	case <-done:
	case <-time.After(gcTimeout + gcGrace):
		// When it goes on, ctx keeps it from doing anything.
		log.G(ctx).Error("podfsm: the collection of CNI networks hangs; containerd starts without it")
	}
}

func (c *Controller) collect(ctx context.Context, client *containerd.Client, wanted bool, sandboxes map[string]bool) {
	if err := c.node.driver.EndGC(ctx); err != nil {
		log.G(ctx).WithError(err).Error("podfsm: failed to end the CNI GC of the daemon before this one")
		return
	}
	networks := c.networks(ctx)
	if !wanted || len(networks) == 0 {
		return
	}
	known, err := leaks.Containers(ctx, client)
	var cached map[string][]cni.Attached
	if err == nil {
		maps.Copy(known, sandboxes)
		cached, err = cni.Cached()
	}
	if err == nil {
		err = c.undisturbed(ctx, known)
	}
	for _, n := range networks {
		entry := log.G(ctx).WithField("network", n.Name)
		reason := err
		if reason == nil {
			reason = unshared(cached[n.Name], known)
		}
		if reason != nil {
			entry.WithError(reason).Warn("podfsm: a CNI network is not collected")
			continue
		}
		if err := c.node.driver.GC(ctx, n.config, n.Network, valid(known, cached[n.Name], n.IfName)); err != nil {
			entry.WithError(err).Warn("podfsm: the CNI GC of a network failed")
			continue
		}
		entry.Infof("podfsm: a CNI network was collected, for %d containers", len(known))
	}
}

// configured is a network and where it was found.
type configured struct {
	cni.Network
	config cni.Config
}

// networks are those of podfsm's handlers that can be collected, each once.
func (c *Controller) networks(ctx context.Context) []configured {
	names := []string{}
	for name, h := range c.stock.Containerd.Runtimes {
		if h.Sandboxer == Name {
			names = append(names, name)
		}
	}
	if ours, _ := c.Ours(""); ours {
		names = append(names, "")
	}
	found := map[string]configured{}
	for _, name := range names {
		config := networkConfig(c.stock, &Spec{Handler: name})
		loaded, err := cni.Load(config)
		if err != nil {
			log.G(ctx).WithError(err).Debugf("podfsm: no network of handler %q to collect", name)
			continue
		}
		for _, n := range loaded {
			if n.Collected() {
				found[string(n.Conflist)] = configured{n, config}
			}
		}
	}
	return slices.Collect(maps.Values(found))
}

// sandboxIDs are the ids of all sandboxes on the ledger and in containerd's store, ours and others.
func sandboxIDs(saved []journal.Sandbox, records, others map[journal.Key]sandbox.Sandbox) map[string]bool {
	ids := map[string]bool{}
	for _, s := range saved {
		ids[s.Key.ID] = true
	}
	for key := range records {
		ids[key.ID] = true
	}
	for key := range others {
		ids[key.ID] = true
	}
	return ids
}

// undisturbed fails while something acts on the node's networks that isn't known well enough to collect beside it. All that it goes by
// is root's alone: processes as [cni.Driver.InFlight] chooses them, and the directory of pinned namespaces.
func (c *Controller) undisturbed(ctx context.Context, known map[string]bool) error {
	pid, err := c.node.driver.InFlight(ctx, cni.Config{BinDirs: c.stock.CNI.BinDirs})
	if err != nil {
		return fmt.Errorf("failed to look for CNI plugins that run: %w", err)
	}
	if pid != 0 {
		return fmt.Errorf("process %d is a CNI plugin that another daemon, or the one before this, has started: %w", pid, errdefs.ErrFailedPrecondition)
	}
	entries, err := os.ReadDir(c.stock.netNSDir())
	if err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("failed to look for pinned network namespaces: %w", err)
	}
	for _, entry := range entries {
		if id, ours := leaks.Pinned(entry.Name()); ours && !known[id] {
			return fmt.Errorf("%s/%s is of a podfsm on another containerd, or was left by this one: remove it if it is: %w", c.stock.netNSDir(), entry.Name(), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// unshared fails when libcni's cache tells of an attachment to a network that isn't this containerd's.
func unshared(cached []cni.Attached, known map[string]bool) error {
	if id, found := cni.Foreign(cached, known); found {
		return fmt.Errorf("libcni's cache has an attachment of container %q, which this containerd doesn't know: another runtime shares the network: %w", id, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// valid are the attachments that a network keeps, where it is called ifName today. To name one that isn't there does no harm.
func valid(known map[string]bool, cached []cni.Attached, ifName string) []cni.Attached {
	keep := map[cni.Attached]bool{}
	for _, a := range cached {
		keep[a] = true
	}
	for id := range known {
		keep[cni.Attached{ContainerID: id, IfName: ifName}] = true
		for i := range gcInterfaces {
			keep[cni.Attached{ContainerID: id, IfName: "eth" + strconv.Itoa(i)}] = true
		}
	}
	return slices.Collect(maps.Keys(keep))
}
