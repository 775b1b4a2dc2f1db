// Package snapshot prepares the root filesystems of pause containers, with their owners mapped into
// the pod's user namespace.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/semaphore"

	"github.com/podfsm/podfsm/snapshot/owners"
	"github.com/podfsm/podfsm/snapshot/remapping"
)

const (
	// StrategyNone: files keep the owners of the image.
	StrategyNone remapping.Strategy = "none"
	// StrategyIDMap: the kernel maps the owners in the mount, nothing is copied.
	StrategyIDMap = remapping.IDMap
)

// CapabilityRemapIDs is the capability of containerd's snapshotters that support id maps.
const CapabilityRemapIDs = "remap-ids"

// labelGCRoot keeps containerd's garbage collector from removing unreferenced resources.
const labelGCRoot = "containerd.io/gc.root"

// parallelLayers bounds the layers of an image that are unpacked at a time.
const parallelLayers = 3

// Preparer prepares and removes snapshots by name.
//
// Its methods take a context with a containerd namespace, and are safe for
// concurrent use on different keys. Their errors keep containerd's classes.
type Preparer struct {
	client *containerd.Client
}

// NewPreparer returns a preparer of the client's snapshotters.
func NewPreparer(client *containerd.Client) *Preparer {
	return &Preparer{client: client}
}

// Request is a request for a snapshot.
type Request struct {
	// Key names the snapshot: the sandbox's id.
	Key         string
	Snapshotter string
	Image       containerd.Image

	// UIDs and GIDs are the pod's id maps, both or neither.
	UIDs, GIDs []specs.LinuxIDMapping

	// Annotations are the pod's. Those that address the snapshotter
	// (snapshots.FilterInheritedLabels) become labels of the snapshot.
	Annotations map[string]string

	// AppendImageAnnotations tells the snapshotter where an image comes from
	// when it is unpacked, which remote snapshotters need.
	AppendImageAnnotations bool
}

// Result says how a snapshot was made.
type Result struct {
	// Strategy is StrategyNone, StrategyIDMap, or the strategy of podfsm's snapshotter.
	Strategy remapping.Strategy
	// Parent is the chain id of the image's layers.
	Parent string
	// Work is the cost of remapping the image, zero if nothing was copied or a layer was reused.
	Work remapping.Work
}

// Prepare makes a writable snapshot on top of the image, and unpacks the image if the snapshotter
// lacks it. A snapshot that an earlier try left under the key is kept if it has the same parent
// and id maps, and otherwise replaced.
//
// containerd's garbage collector keeps the snapshot until Remove, even though no container refers
// to it yet.
//
// Errors: FailedPrecondition if the snapshotter is not loaded or does not support id maps, or if
// ids of the image are not mapped.
func (p *Preparer) Prepare(ctx context.Context, r Request) (Result, error) {
	result, err := p.prepare(ctx, r)
	if err != nil {
		return Result{}, fmt.Errorf("failed to prepare snapshot %q: %w", r.Key, err)
	}
	return result, nil
}

// Remove removes a snapshot. It is idempotent. containerd's next garbage collection frees the
// space.
func (p *Preparer) Remove(ctx context.Context, snapshotter, key string) error {
	sn, err := p.snapshotter(snapshotter)
	if err != nil {
		return fmt.Errorf("failed to remove snapshot %q: %w", key, err)
	}
	if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("failed to remove snapshot %q: %w", key, err)
	}
	return nil
}

// Mounts returns the mounts of a snapshot made by Prepare.
func (p *Preparer) Mounts(ctx context.Context, snapshotter, key string) ([]mount.Mount, error) {
	sn, err := p.snapshotter(snapshotter)
	if err != nil {
		return nil, fmt.Errorf("failed to get the mounts of snapshot %q: %w", key, err)
	}
	mounts, err := sn.Mounts(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("failed to get the mounts of snapshot %q: %w", key, err)
	}
	return mounts, nil
}

