package harness

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/podfsm/podfsm/tools/ociimage"
)

// The images of every node. Their registry does not exist.
const (
	PauseImage   = "podfsm.test/pause:1"
	BusyboxImage = "podfsm.test/busybox:1"
	// OwnersImage is the busybox image with a second layer of files whose owners matter. They are
	// in /owners: cat with the capability NET_RAW, the setuid program suid, the hard links a and b,
	// and many files of other users. No node unpacks OwnersImage at its start.
	OwnersImage = "podfsm.test/owners:1"
	// UserImage is the busybox image with user and group 70000, which is outside of any range of
	// 64Ki ids.
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

// ownPrograms returns the programs of this machine.
func ownPrograms(repo string) (Programs, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return Programs{}, fmt.Errorf("%w: `make deps` installs it", err)
	}
	return Programs{Arch: runtime.GOARCH, Pause: filepath.Join(repo, ".build/bin/pause"), Busybox: busybox}, nil
}

// Programs are the paths of the static programs in the images of an architecture.
type Programs struct{ Arch, Pause, Busybox string }

// Images returns the images for an architecture in the format of `docker save`, with the applets of
// this machine's busybox.
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
	return p.image(v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}, []ociimage.File{
		{Name: "pause", Mode: 0o755, Body: pause},
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
	l := []ociimage.File{
		{Name: "bin/", Mode: 0o755},
		{Name: "sbin/", Mode: 0o755},
		{Name: "usr/", Mode: 0o755},
		{Name: "usr/bin/", Mode: 0o755},
		{Name: "usr/sbin/", Mode: 0o755},
		{Name: "etc/", Mode: 0o755},
		{Name: "etc/passwd", Mode: 0o644, Body: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		{Name: "etc/group", Mode: 0o644, Body: []byte("root:x:0:\nnogroup:x:65534:\n")},
		{Name: "tmp/", Mode: 0o1777},
		{Name: "root/", Mode: 0o700},
		{Name: "www/", Mode: 0o755},
		{Name: "www/index.html", Mode: 0o644, Body: []byte(IndexPage)},
		{Name: "bin/busybox", Mode: 0o755, Body: body},
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "bin/busybox" {
			l = append(l, ociimage.File{Name: applet, Link: "/bin/busybox"})
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

// OwnersFiles is the number of files in /owners/many, each with another owner.
const OwnersFiles = 1000

// netRaw is cap_net_raw+ep as file capabilities of revision 2.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func (p Programs) ownersImage(busybox v1.Image) (v1.Image, error) {
	body, err := os.ReadFile(p.Busybox)
	if err != nil {
		return nil, err
	}
	l := []ociimage.File{
		{Name: "owners/", Mode: 0o755},
		{Name: "owners/cat", Mode: 0o755, Body: body, Caps: netRaw},
		{Name: "owners/suid", Mode: 0o4755, Body: []byte("#!/bin/sh\n"), Owner: 33},
		{Name: "owners/a", Mode: 0o640, Body: []byte("one file\n"), Owner: 1000},
		{Name: "owners/b", Hard: "owners/a", Mode: 0o640, Owner: 1000}, // a hard link has the mode and owner of its file
		{Name: "owners/many/", Mode: 0o755},
	}
	for i := range OwnersFiles {
		name := fmt.Sprintf("owners/many/%d", i)
		l = append(l, ociimage.File{Name: name, Mode: 0o600, Body: []byte(name), Owner: i})
	}
	appended, err := fastLayer(l)
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(busybox, appended)
}

func (p Programs) image(config v1.Config, files []ociimage.File) (v1.Image, error) {
	l, err := fastLayer(files)
	if err != nil {
		return nil, err
	}
	return ociimage.Image(l, p.Arch, time.Time{}, config)
}

// fastLayer compresses fast: the images are made anew for each run.
func fastLayer(files []ociimage.File) (v1.Layer, error) {
	return ociimage.Layer(files, tarball.WithCompressionLevel(gzip.BestSpeed))
}
