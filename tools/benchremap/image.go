package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/podfsm/podfsm/snapshot/remapping"
)

// image is an image of a published size, with the published durations of containerd's remap for it:
// a copy of all files, and a copy of the metadata only.
type image struct {
	name         string
	bytes        int64
	inodes       int
	copied, meta float64 // seconds
}

var published = []image{
	{name: "tensorflow", bytes: 1489 << 20, inodes: 32596, copied: 54.80, meta: 1.29},
	{name: "node", bytes: 1425 << 20, inodes: 33385, copied: 52.86, meta: 1.18},
	{name: "ubuntu:22.04", bytes: 834 << 20 / 10, inodes: 3517, copied: 5.32, meta: 0.15},
}

const (
	layers    = 3
	smallFile = 2 << 10
	chunk     = 1 << 20
)

// topLayer is the key of the snapshot with the whole image.
var topLayer = layerKey(layers - 1)

func layerKey(n int) string { return fmt.Sprint("layer-", n) }

// unpack makes the layers of the image as snapshots. Every eleventh inode is a directory, every
// sixteenth a symbolic link, and one file of forty has the rest of the image's size after the small
// files.
func (i image) unpack(ctx context.Context, sn *remapping.Snapshotter, dir string) error {
	content := make([]byte, chunk)
	random := rand.NewChaCha8([32]byte{})
	if _, err := random.Read(content); err != nil {
		return err
	}
	b := &builder{content: content}
	for n := 1; n < i.inodes; n++ { // the first is the root
		switch {
		case n%11 == 0:
			b.dirs++
		case n%16 == 0:
			b.links++
		default:
			b.files++
		}
	}
	large := (b.files + 39) / 40
	b.large = (i.bytes - int64(b.files-large)*smallFile) / int64(large)

	parent := ""
	for layer := range layers {
		key := layerKey(layer)
		mounts, err := sn.Prepare(ctx, key+"-active", parent)
		if err != nil {
			return err
		}
		err = mounted(mounts, dir, func(root string) error { return b.layer(root, layer) })
		if err != nil {
			return err
		}
		if err := sn.Commit(ctx, key, key+"-active"); err != nil {
			return err
		}
		parent = key
	}
	return nil
}

// builder makes the files of an image.
type builder struct {
	dirs, links, files int
	large              int64
	content            []byte
}

// layer makes the files of a layer. The first layer has all directories.
func (b *builder) layer(root string, layer int) error {
	for n := 0; layer == 0 && n < b.dirs; n++ {
		if err := os.MkdirAll(filepath.Join(root, b.dir(n)), 0o755); err != nil {
			return err
		}
	}
	for n := layer; n < b.links; n += layers {
		if err := os.Symlink("/etc/passwd", filepath.Join(root, b.dir(n%b.dirs), fmt.Sprint("link", n))); err != nil {
			return err
		}
	}
	for n := layer; n < b.files; n += layers {
		size := int64(smallFile)
		if n%40 == 0 {
			size = b.large
		}
		if err := b.write(filepath.Join(root, b.dir(n%b.dirs), fmt.Sprint("file", n)), size); err != nil {
			return err
		}
	}
	return nil
}

// dir returns the path of a directory. Each directory holds up to eight others.
func (b *builder) dir(n int) string {
	if n == 0 {
		return "dir0"
	}
	return filepath.Join(b.dir((n-1)/8), fmt.Sprint("dir", n))
}

func (b *builder) write(path string, size int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for ; size > 0; size -= chunk {
		if _, err := f.Write(b.content[:min(size, chunk)]); err != nil {
			return err
		}
	}
	return nil
}

// mounted calls f with a snapshot mounted on a directory.
func mounted(mounts []mount.Mount, dir string, f func(root string) error) (err error) {
	if err := mount.All(mounts, dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(dir, 0)) }()
	return f(dir)
}
