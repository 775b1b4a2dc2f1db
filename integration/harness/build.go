package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/integration/faults"
)

// Daemon names a build of containerd.
type Daemon string

const (
	Podfsm     Daemon = "containerd-podfsm"  // the product
	PodfsmRace Daemon = "race"               // the product with the race detector
	Stock      Daemon = "containerd"         // containerd without the plugin
	Own        Daemon = "own-containerd"     // examples/own-containerd, a module of its own with the product in it
	OwnLTS     Daemon = "own-containerd-2.3" // examples/own-containerd-2.3, the same with containerd's long-term release
	// TestDaemon is the product with fault points, from integration/testdaemon.
	TestDaemon Daemon = "testdaemon"
)

// modulePath is the path of the main module.
const modulePath = "github.com/podfsm/podfsm"

// install is one `go install`, which is fast when nothing has changed.
type install struct {
	module   string // a folder of the repository
	bin      string // where the binaries go, below the repository
	args     []string
	produces string // for the progress line
	// kubernetes makes the programs report the version of Kubernetes that the module requires.
	kubernetes bool
	release    string // the release that podfsm reports instead of its own
}

// productBin is where make build puts the product, below the repository.
const productBin = "bin"

var daemons = map[Daemon]install{
	Podfsm:     {module: ".", bin: productBin, args: []string{"./cmd/..."}, produces: "containerd-podfsm, podfsm, podfsm-init"},
	PodfsmRace: {module: ".", bin: ".build/race", args: []string{"-race", "./cmd/containerd-podfsm"}, produces: "containerd-podfsm with the race detector"},
	Stock:      {module: ".", bin: ".build/bin", args: []string{"github.com/containerd/containerd/v2/cmd/containerd"}, produces: "containerd"},
	Own:        {module: "examples/own-containerd", bin: ".build/bin", args: []string{"."}, produces: "own-containerd"},
	OwnLTS:     {module: "examples/own-containerd-2.3", bin: ".build/bin", args: []string{"."}, produces: "own-containerd-2.3"},
	TestDaemon: {module: ".", bin: ".build/bin", args: []string{"./integration/testdaemon", "./cmd/podfsm"}, produces: "testdaemon, podfsm"},
	CRIO:       crio,
}

// parts are the programs that every daemon needs. Tools have their own modules, and so the
// dependencies of their authors.
var parts = []install{
	{module: ".", bin: ".build/bin", args: []string{
		"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
		"github.com/containerd/containerd/v2/integration/failpoint/cmd/containerd-shim-runc-fp-v1",
		"github.com/containerd/containerd/v2/cmd/ctr",
		"./cmd/podfsm-init",
		"./integration/programs/attack",
		"./integration/programs/faultwrap",
		"./integration/programs/delegate",
	}, produces: "containerd-shim-runc-v2 and -fp-v1, ctr, podfsm-init, attack, faultwrap, delegate"},
	{module: "tools/modules/runc", bin: ".build/bin", args: []string{"-tags=seccomp", "tool"}, produces: "runc"},
	{module: "tools/modules/cni", bin: ".build/bin", args: []string{"tool"}, produces: "CNI plugins"},
}

// path returns the path of a daemon's binary below the repository.
func (d Daemon) path() string {
	switch {
	case d == PodfsmRace:
		return ".build/race/containerd-podfsm"
	case d.isVariant():
		return filepath.Join(d.variantDir(), "bin", string(TestDaemon))
	default:
		return filepath.Join(daemons[d].bin, string(d))
	}
}

// prebuiltEnv names a folder with the layout of the repository and all programs, for machines that
// can not build.
const prebuiltEnv = "PODFSM_PREBUILT"

// builder builds each thing at most once in this process.
type builder struct {
	mu       sync.Mutex
	repo     string           // the repository's folder
	prebuilt bool             // repo has all programs
	images   []byte           // as `docker save` writes them
	done     map[string]error // by what is produced
	ready    sync.Map         // the daemons that build has built
}

var builds builder

// build builds the daemon, all parts and the images, and returns the folder of the repository and
// the images. Progress goes to stderr. If the daemon was built before, build returns at once, even
// while another build runs.
func (b *builder) build(ctx context.Context, daemon Daemon) (repo string, images []byte, _ error) {
	if _, ready := b.ready.Load(daemon); ready {
		return b.repo, b.images, nil
	}
	end, err := b.begin(ctx)
	if err != nil {
		return "", nil, err
	}
	defer end()

	for _, i := range parts {
		if err := b.install(ctx, i); err != nil {
			return "", nil, err
		}
	}
	if err := b.daemon(ctx, daemon); err != nil {
		return "", nil, err
	}
	if daemon == CRIO && !b.prebuilt {
		if err := b.once("pinns", func() error { return b.pinns(ctx) }); err != nil {
			return "", nil, err
		}
	}
	err = b.once("images", func() error {
		if !b.prebuilt {
			if err := b.pause(ctx); err != nil {
				return err
			}
		}
		b.images, err = imageArchive(ctx, b.repo)
		return err
	})
	if err == nil {
		b.ready.Store(daemon, true)
	}
	return b.repo, b.images, err
}

