// Package ociimage makes images of files, without a registry.
package ociimage

import (
	"archive/tar"
	"bytes"
	"io"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// File is a directory if its name ends in a slash, a symlink if Link is set, a hard link if Hard is,
// else a regular file.
type File struct {
	Name, Link, Hard string
	Mode             int64
	Body             []byte
	Owner            int       // the user and the group
	Caps             string    // the extended attribute security.capability
	Time             time.Time // of the last modification; the zero time is 1970
}

// Layer returns the files as a layer. The same files give the same layer.
func Layer(files []File, options ...tarball.LayerOption) (v1.Layer, error) {
	var content bytes.Buffer
	w := tar.NewWriter(&content)
	for _, f := range files {
		if err := f.write(w); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content.Bytes())), nil
	}, options...)
}

func (f File) write(w *tar.Writer) error {
	h := &tar.Header{
		Name: f.Name, Linkname: f.Link, Mode: f.Mode, Uid: f.Owner, Gid: f.Owner, Size: int64(len(f.Body)), Typeflag: tar.TypeReg, ModTime: f.Time,
	}
	if f.Caps != "" {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": f.Caps}
	}
	switch {
	case f.Hard != "":
		h.Typeflag, h.Linkname = tar.TypeLink, f.Hard
	case f.Link != "":
		h.Typeflag = tar.TypeSymlink
	case strings.HasSuffix(f.Name, "/"):
		h.Typeflag = tar.TypeDir
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(f.Body)
	return err
}

// Image returns an image of one layer for Linux on an architecture in the words of Go. The zero time
// is no time of creation.
func Image(layer v1.Layer, arch string, created time.Time, config v1.Config) (v1.Image, error) {
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Created, file.Config = "linux", arch, v1.Time{Time: created}, config
	return mutate.ConfigFile(image, file)
}
