package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/introspection"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	imagespecs "github.com/opencontainers/image-spec/specs-go"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"github.com/podfsm/podfsm/internal/roottest"
)

const overlayfs = "overlayfs"

var (
	podUIDs = []specs.LinuxIDMapping{{HostID: 131072, Size: 65536}}
	podGIDs = []specs.LinuxIDMapping{{HostID: 262144, Size: 65536}}
)

// node is containerd's stores and its overlayfs snapshotter without the daemon.
type node struct {
	ctx      context.Context
	client   *containerd.Client
	db       *metadata.DB
	plugins  *plugins
	image    containerd.Image
	chainIDs []string // of the image's layers
}

func newNode(t *testing.T) *node {
	t.Helper()
	roottest.Require(t)
	dir := t.TempDir()
	ctx := namespaces.WithNamespace(t.Context(), "test")

	contents, err := local.NewStore(filepath.Join(dir, "content"))
	require.NoError(t, err)
	sn, err := overlay.NewSnapshotter(filepath.Join(dir, overlayfs), overlay.WithRemapIDs)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sn.Close()) })
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, bdb.Close()) })
	db := metadata.NewDB(bdb, contents, map[string]snapshots.Snapshotter{overlayfs: sn})
	require.NoError(t, db.Init(ctx))

	n := &node{
		ctx:     ctx,
		db:      db,
		plugins: &plugins{capabilities: []string{"remap-ids", "rebase"}},
	}
	n.client, err = containerd.New("", containerd.WithServices(
		containerd.WithContentStore(db.ContentStore()),
		containerd.WithSnapshotters(map[string]snapshots.Snapshotter{overlayfs: db.Snapshotter(overlayfs)}),
		containerd.WithDiffService(applier{Applier: apply.NewFileSystemApplier(db.ContentStore())}),
		containerd.WithLeasesService(metadata.NewLeaseManager(db)),
		containerd.WithIntrospectionService(n.plugins),
	))
	require.NoError(t, err)

	n.addImage(t)
	return n
}

// plugins answers what capabilities every snapshotter has.
type plugins struct {
	introspection.Service
	capabilities []string
}

func (p *plugins) Plugins(context.Context, ...string) (*introspectionapi.PluginsResponse, error) {
	return &introspectionapi.PluginsResponse{Plugins: []*introspectionapi.Plugin{{Capabilities: p.capabilities}}}, nil
}

type applier struct {
	diff.Applier
	diff.Comparer
}

// addImage writes an image of two layers into the content store.
func (n *node) addImage(t *testing.T) {
	t.Helper()
	config := imagespec.Image{Platform: platforms.DefaultSpec(), RootFS: imagespec.RootFS{Type: "layers"}}
	manifest := imagespec.Manifest{Versioned: imagespecs.Versioned{SchemaVersion: 2}, MediaType: imagespec.MediaTypeImageManifest}
	for _, name := range []string{"pause", "etc-passwd"} {
		layer := tarball(t, name)
		manifest.Layers = append(manifest.Layers, n.addBlob(t, imagespec.MediaTypeImageLayer, layer, nil))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(layer))
		n.chainIDs = append(n.chainIDs, identity.ChainID(config.RootFS.DiffIDs).String())
	}
	manifest.Config = n.addBlob(t, imagespec.MediaTypeImageConfig, encode(t, config), nil)
	refs := map[string]string{
		"containerd.io/gc.ref.content.config": manifest.Config.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    manifest.Layers[0].Digest.String(),
		"containerd.io/gc.ref.content.l.1":    manifest.Layers[1].Digest.String(),
	}
	target := n.addBlob(t, imagespec.MediaTypeImageManifest, encode(t, manifest), refs)
	image, err := metadata.NewImageStore(n.db).Create(n.ctx, images.Image{Name: "test/pause:1", Target: target})
	require.NoError(t, err)
	n.image = containerd.NewImage(n.client, image)
}

func (n *node) addBlob(t *testing.T, mediaType string, blob []byte, labels map[string]string) imagespec.Descriptor {
	t.Helper()
	desc := imagespec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	require.NoError(t, content.WriteBlob(n.ctx, n.db.ContentStore(), desc.Digest.String(), bytes.NewReader(blob), desc, content.WithLabels(labels)))
	return desc
}

