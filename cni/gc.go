package cni

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/podfsm/podfsm/tracing"
)

// Attached is one interface of one container on one network, which GC must keep.
type Attached = types.GCAttachment

// GC has the plugins of a network free everything that isn't of an attachment in valid (CNI specification 1.1, GC). Networks of an
// older version, and those that say disableGC, are left alone. All plugins of the list are run, whatever the others say.
//
// The plugins for addresses are run after those that name them. The specification has the latter do that, but the reference plugins
// up to 1.10 don't, so that no address would ever be freed. A second GC of the same does no harm.
//
// It is the caller's to know that no ADD or DEL of the network runs beside it, by whatever runtime.
//
// Errors: FailedPrecondition when a plugin is missing; DeadlineExceeded or Canceled when one was ended; otherwise the plugins' own.
func (d *Driver) GC(ctx context.Context, config Config, network Network, valid []Attached) error {
	list, err := network.list()
	if err != nil {
		return fmt.Errorf("configuration of CNI network %q is invalid: %w: %w", network.Name, err, errdefs.ErrFailedPrecondition)
	}
	if wanted, err := collected(list); err != nil || !wanted {
		return err
	}
	if valid == nil {
		valid = []Attached{} // null would be no list
	}
	values := map[string]any{"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid} // cni#1101: a wrong name was published, too
	var errs []error
	for _, plugin := range list.Plugins {
		r := request{driver: d, list: list, plugin: plugin, binDirs: config.BinDirs, values: values}
		errs = append(errs, r.run(ctx, tracing.SpanCNIGC, "GC"))
		if ipam := plugin.Network.IPAM.Type; ipam != "" {
			network := *plugin.Network
			network.Type = ipam
			r.plugin = &libcni.PluginConfig{Network: &network, Bytes: plugin.Bytes}
			errs = append(errs, r.run(ctx, tracing.SpanCNIGC, "GC"))
		}
	}
	return errors.Join(errs...)
}

// Collected says whether GC would do anything on a network.
func (n Network) Collected() bool {
	list, err := n.list()
	if err != nil {
		return false
	}
	wanted, err := collected(list)
	return err == nil && wanted
}

func collected(list *libcni.NetworkConfigList) (bool, error) {
	known, err := since(list, "1.1.0")
	return known && !list.DisableGC, err
}

// EndGC ends what an earlier process has left running of a GC or a STATUS: what it takes for valid is outdated. It must not be called
// while this driver runs one.
func (d *Driver) EndGC(ctx context.Context) error { return end(ctx, d.groups, nobody, 0, never) }

// Cached are the attachments that runtimes which use libcni have noted in its cache, by network: containerd's own pods, those of CRI-O
// and nerdctl, but none of podfsm's.
func Cached() (map[string][]Attached, error) { return cachedIn(CacheDir()) }

// CacheDir is libcni's default directory for its cache.
func CacheDir() string { return libcni.CacheDir }

// Foreign is a container of cached attachments that isn't among those that a runtime knows: another runtime's.
func Foreign(cached []Attached, known map[string]bool) (id string, found bool) {
	for _, a := range cached {
		if !known[a.ContainerID] {
			return a.ContainerID, true
		}
	}
	return "", false
}

func cachedIn(dir string) (map[string][]Attached, error) {
	all, err := libcni.NewCNIConfigWithCacheDir(nil, dir, nil).GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("failed to read libcni's cache: %w", err)
	}
	cached := map[string][]Attached{}
	for _, a := range all {
		cached[a.Network] = append(cached[a.Network], Attached{ContainerID: a.ContainerID, IfName: a.IfName})
	}
	return cached, nil
}
