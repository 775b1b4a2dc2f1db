package remapping

import (
	"archive/tar"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// changePod does in a mounted pod what its processes would.
func (n *node) changePod(root string) {
	n.write(root, "file", 131072+7, 262144+8, 0o644)                      // copied up
	n.write(root, "new", 200000, 262144+1, 0o640)                         // 1000:1
	require.NoError(n.t, os.Remove(filepath.Join(root, "suid")))          // whiteout
	require.NoError(n.t, os.Chmod(filepath.Join(root, "caps"), 0o750))    // keeps its capabilities
	require.NoError(n.t, os.Lchown(filepath.Join(root, "a"), 131072, -1)) // with index=off no link of b any more, as ever
	require.NoError(n.t, os.Link(filepath.Join(root, "new"), filepath.Join(root, "dir/hard")))
	n.write(root, "newcaps", 131072, 262144, 0o755)
	caps := append([]byte{1, 0, 0, 3}, append(slices.Clone(capability[4:]), 0, 0, 2, 0)...) // as setcap in the pod does
	require.NoError(n.t, unix.Lsetxattr(filepath.Join(root, "newcaps"), "security.capability", caps, 0))
}

// entries are those of a layer, by name.
func entries(t *testing.T, store content.Store, layer imagespec.Descriptor) map[string]*tar.Header {
	t.Helper()
	reader, err := store.ReaderAt(t.Context(), layer)
	require.NoError(t, err)
	defer reader.Close()
	unzipped, err := gzip.NewReader(content.NewReader(reader))
	require.NoError(t, err)
	uncompressed := digest.SHA256.Digester()
	stream := io.TeeReader(unzipped, uncompressed.Hash())
	all := map[string]*tar.Header{}
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		all[h.Name] = h
	}
	_, err = io.Copy(io.Discard, stream)
	require.NoError(t, err)
	info, err := store.Info(t.Context(), layer.Digest)
	require.NoError(t, err)
	require.Equal(t, uncompressed.Digest().String(), info.Labels[labels.LabelUncompressed])
	return all
}

func TestDiff(t *testing.T) {
	for _, strategy := range strategies {
		t.Run(string(strategy), func(t *testing.T) {
			n := newNode(t, strategy)
			store, err := local.NewLabeledStore(t.TempDir(), newLabels())
			require.NoError(t, err)
			stock := walking.NewWalkingDiff(store)
			comparer := NewComparer(stock, store, n.Snapshotter)
			n.mounted(n.pod("pod"), n.changePod)

			layer, err := rootfs.CreateDiff(t.Context(), "pod", n, comparer, diff.WithLabels(map[string]string{"x": "y"}))
			require.NoError(t, err)
			all := entries(t, store, layer)
			var names []string
			for name := range all {
				names = append(names, name)
			}
			slices.Sort(names)
			require.Equal(t, []string{".wh.suid", "a", "caps", "dir/", "dir/hard", "file", "new", "newcaps"}, names)
			for name, owner := range map[string][2]int{
				"file": {7, 8}, "new": {1000, 1}, "a": {0, 5}, "caps": {0, 0}, "newcaps": {0, 0}, ".wh.suid": {0, 0}, "dir/": {0, 0},
			} {
				require.Equal(t, owner, [2]int{all[name].Uid, all[name].Gid}, name)
			}
			for _, name := range []string{"caps", "newcaps"} {
				require.Equal(t, string(capability), all[name].PAXRecords["SCHILY.xattr.security.capability"], name)
			}

			// The same once it is committed, where that can be told, and again.
			again, err := rootfs.CreateDiff(t.Context(), "pod", n, comparer)
			require.NoError(t, err)
			require.Equal(t, layer, again)
			if strategy == IDMap {
				wrong, err := rootfs.CreateDiff(t.Context(), "pod", n, stock)
				require.NoError(t, err)
				require.Equal(t, 131072+7, entries(t, store, wrong)["file"].Uid, "stock has the host's")
			} else { // the other's snapshot forgets the map with its labels
				require.NoError(t, n.Commit(t.Context(), "committed", "pod"))
				again, err = rootfs.CreateDiff(t.Context(), "committed", n, comparer)
				require.NoError(t, err)
				require.Equal(t, layer, again)
				mounts, err := n.Prepare(t.Context(), "child", "committed")
				require.NoError(t, err)
				n.mounted(mounts, func(root string) { n.write(root, "third", 131072+3, 262144+3, 0o600) })
				again, err = rootfs.CreateDiff(t.Context(), "child", n, comparer)
				require.NoError(t, err)
				all := entries(t, store, again)
				require.Len(t, all, 1)
				require.Equal(t, 3, all["third"].Uid)
			}

			// On top of the image it is the pod's files with the image's ids.
			n.applied(store, layer, func(root string) {
				n.requireOwner(root, "file", 7, 8)
				n.requireOwner(root, "dir/hard", 1000, 1)
				require.Equal(t, capability, attribute(t, filepath.Join(root, "newcaps"), "security.capability"))
				require.NoFileExists(t, filepath.Join(root, "suid"))
				hard, err := statOf(filepath.Join(root, "dir/hard"))
				require.NoError(t, err)
				require.EqualValues(t, 2, hard.Nlink)
			})
		})
	}
}