// Exists reports whether a snapshot exists.
func (p *Preparer) Exists(ctx context.Context, snapshotter, key string) (bool, error) {
	_, err := p.Parent(ctx, snapshotter, key)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// Parent returns the parent of a snapshot, as in [Result]. A missing snapshot is a NotFound error.
func (p *Preparer) Parent(ctx context.Context, snapshotter, key string) (string, error) {
	sn, err := p.snapshotter(snapshotter)
	if err != nil {
		return "", fmt.Errorf("failed to look for snapshot %q: %w", key, err)
	}
	info, err := sn.Stat(ctx, key)
	if err != nil {
		return "", fmt.Errorf("failed to look for snapshot %q: %w", key, err)
	}
	return info.Parent, nil
}

// Keys returns the keys of the snapshots of a snapshotter that Prepare may have made: writable ones
// that the garbage collector keeps.
func (p *Preparer) Keys(ctx context.Context, snapshotter string) ([]string, error) {
	sn, err := p.snapshotter(snapshotter)
	if err != nil {
		return nil, fmt.Errorf("failed to list snapshots: %w", err)
	}
	var keys []string
	err = sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindActive && info.Labels[labelGCRoot] != "" {
			keys = append(keys, info.Name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("failed to list the snapshots of %q: %w", snapshotter, err)
	}
	return keys, nil
}

func (p *Preparer) prepare(ctx context.Context, r Request) (Result, error) {
	sn, err := p.snapshotter(r.Snapshotter)
	if err != nil {
		return Result{}, err
	}
	strategy, err := p.strategy(ctx, r)
	if err != nil {
		return Result{}, err
	}
	layers, err := r.Image.RootFS(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("failed to read the layers of image %q: %w", r.Image.Name(), err)
	}
	parent := identity.ChainID(layers).String()
	result, labels := Result{Strategy: strategy, Parent: parent}, r.labels()
	err = p.unpacked(ctx, sn, r, func() error {
		ready, err := r.ready(ctx, sn, parent)
		if err != nil {
			return err
		}
		defer ready.Release()
		if ready.Strategy != "" {
			result.Strategy, result.Work = ready.Strategy, ready.Work
		}
		return prepareOnce(ctx, sn, r.Key, parent, labels)
	})
	if err != nil {
		return Result{}, err
	}
	return result, nil
}

// Ready makes the parent of a snapshot of the request's image with its id maps, and unpacks the
// image if needed. It is for snapshots that containerd's service prepares, which would block other
// callers meanwhile. The caller calls release after that. The request's key and annotations are
// ignored. Errors are those of Prepare.
func (p *Preparer) Ready(ctx context.Context, r Request) (release func(), err error) {
	sn, err := p.snapshotter(r.Snapshotter)
	if err != nil {
		return nil, err
	}
	layers, err := r.Image.RootFS(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to read the layers of image %q: %w", r.Image.Name(), err)
	}
	var ready remapping.Ready
	err = p.unpacked(ctx, sn, r, func() (err error) {
		ready, err = r.ready(ctx, sn, identity.ChainID(layers).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q ready: %w", r.Image.Name(), err)
	}
	return ready.Release, nil
}

// ready makes the parent of a snapshot in podfsm's snapshotter. For other snapshotters, and without
// id maps, it does nothing.
func (r Request) ready(ctx context.Context, sn snapshots.Snapshotter, parent string) (remapping.Ready, error) {
	ready := remapping.Ready{Release: func() {}}
	if len(r.UIDs) == 0 {
		return ready, nil
	}
	remapped, ok, err := remapping.Prepared(ctx, sn, parent, owners.Map{UIDs: r.UIDs, GIDs: r.GIDs})
	if ok {
		ready = remapped
	}
	return ready, err
}

// unpacked calls a function that needs the image to be unpacked. If the function fails because it
// is not, unpacked unpacks it and retries.
func (p *Preparer) unpacked(ctx context.Context, sn snapshots.Snapshotter, r Request, f func() error) error {
	err := f()
	if !errdefs.IsNotFound(err) {
		return err
	}
	if err := p.unpack(ctx, sn, r); err != nil {
		return fmt.Errorf("failed to unpack image %q: %w", r.Image.Name(), err)
	}
	return f()
}

func (p *Preparer) snapshotter(name string) (snapshots.Snapshotter, error) {
	sn := p.client.SnapshotService(name)
	if sn == nil {
		return nil, fmt.Errorf("snapshotter %q is not loaded; check containerd's configuration and log: %w", name, errdefs.ErrFailedPrecondition)
	}
	return sn, nil
}

// strategy returns the strategy for a request. It never falls back to changing owners in a copy of
// the image, as containerd's client does.
func (p *Preparer) strategy(ctx context.Context, r Request) (remapping.Strategy, error) {
	if len(r.UIDs) == 0 && len(r.GIDs) == 0 {
		return StrategyNone, nil
	}
	if len(r.UIDs) == 0 || len(r.GIDs) == 0 {
		return "", fmt.Errorf("got %d uid and %d gid mappings; both are required: %w", len(r.UIDs), len(r.GIDs), errdefs.ErrInvalidArgument)
	}
	capabilities, err := p.client.GetSnapshotterCapabilities(ctx, r.Snapshotter)
	if err != nil {
		return "", err
	}
	if !slices.Contains(capabilities, CapabilityRemapIDs) {
		return "", fmt.Errorf("snapshotter %q can't map ids on this node, "+
			"pods with a user namespace need overlayfs on Linux 5.19 or later with a filesystem that supports idmapped mounts, "+
			"or podfsm's snapshotter (snapshotter = \"podfsm\" in the runtime handler): %w",
			r.Snapshotter, errdefs.ErrFailedPrecondition)
	}
	return StrategyIDMap, nil
}

// labels returns the labels of the snapshot. The id maps come from the request alone. An annotation
// must not name the snapshot: it could claim another pod's.
func (r Request) labels() map[string]string {
	labels := snapshots.FilterInheritedLabels(r.Annotations)
	if labels == nil {
		labels = map[string]string{}
	}
	delete(labels, labelSnapshotRef)
	delete(labels, snapshots.LabelSnapshotUIDMapping)
	delete(labels, snapshots.LabelSnapshotGIDMapping)
	labels[labelGCRoot] = time.Now().UTC().Format(time.RFC3339)
	if len(r.UIDs) > 0 {
		remap := snapshots.Info{Labels: labels}
		// This never returns an error.
		_ = containerd.WithUserNSRemapperLabels(r.UIDs, r.GIDs)(&remap)
	}
	return labels
}

// labelSnapshotRef is the label of unpacked layers. containerd 2.4 and later export the name.
const labelSnapshotRef = "containerd.io/snapshot.ref"

// prepareOnce prepares a snapshot. A missing parent is a NotFound error.
func prepareOnce(ctx context.Context, sn snapshots.Snapshotter, key, parent string, labels map[string]string) error {
	_, err := sn.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	old, err := sn.Stat(ctx, key)
	if err != nil {
		return err
	}
	if isSame(old, parent, labels) {
		return nil
	}
	if err := sn.Remove(ctx, key); err != nil {
		return err
	}
	_, err = sn.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
	return err
}

func isSame(old snapshots.Info, parent string, labels map[string]string) bool {
	return old.Kind == snapshots.KindActive &&
		old.Labels[labelGCRoot] != "" &&
		old.Parent == parent &&
		old.Labels[snapshots.LabelSnapshotUIDMapping] == labels[snapshots.LabelSnapshotUIDMapping] &&
		old.Labels[snapshots.LabelSnapshotGIDMapping] == labels[snapshots.LabelSnapshotGIDMapping]
}

// unpack extracts the layers of an image that the snapshotter lacks.
func (p *Preparer) unpack(ctx context.Context, sn snapshots.Snapshotter, r Request) error {
	ctx, done, err := p.client.WithLease(ctx) // keeps layers without references
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // the lease expires by itself
	capabilities, err := p.client.GetSnapshotterCapabilities(ctx, r.Snapshotter)
	if err != nil {
		return err
	}
	content, platform := r.Image.ContentStore(), platforms.Default()
	unpacker, err := unpack.NewUnpacker(ctx, content,
		unpack.WithUnpackPlatform(unpack.Platform{
			Platform:                platform,
			SnapshotterKey:          r.Snapshotter,
			Snapshotter:             sn,
			SnapshotterCapabilities: capabilities,
			Applier:                 p.client.DiffService(),
		}),
		unpack.WithUnpackLimiter(semaphore.NewWeighted(parallelLayers)))
	if err != nil {
		return err
	}
	var handler images.Handler = images.LimitManifests(images.FilterPlatforms(images.ChildrenHandler(content), platform), platform, 1)
	if r.AppendImageAnnotations {
		handler = snapshotters.AppendInfoHandlerWrapper(r.Image.Name())(handler)
	}
	err = images.Dispatch(ctx, unpacker.Unpack(handler), nil, r.Image.Target())
	// Wait even after a failure: the unpacker works in the background.
	_, waitErr := unpacker.Wait()
	return errors.Join(err, waitErr)
}