// addSnapshot makes a snapshot named "pod" past the preparer; the kind is active
// where none is given.
func (n *node) addSnapshot(t *testing.T, kind snapshots.Kind, parent string, opts ...snapshots.Opt) {
	t.Helper()
	sn := n.client.SnapshotService(overlayfs)
	switch kind {
	case snapshots.KindView:
		_, err := sn.View(n.ctx, "pod", parent, opts...)
		require.NoError(t, err)
	case snapshots.KindCommitted:
		_, err := sn.Prepare(n.ctx, "active", parent, opts...)
		require.NoError(t, err)
		require.NoError(t, sn.Commit(n.ctx, "pod", "active", opts...))
	default:
		_, err := sn.Prepare(n.ctx, "pod", parent, opts...)
		require.NoError(t, err)
	}
}

func (n *node) stat(t *testing.T, key string) snapshots.Info {
	t.Helper()
	info, err := n.client.SnapshotService(overlayfs).Stat(n.ctx, key)
	require.NoError(t, err)
	return info
}

func (n *node) exists(t *testing.T, key string) bool {
	t.Helper()
	exists, err := NewPreparer(n.client).Exists(n.ctx, overlayfs, key)
	require.NoError(t, err)
	return exists
}

// owner mounts a snapshot and returns who owns a file there.
func (n *node) owner(t *testing.T, key, file string) (uid, gid uint32) {
	t.Helper()
	mounts, err := n.client.SnapshotService(overlayfs).Mounts(n.ctx, key)
	require.NoError(t, err)
	require.NoError(t, mount.WithTempMount(n.ctx, mounts, func(root string) error {
		info, err := os.Lstat(filepath.Join(root, file))
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		uid, gid = stat.Uid, stat.Gid
		return nil
	}))
	return uid, gid
}

func tarball(t *testing.T, name string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Uid: 7, Gid: 8, Size: int64(len(name))}))
	_, err := w.Write([]byte(name))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return buf.Bytes()
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	require.NoError(t, err)
	return text
}

func TestPrepare(t *testing.T) {
	n := newNode(t)
	p := NewPreparer(n.client)
	require.False(t, n.exists(t, "pod"))

	result, err := p.Prepare(n.ctx, Request{Key: "pod", Snapshotter: overlayfs, Image: n.image})
	require.NoError(t, err)
	require.Equal(t, Result{Strategy: StrategyNone, Parent: n.chainIDs[1]}, result)
	require.True(t, n.exists(t, "pod"))
	require.Equal(t, n.chainIDs[1], n.stat(t, "pod").Parent)
	for _, file := range []string{"pause", "etc-passwd"} {
		uid, gid := n.owner(t, "pod", file)
		require.EqualValues(t, 7, uid)
		require.EqualValues(t, 8, gid)
	}
	_, err = n.client.SnapshotService(overlayfs).Prepare(n.ctx, "foreign", n.chainIDs[1])
	require.NoError(t, err)
	keys, err := p.Keys(n.ctx, overlayfs)
	require.NoError(t, err)
	require.Equal(t, []string{"pod"}, keys)
	_, err = p.Keys(n.ctx, "none")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)

	require.NoError(t, p.Remove(n.ctx, overlayfs, "pod"))
	require.False(t, n.exists(t, "pod"))
	require.NoError(t, p.Remove(n.ctx, overlayfs, "pod"), "a second time")
	require.NoError(t, p.Remove(n.ctx, overlayfs, "never-made"))
	require.True(t, n.exists(t, n.chainIDs[1]), "the image stays unpacked")
}

func TestPrepareMapsIDs(t *testing.T) {
	n := newNode(t)
	result, err := NewPreparer(n.client).Prepare(n.ctx, Request{
		Key: "pod", Snapshotter: overlayfs, Image: n.image, UIDs: podUIDs, GIDs: podGIDs,
	})
	require.NoError(t, err)
	require.Equal(t, Result{Strategy: StrategyIDMap, Parent: n.chainIDs[1]}, result)
	require.Subset(t, n.stat(t, "pod").Labels, map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:131072:65536",
		snapshots.LabelSnapshotGIDMapping: "0:262144:65536",
	})

	uid, gid := n.owner(t, "pod", "pause")
	require.EqualValues(t, 131072+7, uid)
	require.EqualValues(t, 262144+8, gid)
	require.Empty(t, n.stat(t, n.chainIDs[1]).Labels[snapshots.LabelSnapshotUIDMapping], "the image's layers are everyone's")
}

