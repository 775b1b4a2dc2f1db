package harness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The images that every node has. Their registry does not exist.
const (
	PauseImage   = "podfsm.test/pause:1"
	BusyboxImage = "podfsm.test/busybox:1"
)

// IndexPage is what a busybox container serves at / when it runs
// "httpd -f -h /www".
const IndexPage = "hello from busybox\n"

// imageArchive returns both images in the format of `docker save`.
func imageArchive(ctx context.Context, repo string) ([]byte, error) {
	pause, err := pauseImage(repo)
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q: %w", PauseImage, err)
	}
	busybox, err := busyboxImage(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q: %w", BusyboxImage, err)
	}
	var archive bytes.Buffer
	err = tarball.MultiWrite(map[name.Tag]v1.Image{
		name.MustParseReference(PauseImage).(name.Tag):   pause,
		name.MustParseReference(BusyboxImage).(name.Tag): busybox,
	}, &archive)
	if err != nil {
		return nil, fmt.Errorf("failed to write the images: %w", err)
	}
	return archive.Bytes(), nil
}

func pauseImage(repo string) (v1.Image, error) {
	pause, err := os.ReadFile(filepath.Join(repo, ".build/bin/pause"))
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}, layer{
		{name: "pause", mode: 0o755, body: pause},
	})
}

func busyboxImage(ctx context.Context) (v1.Image, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: `make deps` installs it", err)
	}
	body, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	applets, err := exec.CommandContext(ctx, busybox, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("failed to list busybox's applets: %w", err)
	}
	l := layer{
		{name: "bin/", mode: 0o755},
		{name: "sbin/", mode: 0o755},
		{name: "usr/", mode: 0o755},
		{name: "usr/bin/", mode: 0o755},
		{name: "usr/sbin/", mode: 0o755},
		{name: "etc/", mode: 0o755},
		{name: "etc/passwd", mode: 0o644, body: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		{name: "etc/group", mode: 0o644, body: []byte("root:x:0:\nnogroup:x:65534:\n")},
		{name: "tmp/", mode: 0o1777},
		{name: "root/", mode: 0o700},
		{name: "www/", mode: 0o755},
		{name: "www/index.html", mode: 0o644, body: []byte(IndexPage)},
		{name: "bin/busybox", mode: 0o755, body: body},
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "bin/busybox" {
			l = append(l, file{name: applet, link: "/bin/busybox"})
		}
	}
	return image(v1.Config{
		Cmd: []string{"/bin/sh"},
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
	}, l)
}

// file is a directory when its name ends in a slash, a symlink when link is
// set, else a regular file. Everything belongs to root.
type file struct {
	name, link string
	mode       int64
	body       []byte
}

type layer []file

func image(config v1.Config, files layer) (v1.Image, error) {
	data, err := files.tar()
	if err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}, tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config = "linux", runtime.GOARCH, config
	return mutate.ConfigFile(img, cf)
}

func (l layer) tar() ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range l {
		if err := f.write(w); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func (f file) write(w *tar.Writer) error {
	h := &tar.Header{Name: f.name, Linkname: f.link, Mode: f.mode, Size: int64(len(f.body)), Typeflag: tar.TypeReg}
	switch {
	case f.link != "":
		h.Typeflag = tar.TypeSymlink
	case strings.HasSuffix(f.name, "/"):
		h.Typeflag = tar.TypeDir
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(f.body)
	return err
}
