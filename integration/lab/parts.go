package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"k8s.io/client-go/util/keyutil"

	"github.com/podfsm/podfsm/integration/harness"
)

// parts is the content of the second disk of the machines, which is mounted at /lab: all programs,
// the integration tests and their files, in the layout of the repository.
type parts struct {
	dir, log string // of the lab
	repo     string
	arch     string
	cluster  bool   // has Kubernetes and its tests; not for another architecture
	stage    string // the folder in which the content is built
}

// makeParts makes the image of the parts for an architecture.
func makeParts(ctx context.Context, dir string, base base, cluster bool) (image string, err error) {
	p := parts{dir: dir, log: filepath.Join(dir, "parts.log"), arch: base.arch, cluster: cluster}
	if p.stage, err = os.MkdirTemp(dir, "parts-*"); err != nil {
		return "", err
	}
	defer os.RemoveAll(p.stage)
	images, err := p.build(ctx, base)
	if err != nil {
		return "", err
	}
	if err := p.pack(ctx); err != nil {
		return "", err
	}
	unit, err := containerdUnit(ctx)
	if err != nil {
		return "", err
	}
	key, err := keyutil.MakeEllipticPrivateKeyPEM() // of the service accounts of the scenario deploy
	if err != nil {
		return "", err
	}
	for name, content := range map[string][]byte{
		"containerd.service": unit, "images.tar": images, "service-accounts.key": key,
		"stock.sh": []byte(stockScript), "install.sh": []byte(installScript), // for a person in a machine
	} {
		if err := os.WriteFile(filepath.Join(p.stage, name), content, 0o644); err != nil {
			return "", err
		}
	}
	image = filepath.Join(dir, "parts-"+p.arch+".img")
	return image, run(ctx, p.log, "mkfs.ext4", "-q", "-F", "-d", p.stage, "-L", "lab", image, "4G")
}

// build builds the programs into the stage, and returns the images in the format of docker save.
func (p *parts) build(ctx context.Context, base base) (images []byte, err error) {
	if p.repo, images, err = harness.BuildAll(ctx); err != nil {
		return nil, err
	}
	bin := filepath.Join(p.stage, ".build/bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return nil, err
	}
	if p.arch != runtime.GOARCH {
		return p.cross(ctx, base, bin)
	}
	if p.cluster {
		if err := p.kubernetes(ctx); err != nil {
			return nil, err
		}
	}
	copies := []string{"--archive", "--parents", "bin", ".build/bin", "integration/testdata", "deploy", "docs", "README.md", p.stage}
	if err := run(ctx, p.log, "cp", copies...); err != nil {
		return nil, err
	}
	// Built like make test does, with the same cache.
	if err := p.goBuild(ctx, ".", []string{"CGO_ENABLED=1"}, "test", "-c", "-o", bin+"/integration.test", "./integration"); err != nil {
		return nil, err
	}
	return images, p.static(ctx, bin)
}

// buildConformance builds what only the conformance scenario runs, into the folder from which the
// parts are copied.
func buildConformance(ctx context.Context, dir string) error {
	bin, err := harness.BuildCritest(ctx)
	if err != nil {
		return err
	}
	return run(ctx, filepath.Join(dir, "parts.log"), "go", "build", "-o", filepath.Join(bin, "conformance"), "./integration/conformance")
}

// kubernetes builds ./integration/cluster and its programs, and helm. The kubelet and helm come with
// .build/bin.
func (p *parts) kubernetes(ctx context.Context) error {
	for _, build := range []func(context.Context) (string, error){harness.BuildKubelet, harness.BuildHelm} {
		if _, err := build(ctx); err != nil {
			return err
		}
	}
	programs, err := harness.BuildCluster(ctx)
	if err != nil {
		return err
	}
	if err := run(ctx, p.log, "cp", "--archive", programs, filepath.Join(p.stage, ".build")); err != nil {
		return err
	}
	return p.goBuild(ctx, ".", []string{"CGO_ENABLED=1"}, "test", "-c", "-o", p.stage+"/.build/kubernetes/cluster.test", "./integration/cluster")
}