func TestPrepareRefusals(t *testing.T) {
	n := newNode(t)
	p := NewPreparer(n.client)
	request := Request{Key: "pod", Snapshotter: overlayfs, Image: n.image, UIDs: podUIDs, GIDs: podGIDs}
	for name, tc := range map[string]struct {
		change       func(*Request)
		capabilities []string
		class        error
		text         string
	}{
		"snapshotter that would copy": {
			capabilities: []string{"only-remap-ids"},
			class:        errdefs.ErrFailedPrecondition,
			text:         `snapshotter "overlayfs" can't map ids on this node`,
		},
		"uids alone": {
			change: func(r *Request) { r.GIDs = nil },
			class:  errdefs.ErrInvalidArgument,
			text:   "got 1 uid and 0 gid mappings",
		},
		"gids alone": {
			change: func(r *Request) { r.UIDs = nil },
			class:  errdefs.ErrInvalidArgument,
			text:   "got 0 uid and 1 gid mappings",
		},
		"unknown snapshotter": {
			change: func(r *Request) { r.Snapshotter = "zfs" },
			class:  errdefs.ErrFailedPrecondition,
			text:   `snapshotter "zfs" is not loaded`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			n.plugins.capabilities = tc.capabilities
			r := request
			if tc.change != nil {
				tc.change(&r)
			}
			_, err := p.Prepare(n.ctx, r)
			require.ErrorIs(t, err, tc.class)
			require.ErrorContains(t, err, tc.text)
			require.ErrorContains(t, err, `snapshot "pod"`)
			require.False(t, n.exists(t, "pod"))
			require.False(t, n.exists(t, n.chainIDs[0]), "not even unpacked")
		})
	}

	err := p.Remove(n.ctx, "zfs", "pod")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "unknown is not gone")
	_, err = p.Exists(n.ctx, "zfs", "pod")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestPrepareWithoutContent(t *testing.T) {
	n := newNode(t)
	manifest, err := images.Manifest(n.ctx, n.db.ContentStore(), n.image.Target(), platforms.Default())
	require.NoError(t, err)
	require.NoError(t, n.db.ContentStore().Delete(n.ctx, manifest.Layers[1].Digest))

	_, err = NewPreparer(n.client).Prepare(n.ctx, Request{Key: "pod", Snapshotter: overlayfs, Image: n.image})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, `failed to unpack image "test/pause:1"`)
	require.False(t, n.exists(t, "pod"))
}

func TestPrepareAfterAnEarlierTry(t *testing.T) {
	root := map[string]string{labelGCRoot: "2006-01-02T15:04:05Z"}
	annotated := map[string]string{labelGCRoot: root[labelGCRoot], "containerd.io/snapshot/x": "y"}
	maps := containerd.WithUserNSRemapperLabels
	for name, tc := range map[string]struct {
		parent int // layer of the earlier snapshot
		opts   []snapshots.Opt
		kind   snapshots.Kind
		remap  bool // what is asked for now
		kept   bool
	}{
		"the same":                       {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root)}, kept: true},
		"the same id maps":               {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root), maps(podUIDs, podGIDs)}, remap: true, kept: true},
		"other annotations":              {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(annotated)}, kept: true},
		"open to garbage collection":     {parent: 1},
		"no id maps":                     {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root)}, remap: true},
		"other uids":                     {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root), maps(podGIDs, podGIDs)}, remap: true},
		"other gids":                     {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root), maps(podUIDs, podUIDs)}, remap: true},
		"id maps that are not asked for": {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root), maps(podUIDs, podGIDs)}},
		"another parent":                 {parent: 0, opts: []snapshots.Opt{snapshots.WithLabels(root)}},
		"a view":                         {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root)}, kind: snapshots.KindView},
		"a committed snapshot":           {parent: 1, opts: []snapshots.Opt{snapshots.WithLabels(root)}, kind: snapshots.KindCommitted},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := NewPreparer(n.client)
			_, err := p.Prepare(n.ctx, Request{Key: "unpack", Snapshotter: overlayfs, Image: n.image})
			require.NoError(t, err)
			n.addSnapshot(t, tc.kind, n.chainIDs[tc.parent], tc.opts...)
			before := n.stat(t, "pod")

			r := Request{Key: "pod", Snapshotter: overlayfs, Image: n.image}
			if tc.remap {
				r.UIDs, r.GIDs = podUIDs, podGIDs
			}
			_, err = p.Prepare(n.ctx, r)
			require.NoError(t, err)

			after := n.stat(t, "pod")
			require.Equal(t, tc.kept, before.Created.Equal(after.Created))
			require.Equal(t, snapshots.KindActive, after.Kind)
			require.Equal(t, n.chainIDs[1], after.Parent)
			require.NotEmpty(t, after.Labels[labelGCRoot])
			if tc.remap {
				uid, gid := n.owner(t, "pod", "pause")
				require.EqualValues(t, 131072+7, uid)
				require.EqualValues(t, 262144+8, gid)
			} else {
				require.NotContains(t, after.Labels, snapshots.LabelSnapshotUIDMapping)
			}
		})
	}
}

