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
	// OwnersImage is the busybox image with a second layer of files whose
	// owners matter, in /owners: cat with the capability NET_RAW, the setuid
	// program suid, a and b that are one file, and many of other users. Nobody
	// has unpacked it.
	OwnersImage = "podfsm.test/owners:1"
	// UserImage is the busybox image with a user and a group, 70000, that no
	// range of 64Ki ids has.
	UserImage = "podfsm.test/user:1"
)

// IndexPage is what a busybox container serves at / when it runs
// "httpd -f -h /www".
const IndexPage = "hello from busybox\n"

// imageArchive returns the images of this machine in the format of `docker save`.
func imageArchive(ctx context.Context, repo string) ([]byte, error) {
	p, err := ownPrograms(repo)
	if err != nil {
		return nil, err
	}
	return Images(ctx, p)
}

// ownPrograms are those of this machine.
func ownPrograms(repo string) (Programs, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return Programs{}, fmt.Errorf("%w: `make deps` installs it", err)
	}
	return Programs{Arch: runtime.GOARCH, Pause: filepath.Join(repo, ".build/bin/pause"), Busybox: busybox}, nil
}

// Programs are what the images of an architecture are made of: paths of static
// programs.
type Programs struct{ Arch, Pause, Busybox string }

// Images returns the images for an architecture in the format of `docker save`.
// The applets that are linked are those of this machine's busybox.
func Images(ctx context.Context, p Programs) ([]byte, error) {
	pause, err := p.pauseImage()
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q: %w", PauseImage, err)
	}
	busybox, err := p.busyboxImage(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q: %w", BusyboxImage, err)
	}
	owners, err := p.ownersImage(busybox)
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q: %w", OwnersImage, err)
	}
	user, err := p.userImage(busybox)
	if err != nil {
		return nil, fmt.Errorf("failed to make image %q: %w", UserImage, err)
	}
	var archive bytes.Buffer
	err = tarball.MultiWrite(map[name.Tag]v1.Image{
		name.MustParseReference(PauseImage).(name.Tag):   pause,
		name.MustParseReference(BusyboxImage).(name.Tag): busybox,
		name.MustParseReference(OwnersImage).(name.Tag):  owners,
		name.MustParseReference(UserImage).(name.Tag):    user,
	}, &archive)
	if err != nil {
		return nil, fmt.Errorf("failed to write the images: %w", err)
	}
	return archive.Bytes(), nil
}

func (p Programs) pauseImage() (v1.Image, error) {
	pause, err := os.ReadFile(p.Pause)
	if err != nil {
		return nil, err
	}
	return p.image(v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}, layer{
		{name: "pause", mode: 0o755, body: pause},
	})
}

func (p Programs) busyboxImage(ctx context.Context) (v1.Image, error) {
	body, err := os.ReadFile(p.Busybox)
	if err != nil {
		return nil, err
	}
	applets, err := exec.CommandContext(ctx, "busybox", "--list-full").Output()
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
	return p.image(v1.Config{
		Cmd: []string{"/bin/sh"},
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
	}, l)
}

func (p Programs) userImage(busybox v1.Image) (v1.Image, error) {
	file, err := busybox.ConfigFile()
	if err != nil {
		return nil, err
	}
	config := *file.Config.DeepCopy()
	config.User = "70000:70000"
	return mutate.Config(busybox, config)
}

// OwnersFiles is how many files /owners/many has, each of another user.
const OwnersFiles = 1000

// netRaw is cap_net_raw+ep as file capabilities of revision 2.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func (p Programs) ownersImage(busybox v1.Image) (v1.Image, error) {
	body, err := os.ReadFile(p.Busybox)
	if err != nil {
		return nil, err
	}
	l := layer{
		{name: "owners/", mode: 0o755},
		{name: "owners/cat", mode: 0o755, body: body, caps: netRaw},
		{name: "owners/suid", mode: 0o4755, body: []byte("#!/bin/sh\n"), owner: 33},
		{name: "owners/a", mode: 0o640, body: []byte("one file\n"), owner: 1000},
		{name: "owners/b", hard: "owners/a", mode: 0o640, owner: 1000}, // a link's own are those of the file
		{name: "owners/many/", mode: 0o755},
	}
	for i := range OwnersFiles {
		name := fmt.Sprintf("owners/many/%d", i)
		l = append(l, file{name: name, mode: 0o600, body: []byte(name), owner: i})
	}
	appended, err := l.image()
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(busybox, appended)
}

// file is a directory when its name ends in a slash, a symlink when link is
// set, a hard link when hard is, else a regular file. owner is its user and group.
type file struct {
	name, link, hard string
	mode             int64
	body             []byte
	owner            int
	caps             string
}

type layer []file

func (p Programs) image(config v1.Config, files layer) (v1.Image, error) {
	l, err := files.image()
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
	cf.OS, cf.Architecture, cf.Config = "linux", p.Arch, config
	return mutate.ConfigFile(img, cf)
}

// image is the layer as that of an image.
func (l layer) image() (v1.Layer, error) {
	data, err := l.tar()
	if err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}, tarball.WithCompressionLevel(gzip.BestSpeed))
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
	h := &tar.Header{
		Name: f.name, Linkname: f.link, Mode: f.mode, Uid: f.owner, Gid: f.owner, Size: int64(len(f.body)), Typeflag: tar.TypeReg,
	}
	if f.caps != "" {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": f.caps}
	}
	switch {
	case f.hard != "":
		h.Typeflag, h.Linkname = tar.TypeLink, f.hard
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
