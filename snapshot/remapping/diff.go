package remapping

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/podfsm/podfsm/snapshot/owners"
)

// NewComparer returns a comparer that maps the files of a pod in a user namespace back to the ids
// of its image, so that a commit or checkpoint is a layer for any pod. Other snapshots are compared
// by stock. stock also does the actual comparison.
//
// With idmapped mounts of any snapshotter, stock compares the right files, but writes the host ids
// of changed files. With a layer of sn, stock would report each file as changed. sn may be nil.
func NewComparer(stock diff.Comparer, store content.Store, sn *Snapshotter) diff.Comparer {
	return &comparer{stock, store, sn}
}

// mediaTypes are the media types that containerd's differ writes.
var mediaTypes = []string{imagespec.MediaTypeImageLayer, imagespec.MediaTypeImageLayerGzip, imagespec.MediaTypeImageLayerZstd}

type comparer struct {
	stock diff.Comparer
	store content.Store
	sn    *Snapshotter
}

// Compare implements diff.Comparer. A file with an id outside of the pod's is a FailedPrecondition
// error.
func (c *comparer) Compare(ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt) (imagespec.Descriptor, error) {
	maps, lower, err := c.mapped(ctx, lower, upper)
	if err != nil {
		return imagespec.Descriptor{}, fmt.Errorf("failed to find the id maps of a snapshot: %w", err)
	}
	if maps == nil {
		return c.stock.Compare(ctx, lower, upper, opts...)
	}
	var config diff.Config
	for _, opt := range opts {
		if err := opt(&config); err != nil {
			return imagespec.Descriptor{}, err
		}
	}
	if config.MediaType == "" {
		config.MediaType = imagespec.MediaTypeImageLayerGzip
	}
	if config.Compressor == nil && !slices.Contains(mediaTypes, config.MediaType) {
		return imagespec.Descriptor{}, fmt.Errorf("unsupported media type %q of a diff: %w", config.MediaType, errdefs.ErrNotImplemented) // containerd then asks the next differ
	}
	u := &unshift{maps: maps.Inverse(), compress: config.Compressor}
	opts = append(slices.Clone(opts), diff.WithMediaType(config.MediaType), diff.WithCompressor(u.open))
	made, err := c.stock.Compare(ctx, lower, upper, opts...)
	if err := errors.Join(err, u.err); err != nil { // stock ignores the error of the last write
		return imagespec.Descriptor{}, err
	}
	// stock has set the label by the digest of the stream with host ids.
	label := map[string]string{labels.LabelUncompressed: u.uncompressed.Digest().String()}
	_, err = c.store.Update(ctx, content.Info{Digest: made.Digest, Labels: label}, "labels."+labels.LabelUncompressed)
	if err != nil {
		return imagespec.Descriptor{}, fmt.Errorf("failed to label layer %s: %w", made.Digest, err)
	}
	return made, nil
}

// mapped returns the id maps of a mounted snapshot, and the mounts to compare it with. The maps are
// nil if it has none.
func (c *comparer) mapped(ctx context.Context, lower, upper []mount.Mount) (*owners.Map, []mount.Mount, error) {
	if len(upper) == 0 || upper[len(upper)-1].Type != "overlay" {
		return nil, lower, nil
	}
	if uids, gids := option(upper, "uidmap"), option(upper, "gidmap"); uids != "" && gids != "" {
		maps, err := parseMap(uids, gids)
		return &maps, lower, err
	}
	if c.sn == nil {
		return nil, lower, nil
	}
	below := strings.Split(option(upper, "lowerdir"), ":")
	l, at, err := c.sn.layerAmong(ctx, below)
	if err != nil || at < 0 {
		return nil, lower, err
	}
	if slices.Contains(strings.Split(option(lower, "lowerdir"), ":"), below[at]) {
		return &l.maps, lower, nil // the snapshot is on top of the layer
	}
	// The original image in the owners of the pod.
	image := upper[len(upper)-1]
	image.Options = append(slices.DeleteFunc(slices.Clone(image.Options), hasKey("lowerdir", "upperdir", "workdir")),
		"lowerdir="+strings.Join(below[at:], ":"))
	return &l.maps, []mount.Mount{image}, nil
}

// layerAmong returns the layer whose files are in one of these directories, and the index of the
// directory, -1 if there is none.
func (s *Snapshotter) layerAmong(ctx context.Context, dirs []string) (l layer, at int, err error) {
	own := func(dir string) bool { return strings.HasPrefix(dir, s.config.Root+"/") }
	if !slices.ContainsFunc(dirs, own) {
		return layer{}, -1, nil
	}
	b, err := s.existing()
	if b == nil || err != nil {
		return layer{}, -1, err
	}
	at = -1
	err = b.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		keys, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		for i, dir := range dirs {
			if id := filepath.Base(filepath.Dir(dir)); own(dir) {
				if found, ok := parseLayer(keys[id]); ok {
					l, at = found, i
					return nil
				}
			}
		}
		return nil
	})
	return l, at, err
}

// unshift maps the ids of the files in a tar stream and compresses it.
type unshift struct {
	maps     owners.Map
	compress func(io.Writer, string) (io.WriteCloser, error) // nil for the compression of the media type

	uncompressed digest.Digester
	err          error // of the end of the stream
}

// open implements the compressor of package diff.
func (u *unshift) open(to io.Writer, mediaType string) (io.WriteCloser, error) {
	compress := u.compress
	if compress == nil {
		compress = compressorOf
	}
	compressed, err := compress(to, mediaType)
	if err != nil {
		return nil, err
	}
	u.uncompressed = digest.SHA256.Digester()
	from, stream := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := u.copy(io.MultiWriter(compressed, u.uncompressed.Hash()), from)
		from.CloseWithError(err) // later writes return err
		done <- err
	}()
	return &unshifting{stream, func() error {
		_ = stream.Close() // never fails
		u.err = errors.Join(<-done, compressed.Close())
		return u.err
	}}, nil
}

type unshifting struct {
	io.Writer
	close func() error
}

func (w *unshifting) Close() error { return w.close() }

// compressorOf returns the compression that containerd uses for a media type.
func compressorOf(to io.Writer, mediaType string) (io.WriteCloser, error) {
	switch mediaType {
	case imagespec.MediaTypeImageLayerGzip:
		return compression.CompressStream(to, compression.Gzip)
	case imagespec.MediaTypeImageLayerZstd:
		return compression.CompressStream(to, compression.Zstd)
	default:
		return compression.CompressStream(to, compression.Uncompressed)
	}
}

// copy maps the ids of each entry. Whiteouts, which mark deleted files, have no owners.
func (u *unshift) copy(to io.Writer, from io.Reader) error {
	r, w := tar.NewReader(from), tar.NewWriter(to)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return errors.Join(w.Close(), drain(from))
		}
		if err != nil {
			return err
		}
		if !strings.HasPrefix(filepath.Base(h.Name), ".wh.") {
			if err := u.maps.Header(h); err != nil {
				return fmt.Errorf("failed to map the owner of file %q back to the image: %w", h.Name, err)
			}
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(w, r); err != nil {
			return err
		}
	}
}

// drain reads the rest of the stream, which is padding.
func drain(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}