func TestPreparePassesAnnotationsOn(t *testing.T) {
	n := newNode(t)
	_, err := NewPreparer(n.client).Prepare(n.ctx, Request{
		Key: "pod", Snapshotter: overlayfs, Image: n.image,
		Annotations: map[string]string{
			"containerd.io/snapshot/nydus.speed": "high",
			"example.com/team":                   "blue",
			// A pod that would like files of other owners, or another's snapshot.
			snapshots.LabelSnapshotUIDMapping: "0:0:4294967294",
			snapshots.LabelSnapshotGIDMapping: "0:0:4294967294",
			labelSnapshotRef:                  n.chainIDs[1],
		},
	})
	require.NoError(t, err)
	labels := n.stat(t, "pod").Labels
	delete(labels, labelGCRoot)
	require.Equal(t, map[string]string{"containerd.io/snapshot/nydus.speed": "high"}, labels)
}

func TestPrepareLeavesAnnotationsAlone(t *testing.T) {
	n := newNode(t)
	annotations := map[string]string{labelSnapshotRef: "x", "containerd.io/snapshot/a": "b"}
	_, err := NewPreparer(n.client).Prepare(n.ctx, Request{
		Key: "pod", Snapshotter: overlayfs, Image: n.image, UIDs: podUIDs, GIDs: podGIDs, Annotations: annotations,
	})
	require.NoError(t, err)
	require.Equal(t, map[string]string{labelSnapshotRef: "x", "containerd.io/snapshot/a": "b"}, annotations)
}

func TestPrepareAppendsImageAnnotations(t *testing.T) {
	for _, appended := range []bool{false, true} {
		n := newNode(t)
		_, err := NewPreparer(n.client).Prepare(n.ctx, Request{
			Key: "pod", Snapshotter: overlayfs, Image: n.image, AppendImageAnnotations: appended,
		})
		require.NoError(t, err)
		ref := n.stat(t, n.chainIDs[1]).Labels[snapshotters.TargetRefLabel]
		require.Equal(t, appended, ref == "test/pause:1", ref)
	}
}

func TestSnapshotOutlivesGarbageCollection(t *testing.T) {
	n := newNode(t)
	p := NewPreparer(n.client)
	_, err := p.Prepare(n.ctx, Request{Key: "pod", Snapshotter: overlayfs, Image: n.image})
	require.NoError(t, err)

	_, err = n.db.GarbageCollect(n.ctx)
	require.NoError(t, err)
	uid, _ := n.owner(t, "pod", "pause")
	require.EqualValues(t, 7, uid)

	require.NoError(t, p.Remove(n.ctx, overlayfs, "pod"))
	_, err = n.db.GarbageCollect(n.ctx)
	require.NoError(t, err)
	require.False(t, n.exists(t, "pod"))
	require.True(t, n.exists(t, n.chainIDs[1]), "the image refers to its layers")
	left, err := n.client.LeasesService().List(n.ctx)
	require.NoError(t, err)
	require.Empty(t, left, "unpacking leaves no lease")
}

func TestPrepareManyAtOnce(t *testing.T) {
	n := newNode(t)
	p := NewPreparer(n.client)
	var group errgroup.Group
	for i := range 8 {
		group.Go(func() error {
			_, err := p.Prepare(n.ctx, Request{
				Key: fmt.Sprintf("pod-%d", i), Snapshotter: overlayfs, Image: n.image, UIDs: podUIDs, GIDs: podGIDs,
			})
			return err
		})
	}
	require.NoError(t, group.Wait(), "all of them unpack the image")
	for i := range 8 {
		require.True(t, n.exists(t, fmt.Sprintf("pod-%d", i)))
	}
}
