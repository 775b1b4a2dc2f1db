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
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
)

const (
	// gcTimeout bounds CNI GC of all networks, and gcGrace the kill of the plugins after it.
	// containerd's start waits for both.
	gcTimeout = 5 * time.Second
	gcGrace   = time.Second
	// gcInterfaces is the number of interfaces that GC keeps at least per container, from eth0 on.
	// The interface of a network depends on the configuration at the time the pod was made.
	gcInterfaces = 8
)

// collectNetworks runs CNI GC on podfsm's networks. The plugins free what belongs to no container
// of this containerd, above all to podfsm pods whose ledger was lost. It must run before any undo
// and before containerd serves: the CNI specification forbids ADD and DEL during GC. It never fails
// the start.
func (c *Controller) collectNetworks(ctx context.Context, client *containerd.Client, wanted bool, sandboxes map[string]bool) {
	ctx, cancel := context.WithTimeoutCause(ctx, gcTimeout, fmt.Errorf("CNI GC took more than %s: %w", gcTimeout, context.DeadlineExceeded))
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := lifecycle.Protect(func() error { c.collect(ctx, client, wanted, sandboxes); return nil }); err != nil {
			log.G(ctx).WithError(err).Error("CNI GC failed")
		}
	}()
	select {
	case <-done:
	case <-time.After(gcTimeout + gcGrace):
		// Should the goroutine continue later, its ended ctx keeps it from doing anything.
		log.G(ctx).Error("CNI GC hangs, containerd starts without it")
	}
}

func (c *Controller) collect(ctx context.Context, client *containerd.Client, wanted bool, sandboxes map[string]bool) {
	if err := c.node.driver.EndGC(ctx); err != nil {
		log.G(ctx).WithError(err).Error("failed to end the CNI GC of the previous daemon")
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
			entry.WithError(reason).Warn("CNI GC skipped for network")
			continue
		}
		if err := c.node.driver.GC(ctx, n.config, n.Network, valid(known, cached[n.Name], n.IfName)); err != nil {
			entry.WithError(err).Warn("CNI GC of network failed")
			continue
		}
		entry.Infof("CNI GC of network completed, %d containers are valid", len(known))
	}
}

// configured is a network and the configuration that it was loaded from.
type configured struct {
	cni.Network
	config cni.Config
}

// networks returns the networks of podfsm's handlers that support GC, without duplicates.
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
			log.G(ctx).WithError(err).Debugf("no CNI network to collect for handler %q", name)
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

// sandboxIDs returns the ids of all sandboxes in the ledger and in containerd's store, of podfsm
// and of other controllers.
func sandboxIDs(saved []ledger.Sandbox, records, others map[ledger.Key]sandbox.Sandbox) map[string]bool {
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

// undisturbed fails while something unknown may use the node's networks, so that GC would race with
// it. It trusts only what root alone can make: processes as [cni.Driver.InFlight] chooses them, and
// the directory of pinned namespaces.
func (c *Controller) undisturbed(ctx context.Context, known map[string]bool) error {
	pid, err := c.node.driver.InFlight(ctx, cni.Config{BinDirs: c.stock.CNI.BinDirs})
	if err != nil {
		return fmt.Errorf("failed to look for running CNI plugins: %w", err)
	}
	if pid != 0 {
		return fmt.Errorf("process %d is a CNI plugin of another daemon or of the previous one: %w", pid, errdefs.ErrFailedPrecondition)
	}
	entries, err := os.ReadDir(c.stock.netNSDir())
	if err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("failed to look for pinned network namespaces: %w", err)
	}
	for _, entry := range entries {
		if id, ours := leaks.Pinned(entry.Name()); ours && !known[id] {
			return fmt.Errorf("pin %s/%s belongs to podfsm on another containerd, or is a leak of this one; if it is a leak, remove it: %w", c.stock.netNSDir(), entry.Name(), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// unshared fails if libcni's cache has an attachment to the network by a container that this
// containerd doesn't know.
func unshared(cached []cni.Attached, known map[string]bool) error {
	if id, found := cni.Foreign(cached, known); found {
		return fmt.Errorf("libcni's cache has an attachment of container %q, which this containerd doesn't know: another runtime shares the network: %w", id, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// valid returns the attachments that GC keeps in a network whose interface is ifName by today's
// configuration. An attachment that doesn't exist does no harm.
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
