package owners

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// image is an image of two layers: the second changes and hides some of the first.
type image struct {
	dir    string
	layers []string // the upper one first
}

func newImage(t testing.TB, random *rand.Rand, files int) *image {
	dir := t.TempDir()
	i := &image{dir: dir, layers: []string{filepath.Join(dir, "upper"), filepath.Join(dir, "lower")}}
	for _, layer := range i.layers {
		require.NoError(t, os.Mkdir(layer, 0o755))
	}
	f := &forest{t: t, random: random, root: i.layers[1]}
	f.grow(files / 2)

	merged, unmount := i.overlay(t, i.layers[1:], i.layers[0])
	defer unmount()
	f.root = merged
	rebase := func(paths []string) {
		for n, path := range paths {
			paths[n] = merged + strings.TrimPrefix(path, i.layers[1])
		}
	}
	rebase(f.dirs)
	rebase(f.files)
	f.prune()
	f.grow(files / 2)
	return i
}

// overlay mounts layers, the upper one first, until the test ends or before. What is written goes to a directory of its own, if any.
func (i *image) overlay(t testing.TB, layers []string, upper string, options ...string) (merged string, unmount func()) {
	t.Helper()
	options = append(options, "lowerdir="+strings.Join(layers, ":"))
	var work string
	if upper != "" {
		work = i.newDir(t, "work")
		options = append(options, "upperdir="+upper, "workdir="+work)
	}
	merged = t.TempDir()
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
	require.NoError(t, m.Mount(merged))
	unmount = sync.OnceFunc(func() {
		require.NoError(t, mount.Unmount(merged, 0))
		// The names that an index gives to hard linked files count as links.
		require.NoError(t, os.RemoveAll(work))
	})
	t.Cleanup(unmount)
	return merged, unmount
}

func (i *image) newDir(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp(i.dir, name)
	require.NoError(t, err)
	return dir
}

// podMaps are maps of one and of several extents.
var podMaps = []Map{podMap, {
	UIDs: []specs.LinuxIDMapping{{ContainerID: 1000, HostID: 400000, Size: 64536}, {ContainerID: 0, HostID: 500000, Size: 1000}},
	GIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1 << 31, Size: 33}, {ContainerID: 33, HostID: 600000, Size: 65536 - 33}},
}}

// Whatever is in an image, a process in the user namespace sees it as it is in the image.
func TestStrategies(t *testing.T) {
	strategies := map[string]func(*image, testing.TB, Map) string{
		"idmap":    (*image).idmapped,
		"metacopy": func(i *image, t testing.TB, m Map) string { return i.shifted(t, m, "metacopy=on") },
		"chown":    func(i *image, t testing.TB, m Map) string { return i.shifted(t, m, "metacopy=off") },
	}
	for seed := range uint64(8) {
		i := newImage(t, rand.New(rand.NewPCG(seed, 0)), 300)
		untouched, _ := i.overlay(t, i.layers, "")
		truth, err := look(untouched)
		require.NoError(t, err)
		for _, name := range slices.Sorted(maps.Keys(strategies)) {
			for n, m := range podMaps {
				t.Run(fmt.Sprintf("seed %d, %s, map %d", seed, name, n), func(t *testing.T) {
					requireTree(t, truth, lookInside(t, strategies[name](i, t, m), m), name)
					after, err := look(untouched)
					require.NoError(t, err)
					require.Equal(t, truth, after, "the image changed")
				})
			}
		}
	}
}

// idmapped mounts the image as containerd's overlayfs does.
func (i *image) idmapped(t testing.TB, m Map) (merged string) {
	merged, _ = i.overlay(t, i.layers, "", "uidmap="+label(m.UIDs), "gidmap="+label(m.GIDs))
	return merged
}

func label(extents []specs.LinuxIDMapping) string {
	var parts []string
	for _, e := range extents {
		parts = append(parts, fmt.Sprintf("%d:%d:%d", e.ContainerID, e.HostID, e.Size))
	}
	return strings.Join(parts, ",")
}

// shifted shifts a copy of the image into a layer of its own and mounts that as a pod would.
func (i *image) shifted(t testing.TB, m Map, option string) (merged string) {
	layer := i.newDir(t, "shifted")
	var root unix.Stat_t
	require.NoError(t, unix.Stat(i.layers[0], &root))
	require.NoError(t, os.Chown(layer, int(root.Uid), int(root.Gid))) // as containerd does, and no more
	remap, unmount := i.overlay(t, i.layers, layer, "index=on", option)
	_, err := shiftDir(t, remap, m)
	require.NoError(t, err)
	unmount()
	merged, _ = i.overlay(t, append([]string{layer}, i.layers...), "", option)
	return merged
}

// requireTree compares what is seen inside with the truth. Of a hard linked file a shifted layer has only the paths that the image
// doesn't hide. Attributes take room, and where the kernel copies content it keeps holes of a MiB and more (copy_up.c).
func requireTree(t testing.TB, truth, seen map[string]file, strategy string) {
	t.Helper()
	require.Len(t, seen, len(truth))
	names := map[string]uint64{}
	for _, f := range truth {
		names[f.Same]++
	}
	for _, path := range slices.Sorted(maps.Keys(truth)) {
		want, got := truth[path], seen[path]
		room := want.Blocks + 8
		if strategy == "chown" {
			room += 1 << 20 / 512
		}
		require.LessOrEqual(t, got.Blocks, room, "%q: %+v", path, got)
		got.Blocks = want.Blocks
		if path == "." { // it is the layer's own, as in each of containerd's snapshots
			want, got = file{UID: want.UID, GID: want.GID}, file{UID: got.UID, GID: got.GID}
		}
		if strategy != "idmap" && want.Links > 0 {
			want.Links = names[want.Same]
		}
		require.Equal(t, want, got, "%q", path)
	}
}
