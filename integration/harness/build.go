package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/integration/faults"
)

// Daemon names a build of containerd.
type Daemon string

const (
	Podfsm     Daemon = "containerd-podfsm" // the product
	PodfsmRace Daemon = "race"              // the product with the race detector
	Stock      Daemon = "containerd"        // containerd without the plugin
	Own        Daemon = "own-containerd"    // examples/own-containerd, a module of its own with the product in it
	// TestDaemon is the product with fault points, from integration/testdaemon.
	TestDaemon Daemon = "testdaemon"
)

// modulePath is that of the repository's main module.
const modulePath = "github.com/podfsm/podfsm"

// install is one `go install`. Its own staleness check makes it fast when
// nothing has changed.
type install struct {
	module   string // a folder of the repository
	bin      string // where the binaries go, below the repository
	args     []string
	produces string // for the progress line
}

var daemons = map[Daemon]install{
	Podfsm:     {".", "bin", []string{"./cmd/..."}, "containerd-podfsm, podfsm, podfsm-init"},
	PodfsmRace: {".", ".build/race", []string{"-race", "./cmd/containerd-podfsm"}, "containerd-podfsm with the race detector"},
	Stock:      {".", ".build/bin", []string{"github.com/containerd/containerd/v2/cmd/containerd"}, "containerd"},
	Own:        {"examples/own-containerd", ".build/bin", []string{"."}, "own-containerd"},
	TestDaemon: {".", ".build/bin", []string{"./integration/testdaemon", "./cmd/podfsm"}, "testdaemon, podfsm"},
	CRIO:       crio,
}

// parts are what every daemon needs around it. The tools have modules of their
// own, so that they are built with the dependencies their authors tested.
var parts = []install{
	{".", ".build/bin", []string{
		"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
		"github.com/containerd/containerd/v2/cmd/ctr",
		"./cmd/podfsm-init",
		"./integration/attack",
		"./integration/faultwrap",
		"./integration/delegate",
	}, "containerd-shim-runc-v2, ctr, podfsm-init, attack, faultwrap, delegate"},
	{"integration/tools/runc", ".build/bin", []string{"-tags=seccomp", "tool"}, "runc"},
	{"integration/tools/cni", ".build/bin", []string{"tool"}, "CNI plugins"},
}

// kubelet is not a part: few tests need it, and its first build takes minutes.
// Without symbols it is linked faster and a third smaller.
var kubelet = install{"integration/tools/kubelet", ".build/bin", []string{"-ldflags=-s -w", "tool"}, "kubelet (minutes the first time)"}

// promql reads PromQL as Prometheus does.
var promql = install{"integration/tools/promql", ".build/bin", []string{"."}, "promql"}

// path returns where a daemon's binary is, below the repository.
func (d Daemon) path() string {
	if d == PodfsmRace {
		return ".build/race/containerd-podfsm"
	}
	return filepath.Join(daemons[d].bin, string(d))
}

// prebuiltEnv names a folder that is laid out as the repository and has all
// programs, on a machine where nothing can be built.
const prebuiltEnv = "PODFSM_PREBUILT"

// builder builds each thing at most once in this process.
type builder struct {
	mu       sync.Mutex
	repo     string           // the repository's folder
	prebuilt bool             // repo has all programs
	images   []byte           // as `docker save` writes them
	done     map[string]error // by what is produced
}

var builds builder

// build brings the daemon, all parts and the images up to date, and returns the
// repository's folder and the images. Progress goes to stderr.
func (b *builder) build(ctx context.Context, daemon Daemon) (repo string, images []byte, _ error) {
	end, err := b.begin(ctx)
	if err != nil {
		return "", nil, err
	}
	defer end()

	for _, i := range slices.Concat(parts, []install{daemons[daemon]}) {
		if err := b.install(ctx, i); err != nil {
			return "", nil, err
		}
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
	return b.repo, b.images, err
}

// BuildAll brings all that the integration tests run up to date, except the kubelet, promql and CRI-O, and returns the repository's
// folder and the images, as docker save writes them. Progress goes to stderr.
func BuildAll(ctx context.Context) (repo string, images []byte, err error) {
	for _, daemon := range []Daemon{Podfsm, TestDaemon, Stock} {
		if repo, images, err = builds.build(ctx, daemon); err != nil {
			return "", nil, err
		}
	}
	return repo, images, nil
}

// nfpm makes Debian packages.
var nfpm = install{"integration/tools/nfpm", ".build/bin", []string{"tool"}, "nfpm"}

// BuildKubelet brings the kubelet up to date and returns its path. Progress goes
// to stderr.
func BuildKubelet(ctx context.Context) (string, error) { return builds.tool(ctx, kubelet, "kubelet") }

// BuildPromQL brings the reader of PromQL up to date and returns its path.
// Progress goes to stderr.
func BuildPromQL(ctx context.Context) (string, error) { return builds.tool(ctx, promql, "promql") }

// BuildNFPM brings nfpm up to date and returns its path. Progress goes to stderr.
func BuildNFPM(ctx context.Context) (string, error) { return builds.tool(ctx, nfpm, "nfpm") }

// BuildDaemon brings a daemon up to date, with the podfsm CLI beside it where it
// is the product, and returns its path. Progress goes to stderr.
func BuildDaemon(ctx context.Context, d Daemon) (string, error) {
	return builds.tool(ctx, daemons[d], filepath.Base(d.path()))
}

// tool brings a single program up to date and returns its path.
func (b *builder) tool(ctx context.Context, i install, name string) (string, error) {
	end, err := b.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	return filepath.Join(b.repo, i.bin, name), b.install(ctx, i)
}

// begin finds the repository and waits for its turn: builds run one after
// another, in this process by mu and among the test processes of one checkout by
// flock.
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
	slow := time.AfterFunc(time.Second, func() { fmt.Fprintf(os.Stderr, "building %s ...\n", what) })
	err := build()
	if !slow.Stop() && err == nil {
		fmt.Fprintf(os.Stderr, "built %s in %.1f s\n", what, time.Since(start).Seconds())
	}
	b.done[what] = err
	return err
}

func (b *builder) install(ctx context.Context, i install) error {
	if b.prebuilt {
		return nil
	}
	return b.once(i.produces, func() error {
		cmd := exec.CommandContext(ctx, "go", append([]string{"install", "-buildvcs=false"}, i.args...)...)
		cmd.Dir = filepath.Join(b.repo, i.module)
		cmd.Env = append(os.Environ(), "GOBIN="+filepath.Join(b.repo, i.bin), "CGO_ENABLED=1", "GOWORK=off")
		return run(cmd)
	})
}

func (b *builder) pause(ctx context.Context) error {
	return run(exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-Wall", "-Werror",
		"-o", filepath.Join(b.repo, ".build/bin/pause"), filepath.Join(b.repo, "integration/pause/pause.c")))
}

// repository returns the folder of the main module that the working directory
// is in.
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

// run runs cmd and puts what it printed into the error.
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