// static builds the programs that run on machines only.
func (p *parts) static(ctx context.Context, bin string) error {
	if err := p.goBuild(ctx, ".", nil, "test", "-c", "-o", bin+"/node.test", "./integration/lab/node"); err != nil {
		return err
	}
	return p.goBuild(ctx, ".", nil, "build", "-o", bin+"/", "./integration/lab/agent")
}

// cross builds what a node of another architecture needs. The integration tests don't run there.
func (p *parts) cross(ctx context.Context, base base, bin string) ([]byte, error) {
	const containerd = "github.com/containerd/containerd/v2/cmd/"
	builds := []struct {
		module string
		env    []string
		args   []string
	}{
		{".", nil, []string{containerd + "containerd", containerd + "containerd-shim-runc-v2", containerd + "ctr"}},
		{"tools/modules/cni", nil, []string{"tool"}},
		{"tools/modules/runc", []string{
			"CGO_ENABLED=1", "CC=" + crossCompiler,
			"PKG_CONFIG_SYSROOT_DIR=" + base.sysroot, "PKG_CONFIG_LIBDIR=" + base.sysroot + "/usr/lib/aarch64-linux-gnu/pkgconfig",
		}, []string{"-tags=seccomp", "tool"}},
	}
	for _, b := range builds {
		progress("building for %s: %s", p.arch, strings.Join(b.args, " "))
		if err := p.goBuild(ctx, b.module, b.env, append([]string{"build", "-ldflags=-s -w", "-o", bin + "/"}, b.args...)...); err != nil {
			return nil, err
		}
	}
	pause := bin + "/pause"
	if err := run(ctx, p.log, crossCompiler, "-static", "-Os", "-s", "-o", pause, filepath.Join(p.repo, "integration/programs/pause/pause.c")); err != nil {
		return nil, err
	}
	if err := p.static(ctx, bin); err != nil {
		return nil, err
	}
	return harness.Images(ctx, harness.Programs{Arch: p.arch, Pause: pause, Busybox: base.sysroot + "/busybox"})
}

// crossCompiler is the C compiler for the other architecture of the packages.
const crossCompiler = "aarch64-linux-gnu-gcc"

// goBuild runs the go command in a module of the repository for the architecture of the parts,
// without cgo unless env enables it.
func (p *parts) goBuild(ctx context.Context, module string, env []string, args ...string) error {
	env = append([]string{"GOARCH=" + p.arch, "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false"}, env...)
	return run(ctx, p.log, "env", slices.Concat([]string{"-C", filepath.Join(p.repo, module)}, env, []string{"go"}, args)...)
}

// pack makes the project's Debian packages and images of static binaries, as make dist does: one to
// install and one to upgrade to.
func (p *parts) pack(ctx context.Context) error {
	programs, err := harness.BuildPacking(ctx)
	if err != nil {
		return err
	}
	bin := filepath.Join(p.dir, "package-bin-"+p.arch) + "/"
	for _, pkg := range []struct{ version, dir string }{{"v0.0.0-lab", "package"}, {"v0.0.1-lab", "upgrade"}} {
		stamp := "-ldflags=-s -w -X main.version=" + pkg.version + " -X github.com/podfsm/podfsm/plugin.release=" + pkg.version
		if err := p.goBuild(ctx, ".", nil, "build", "-trimpath", stamp, "-o", bin, "./cmd/..."); err != nil {
			return err
		}
		out := filepath.Join(p.stage, pkg.dir)
		if err := os.MkdirAll(out, 0o755); err != nil {
			return err
		}
		if err := run(ctx, p.log, filepath.Join(p.repo, "deploy/package/pack"), pkg.version, "1795529540", p.arch, bin, programs, out, "deb", "image"); err != nil {
			return err
		}
	}
	return nil
}

// containerdUnit is containerd's own.
func containerdUnit(ctx context.Context) ([]byte, error) {
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/containerd/containerd/v2").Output()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "containerd.service"))
}