// BuildAll builds everything that the integration tests run, except for the kubelet, promql and
// CRI-O. It returns the folder of the repository and the images in the format of docker save.
// Progress goes to stderr.
func BuildAll(ctx context.Context) (repo string, images []byte, err error) {
	for _, daemon := range []Daemon{Podfsm, TestDaemon, Stock} {
		if repo, images, err = builds.build(ctx, daemon); err != nil {
			return "", nil, err
		}
	}
	return repo, images, nil
}

// BuildDaemon builds a daemon, and the podfsm CLI beside the product, and returns the path of the
// daemon. Progress goes to stderr.
func BuildDaemon(ctx context.Context, d Daemon) (string, error) {
	return builds.tool(ctx, daemons[d], filepath.Base(d.path()))
}

// tool builds a single program and returns its path.
func (b *builder) tool(ctx context.Context, i install, name string) (string, error) {
	end, err := b.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	return filepath.Join(b.repo, i.bin, name), b.install(ctx, i)
}

// begin finds the repository and takes the lock for builds: mu within this process, flock among the
// test processes of a checkout.
func (b *builder) begin(ctx context.Context) (end func(), err error) {
	b.mu.Lock()
	defer func() {
		if err != nil {
			b.mu.Unlock()
		}
	}()
	if b.repo == "" {
		dir := os.Getenv(prebuiltEnv)
		b.prebuilt = dir != ""
		if !b.prebuilt {
			if dir, err = repository(ctx); err != nil {
				return nil, err
			}
		}
		b.repo, b.done = dir, map[string]error{}
	}
	unlock, err := b.lock()
	if err != nil {
		return nil, err
	}
	return func() { unlock(); b.mu.Unlock() }, nil
}

func (b *builder) lock() (unlock func(), _ error) {
	dir := filepath.Join(b.repo, ".build")
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := faults.Lock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("failed to lock %q: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

func (b *builder) once(what string, build func() error) error {
	if err, tried := b.done[what]; tried {
		return err
	}
	start := time.Now()
	var slow bool
	var reporting sync.WaitGroup
	done := make(chan struct{})
	reporting.Go(func() { slow = reportProgress(what, start, done) })
	err := build()
	close(done)
	reporting.Wait()
	if slow && err == nil {
		fmt.Fprintf(os.Stderr, "built %s in %.1f s\n", what, time.Since(start).Seconds())
	}
	b.done[what] = err
	return err
}

// reportProgress reports the running build on stderr, after a second and then once a minute, until
// done is closed. It returns whether it has reported anything.
func reportProgress(what string, start time.Time, done <-chan struct{}) (slow bool) {
	for wait := time.Second; ; wait = time.Minute {
		select {
		case <-done:
			return slow
		case <-time.After(wait):
			slow = true
			fmt.Fprintf(os.Stderr, "building %s ... %.0f s\n", what, time.Since(start).Seconds())
		}
	}
}

func (b *builder) install(ctx context.Context, i install) error {
	if b.prebuilt {
		return nil
	}
	return b.once(i.produces, func() error {
		dir := filepath.Join(b.repo, i.module)
		args := []string{"install", "-buildvcs=false"}
		if i.bin != productBin { // make build links the product with symbols
			ldflags := withoutSymbols
			if i.kubernetes {
				version, err := kubernetesVersion(ctx, dir)
				if err != nil {
					return err
				}
				ldflags += " -X k8s.io/component-base/version.gitVersion=" + version
			}
			if i.release != "" {
				ldflags += " -X " + modulePath + "/plugin.release=" + i.release
			}
			args = append(args, ldflags)
		}
		cmd := exec.CommandContext(ctx, "go", append(args, i.args...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOBIN="+filepath.Join(b.repo, i.bin), "CGO_ENABLED=1", "GOWORK=off")
		return run(cmd)
	})
}

// withoutSymbols halves the link time. Stack traces of panics don't need symbols.
const withoutSymbols = "-ldflags=-s -w"

// kubernetesVersion returns the version that a program of Kubernetes reports, as that of a release.
func kubernetesVersion(ctx context.Context, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "GOWORK=off")
	version, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("failed to read the version of Kubernetes in %q: %w", module, err)
	}
	return strings.TrimSpace(string(version)), nil
}

// daemon builds a daemon.
func (b *builder) daemon(ctx context.Context, d Daemon) error {
	if d.isVariant() {
		return b.variant(ctx, d)
	}
	return b.install(ctx, daemons[d])
}

func (b *builder) pause(ctx context.Context) error {
	return run(exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-Wall", "-Werror",
		"-o", filepath.Join(b.repo, ".build/bin/pause"), filepath.Join(b.repo, "integration/programs/pause/pause.c")))
}

// repository returns the folder of the main module around the working directory.
func repository(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Path}}\t{{.Dir}}")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("failed to find the repository: %w", err)
	}
	path, dir, _ := strings.Cut(strings.TrimSpace(string(out)), "\t")
	if path != modulePath {
		return "", fmt.Errorf("the working directory is in module %q, not %q: %w", path, modulePath, errdefs.ErrFailedPrecondition)
	}
	return dir, nil
}

// run runs cmd. The error has its output.
func run(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: `make deps` installs what is missing", err)
	}
	if err != nil {
		return fmt.Errorf("failed to run %q: %w\n%s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
