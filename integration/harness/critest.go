package harness

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/podfsm/podfsm/tools/ociimage"
)

// critest is a test binary, which go install can't build. ginkgo runs its specs in parallel.
var (
	critest = install{module: "tools/modules/critest", bin: ".build/bin", produces: "critest"}
	ginkgo  = install{module: "tools/modules/critest", bin: ".build/bin", args: []string{"github.com/onsi/ginkgo/v2/ginkgo"}, produces: "ginkgo"}
)

// BuildCritest builds critest, the daemons that it is run against, and their parts, and returns the
// folder of critest. Progress goes to stderr.
func BuildCritest(ctx context.Context) (bin string, err error) {
	for _, daemon := range []Daemon{Stock, Podfsm} {
		if _, _, err := builds.build(ctx, daemon); err != nil {
			return "", err
		}
	}
	if _, err := builds.tool(ctx, ginkgo, "ginkgo"); err != nil {
		return "", err
	}
	end, err := builds.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	bin = filepath.Join(builds.repo, critest.bin)
	if builds.prebuilt {
		return bin, nil
	}
	return bin, builds.once(critest.produces, func() error {
		test := exec.CommandContext(ctx, "go", "test", "-c", "-o", filepath.Join(bin, "critest"), "sigs.k8s.io/cri-tools/cmd/critest")
		test.Dir = filepath.Join(builds.repo, critest.module)
		test.Env = append(os.Environ(), "GOWORK=off")
		return errors.Join(run(test), run(exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-Wall", "-Werror",
			"-o", filepath.Join(bin, "nonewprivs"), filepath.Join(builds.repo, "integration/conformance/nonewprivs/nonewprivs.c"))))
	})
}

// CritestImages returns replacements for the images that critest's specs name, by reference without
// the host of its registry. [BuildCritest] has built their programs.
func CritestImages(ctx context.Context) (map[string]v1.Image, error) {
	end, err := builds.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	programs, err := ownPrograms(builds.repo)
	if err != nil {
		return nil, err
	}
	busybox, err := programs.critestBusybox(ctx)
	if err != nil {
		return nil, err
	}
	pause, err := programs.pauseImage()
	if err != nil {
		return nil, err
	}
	nonewprivs, err := os.ReadFile(filepath.Join(builds.repo, critest.bin, "nonewprivs"))
	if err != nil {
		return nil, err
	}
	images := map[string]v1.Image{}
	for reference, variant := range critestImages {
		if images[reference], err = variant.of(busybox); err != nil {
			return nil, err
		}
	}
	images["e2e-test-images/nonewprivs:1.3"], err = variant{
		entrypoint: []string{"/nonewprivs"},
		files:      []ociimage.File{{Name: "nonewprivs", Mode: 0o4755, Body: nonewprivs}},
	}.of(busybox)
	if err != nil {
		return nil, err
	}
	// A separate image: the specs count its names, and the pause image of the node has another
	// name.
	images["pause:3.9"], err = marked("pause-3.9").of(pause)
	return images, err
}

// critestBusybox adds what critest's images have and this machine's busybox lacks: two applets, and
// an ls that can be masked without masking all of busybox.
func (p Programs) critestBusybox(ctx context.Context) (v1.Image, error) {
	busybox, err := p.busyboxImage(ctx)
	if err != nil {
		return nil, err
	}
	body, err := os.ReadFile(p.Busybox)
	if err != nil {
		return nil, err
	}
	return variant{files: []ociimage.File{
		{Name: "bin/ls", Mode: 0o755, Body: body},
		{Name: "bin/pgrep", Mode: 0o755, Body: []byte("#!/bin/sh\npidof \"$@\"\n")},
		{Name: "bin/ipcs", Mode: 0o755, Body: []byte("#!/bin/sh\ncat /proc/sysvipc/shm\n")},
	}}.of(busybox)
}

const staging = "k8s-staging-cri-tools/"

var critestImages = map[string]variant{
	"e2e-test-images/busybox:1.29-2":                        {},
	"e2e-test-images/nginx:1.14-2":                          webServer("80"),
	"e2e-test-images/httpd:2.4.39-4":                        webServer("80"),
	staging + "hostnet-nginx-" + runtime.GOARCH + ":latest": webServer("12003"),

	staging + "test-image-1:latest":      marked("test-image-1"),
	staging + "test-image-2:latest":      marked("test-image-2"),
	staging + "test-image-3:latest":      marked("test-image-3"),
	staging + "test-image-latest:latest": marked("test-image-latest"),
	staging + "test-image-tag:test":      marked("test"),
	staging + "test-image-tag:all":       marked("all"),
	staging + "test-image-tags:1":        marked("same-image"),
	staging + "test-image-tags:2":        marked("same-image"),
	staging + "test-image-tags:3":        marked("same-image"),

	staging + "test-image-user-uid:latest":            {user: "1002"},
	staging + "test-image-user-username:latest":       {user: "www-data"},
	staging + "test-image-user-uid-group:latest":      {user: "1003:1004"},
	staging + "test-image-user-username-group:latest": {user: "www-data:1004"},
	staging + "test-image-predefined-group:latest": {user: "1000", files: []ociimage.File{
		{Name: "etc/passwd", Mode: 0o644, Body: []byte("root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n")},
		{Name: "etc/group", Mode: 0o644, Body: []byte("root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")},
	}},
}

// variant is what an image adds to its base.
type variant struct {
	files      []ociimage.File
	entrypoint []string
	user       string
}

// marked is an image with unique content.
func marked(name string) variant {
	return variant{files: []ociimage.File{{Name: name, Mode: 0o644}}}
}

// webServer looks like nginx and httpd to the specs: its page, the name and title of its process,
// its pid file, and its log.
func webServer(port string) variant {
	script := "#!/bin/sh\necho $$ >/var/run/nginx.pid\necho httpd\ntrap exit TERM\nhttpd -f -p " + port + " -h /www & wait\n"
	return variant{
		entrypoint: []string{"/usr/sbin/nginx", "master process"},
		files: []ociimage.File{
			{Name: "usr/sbin/nginx", Mode: 0o755, Body: []byte(script)},
			{Name: "var/", Mode: 0o755},
			{Name: "var/run/", Mode: 0o755},
		},
	}
}

func (v variant) of(base v1.Image) (v1.Image, error) {
	files, err := fastLayer(v.files)
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(base, files)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config := cf.Config
	if v.entrypoint != nil {
		config.Entrypoint, config.Cmd = v.entrypoint, nil
	}
	if v.user != "" {
		config.User = v.user
	}
	return mutate.Config(img, config)
}
