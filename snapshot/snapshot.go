// Package snapshot prepares the root filesystems of pause containers, with their
// owners mapped into the pod's user namespace.
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
	// StrategyNone: files keep the owners that the image gives them.
	StrategyNone remapping.Strategy = "none"
	// StrategyIDMap: the kernel maps the owners in the mount, nothing is copied.
	StrategyIDMap = remapping.IDMap
)

// CapabilityRemapIDs is how containerd's snapshotters say that they take id maps.
const CapabilityRemapIDs = "remap-ids"

// labelGCRoot makes containerd's garbage collector keep what nothing refers to.
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

// Request asks for one snapshot.
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
	// Strategy is StrategyNone, StrategyIDMap, or what podfsm's snapshotter took.
	Strategy remapping.Strategy
	// Parent is the chain id of the image's layers.
	Parent string
	// Work is what giving the image other owners took; none where nothing is copied
	// or it was done before.
	Work remapping.Work
}

// Prepare makes a writable snapshot on top of the image, which it unpacks when
// the snapshotter does not have it. A snapshot that an earlier attempt left under
// the key is kept when it has the same parent and id maps, else replaced.
//
// containerd's garbage collector leaves the snapshot alone, though no container
// refers to it yet: it stays until Remove.
//
// A snapshotter that can't take id maps, or is not there, is a FailedPrecondition
// error, as are ids of the image that aren't mapped.
func (p *Preparer) Prepare(ctx context.Context, r Request) (Result, error) {
	result, err := p.prepare(ctx, r)
	if err != nil {
		return Result{}, fmt.Errorf("failed to prepare snapshot %q: %w", r.Key, err)
	}
	return result, nil
}

// Remove removes a snapshot. It succeeds when there is none. The space comes
// free with containerd's next garbage collection.
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

// Mounts returns what mounts a snapshot that Prepare has made.
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

// Exists tells whether a snapshot exists.
func (p *Preparer) Exists(ctx context.Context, snapshotter, key string) (bool, error) {
	_, err := p.Parent(ctx, snapshotter, key)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// Parent returns the parent of a snapshot, as [Result] has it. Without the
// snapshot it is a NotFound error.
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

// Keys returns the keys of the snapshots that Prepare has made in a snapshotter,
// as far as that can be told: of writable snapshots that the garbage collector
// has to leave alone.
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

// Ready makes what a snapshot of the request's image with its id maps will stand on,
// unpacking the image where the snapshotter does not have it. It is for snapshots
// that somebody else prepares, which would hold up all others meanwhile. release is
// to be called after that. The request's key and annotations don't matter. Errors
// are those of Prepare.
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

// ready has podfsm's snapshotter do its work before the snapshot is prepared. For
// any other snapshotter, and without id maps, there is nothing to do.
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

// unpacked runs what needs the image unpacked, and unpacks it where that fails for
// the lack of it.
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
		return nil, fmt.Errorf("snapshotter %q is not loaded, check containerd's configuration and log: %w", name, errdefs.ErrFailedPrecondition)
	}
	return sn, nil
}

// strategy never falls back on changing the owners in a copy of the image, as
// containerd's client does.
func (p *Preparer) strategy(ctx context.Context, r Request) (remapping.Strategy, error) {
	if len(r.UIDs) == 0 && len(r.GIDs) == 0 {
		return StrategyNone, nil
	}
	if len(r.UIDs) == 0 || len(r.GIDs) == 0 {
		return "", fmt.Errorf("got %d uid and %d gid mappings, give both: %w", len(r.UIDs), len(r.GIDs), errdefs.ErrInvalidArgument)
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

// labels are the snapshot's. The id maps come from the request alone, and a
// pod's annotations don't name the snapshot: it could claim another's.
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
		// It returns no error.
		_ = containerd.WithUserNSRemapperLabels(r.UIDs, r.GIDs)(&remap)
	}
	return labels
}

// labelSnapshotRef is the label of unpacked layers; containerd has a name for it since 2.4.
const labelSnapshotRef = "containerd.io/snapshot.ref"

// prepareOnce prepares a snapshot from a parent that exists, else it returns a
// NotFound error.
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
	ctx, done, err := p.client.WithLease(ctx) // for the layers that nothing refers to yet
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires by itself
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
	// Also after a failure, because the unpacker works in the background.
	_, waitErr := unpacker.Wait()
	return errors.Join(err, waitErr)
}