// applied unpacks a layer on top of the image.
func (n *node) applied(store content.Store, layer imagespec.Descriptor, look func(root string)) {
	n.t.Helper()
	mounts, err := n.Prepare(n.t.Context(), "unpacked", image)
	require.NoError(n.t, err)
	_, err = apply.NewFileSystemApplier(store).Apply(n.t.Context(), layer, mounts)
	require.NoError(n.t, err)
	n.mounted(mounts, look)
}

func TestDiffOfOthersIsStock(t *testing.T) {
	n := newNode(t, Metacopy)
	store, err := local.NewLabeledStore(t.TempDir(), newLabels())
	require.NoError(t, err)
	stock := walking.NewWalkingDiff(store)
	mounts, err := n.Prepare(t.Context(), "host", image)
	require.NoError(t, err)
	n.mounted(mounts, n.changePod)
	want, err := rootfs.CreateDiff(t.Context(), "host", n, stock)
	require.NoError(t, err)
	for _, sn := range []*Snapshotter{n.Snapshotter, nil} {
		got, err := rootfs.CreateDiff(t.Context(), "host", n, NewComparer(stock, store, sn))
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	require.Equal(t, 131072+7, entries(t, store, want)["file"].Uid)
}

func TestDiffRefusals(t *testing.T) {
	n := newNode(t, IDMap)
	store, err := local.NewLabeledStore(t.TempDir(), newLabels())
	require.NoError(t, err)
	comparer := NewComparer(walking.NewWalkingDiff(store), store, n.Snapshotter)
	n.mounted(n.pod("pod"), func(root string) { n.write(root, "stranger", 5, 5, 0o644) })
	for _, mediaType := range []string{"", imagespec.MediaTypeImageLayer, imagespec.MediaTypeImageLayerZstd} {
		_, err = rootfs.CreateDiff(t.Context(), "pod", n, comparer, diff.WithMediaType(mediaType))
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.ErrorContains(t, err, `"stranger"`)
	}
	_, err = comparer.Compare(t.Context(), nil, []mount.Mount{{Type: "overlay", Options: []string{"uidmap=x", "gidmap=y", "lowerdir=/"}}})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	_, err = rootfs.CreateDiff(t.Context(), "pod", n, comparer, diff.WithMediaType("application/vnd.docker.image.rootfs.diff.tar.gzip"))
	require.True(t, errdefs.IsNotImplemented(err), "%v", err)
}

// Nothing to compare with is nothing that a caller may bring the daemon down with.
func TestDiffWithoutALowerSide(t *testing.T) {
	n := newNode(t, Chown)
	store, err := local.NewLabeledStore(t.TempDir(), newLabels())
	require.NoError(t, err)
	_, err = NewComparer(walking.NewWalkingDiff(store), store, n.Snapshotter).Compare(t.Context(), nil, n.pod("pod"))
	require.NoError(t, err)
}

func TestDiffMediaTypes(t *testing.T) {
	n := newNode(t, Chown)
	store, err := local.NewLabeledStore(t.TempDir(), newLabels())
	require.NoError(t, err)
	comparer := NewComparer(walking.NewWalkingDiff(store), store, n.Snapshotter)
	n.mounted(n.pod("pod"), n.changePod)
	for _, mediaType := range []string{imagespec.MediaTypeImageLayer, imagespec.MediaTypeImageLayerZstd} {
		layer, err := rootfs.CreateDiff(t.Context(), "pod", n, comparer, diff.WithMediaType(mediaType))
		require.NoError(t, err)
		require.Equal(t, mediaType, layer.MediaType)
		require.Greater(t, layer.Size, int64(100))
		key := "unpacked-" + strings.ReplaceAll(mediaType, "/", "-")
		mounts, err := n.Prepare(t.Context(), key, image, snapshots.WithLabels(nil))
		require.NoError(t, err)
		_, err = apply.NewFileSystemApplier(store).Apply(t.Context(), layer, mounts)
		require.NoError(t, err)
		n.mounted(mounts, func(root string) { n.requireOwner(root, "new", 1000, 1) })
	}
}

// memoryLabels keep the labels of a content store.
type memoryLabels map[digest.Digest]map[string]string

func newLabels() memoryLabels { return memoryLabels{} }

func (m memoryLabels) Get(d digest.Digest) (map[string]string, error) { return m[d], nil }

func (m memoryLabels) Set(d digest.Digest, labels map[string]string) error {
	m[d] = labels
	return nil
}

func (m memoryLabels) Update(d digest.Digest, update map[string]string) (map[string]string, error) {
	if m[d] == nil {
		m[d] = map[string]string{}
	}
	for key, value := range update {
		m[d][key] = value
	}
	return m[d], nil
}
