package owners_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/snapshot/owners"
	"github.com/podfsm/podfsm/snapshot/remapping"
)

// podMaps are maps of one and of several extents.
var podMaps = []owners.Map{owners.PodMap, {
	UIDs: []specs.LinuxIDMapping{{ContainerID: 1000, HostID: 400000, Size: 64536}, {ContainerID: 0, HostID: 500000, Size: 1000}},
	GIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1 << 31, Size: 33}, {ContainerID: 33, HostID: 600000, Size: 65536 - 33}},
}}

// Whatever is in an image, a process in the user namespace sees it as it is in the image. PODFSM_FULL=1 tries more images.
func TestStrategies(t *testing.T) {
	images := 1
	if os.Getenv("PODFSM_FULL") != "" {
		images = 5
	}
	for seed := range uint64(images) {
		i := newImage(t, rand.New(rand.NewPCG(seed, 0)), 300)
		truth := i.unmapped(t)
		for _, strategy := range []remapping.Strategy{remapping.IDMap, remapping.Metacopy, remapping.Chown} {
			for n, m := range podMaps {
				t.Run(fmt.Sprintf("seed %d, %s, map %d", seed, strategy, n), func(t *testing.T) {
					requireTree(t, truth, i.mapped(t, strategy, m), strategy)
					require.Equal(t, truth, i.unmapped(t), "the image changed")
				})
			}
		}
	}
}

// image is in a snapshotter, in two layers: the second changes and hides some of the first.
type image struct{ root string }

func newImage(t *testing.T, random *rand.Rand, files int) image {
	t.Helper()
	i := image{root: filepath.Join(t.TempDir(), "snapshots")}
	forest := &owners.Forest{T: t, Random: random}
	i.with(t, "", func(ctx context.Context, sn *remapping.Snapshotter) {
		parent := ""
		for _, layer := range []string{"lower", "upper"} {
			mounts, err := sn.Prepare(ctx, "active", parent)
			require.NoError(t, err)
			mounted(t, mounts, func(dir string) {
				forest.Move(dir)
				if parent != "" {
					forest.Prune()
				}
				forest.Grow(files / 2)
			})
			require.NoError(t, sn.Commit(ctx, layer, "active"))
			parent = layer
		}
	})
	return i
}

// with opens the snapshotter.
func (i image) with(t *testing.T, strategy remapping.Strategy, f func(context.Context, *remapping.Snapshotter)) {
	t.Helper()
	sn := remapping.New(remapping.Config{Root: i.root, Strategy: strategy})
	defer func() { require.NoError(t, sn.Close()) }()
	f(context.Background(), sn)
}

// unmapped is what the node sees of the image.
func (i image) unmapped(t *testing.T) (tree map[string]owners.File) {
	t.Helper()
	i.with(t, "", func(ctx context.Context, sn *remapping.Snapshotter) {
		mounts, err := sn.View(ctx, "view", "upper")
		require.NoError(t, err)
		mounted(t, mounts, func(dir string) { tree, err = owners.Look(dir) })
		require.NoError(t, err)
		require.NoError(t, sn.Remove(ctx, "view"))
	})
	return tree
}

// mapped is what a user namespace sees of a pod's snapshot.
func (i image) mapped(t *testing.T, strategy remapping.Strategy, m owners.Map) (tree map[string]owners.File) {
	t.Helper()
	i.with(t, strategy, func(ctx context.Context, sn *remapping.Snapshotter) {
		mounts, err := sn.Prepare(ctx, "pod", "upper", snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotUIDMapping: label(m.UIDs), snapshots.LabelSnapshotGIDMapping: label(m.GIDs),
		}))
		require.NoError(t, err)
		mounted(t, mounts, func(dir string) { tree = owners.LookInside(t, dir, m) })
		require.NoError(t, sn.Remove(ctx, "pod"))
		require.NoError(t, sn.Cleanup(ctx))
	})
	return tree
}

func label(extents []specs.LinuxIDMapping) string {
	var parts []string
	for _, e := range extents {
		parts = append(parts, fmt.Sprintf("%d:%d:%d", e.ContainerID, e.HostID, e.Size))
	}
	return strings.Join(parts, ",")
}

// mounted calls f with what a snapshot's mounts show.
func mounted(t *testing.T, mounts []mount.Mount, f func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	defer func() { require.NoError(t, mount.UnmountAll(dir, 0)) }()
	f(dir)
}

// requireTree compares what is seen inside with the truth. Of a hard linked file a shifted layer has only the paths that the image
// doesn't hide. Attributes take room, and where the kernel copies content it keeps holes of a MiB and more (copy_up.c).
func requireTree(t *testing.T, truth, seen map[string]owners.File, strategy remapping.Strategy) {
	t.Helper()
	require.Len(t, seen, len(truth))
	names := map[string]uint64{}
	for _, f := range truth {
		names[f.Same]++
	}
	for _, path := range slices.Sorted(maps.Keys(truth)) {
		want, got := truth[path], seen[path]
		room := want.Blocks + 8
		if strategy == remapping.Chown {
			room += 1 << 20 / 512
		}
		require.LessOrEqual(t, got.Blocks, room, "%q: %+v", path, got)
		got.Blocks = want.Blocks
		if path == "." { // it is the snapshot's own, and containerd gives it to the pod's root
			want, got = owners.File{}, owners.File{UID: got.UID, GID: got.GID}
		}
		if strategy != remapping.IDMap && want.Links > 0 {
			want.Links = names[want.Same]
		}
		require.Equal(t, want, got, "%q", path)
	}
}
