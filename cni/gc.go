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

// GC lets the plugins of a network free everything that doesn't belong to an attachment in valid
// (CNI specification 1.1, GC). Networks of an older version, and networks with disableGC, are
// skipped. An error of one plugin doesn't stop the others.
//
// IPAM plugins are run after the plugins that name them. By the specification, those should run
// them, but the reference plugins up to 1.10 don't, and no address would ever be freed. To run GC
// twice is harmless.
//
// The caller must make sure that no runtime runs an ADD or DEL of the network at the same time.
//
// Errors: FailedPrecondition when a plugin is missing; DeadlineExceeded or Canceled when a plugin
// was killed; otherwise the plugins' own.
func (d *Driver) GC(ctx context.Context, config Config, network Network, valid []Attached) error {
	list, err := network.list()
	if err != nil {
		return fmt.Errorf("configuration of CNI network %q is invalid: %w: %w", network.Name, err, errdefs.ErrFailedPrecondition)
	}
	if wanted, err := collected(list); err != nil || !wanted {
		return err
	}
	if valid == nil {
		valid = []Attached{} // encoded as [], not as null
	}
	values := map[string]any{"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid} // cni#1101: two names were published
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

// Collected reports whether GC would do anything on a network.
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

// EndGC kills what an earlier process has left running of a GC or a STATUS: its list of valid
// attachments is outdated. Do not call it while this driver runs one.
func (d *Driver) EndGC(ctx context.Context) error { return end(ctx, d.groups, noSandbox, 0, never) }

// Cached returns the attachments in libcni's cache by network. Runtimes that use libcni keep theirs
// there: containerd's own pods, CRI-O, nerdctl. podfsm's are not among them.
func Cached() (map[string][]Attached, error) { return cachedIn(CacheDir()) }

// CacheDir is libcni's default directory for its cache.
func CacheDir() string { return libcni.CacheDir }

// Foreign returns a container of cached attachments that isn't among the known ones of a runtime:
// it belongs to another runtime.
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
