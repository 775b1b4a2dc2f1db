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
	Podfsm     Daemon = "containerd-podfsm"  // the product
	PodfsmRace Daemon = "race"               // the product with the race detector
	Stock      Daemon = "containerd"         // containerd without the plugin
	Own        Daemon = "own-containerd"     // examples/own-containerd, a module of its own with the product in it
	OwnLTS     Daemon = "own-containerd-2.3" // examples/own-containerd-2.3, the same with containerd's long-term release
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
	// kubernetes has the programs report the version of Kubernetes that the
	// module requires.
	kubernetes bool
}

var daemons = map[Daemon]install{
	Podfsm:     {module: ".", bin: "bin", args: []string{"./cmd/..."}, produces: "containerd-podfsm, podfsm, podfsm-init"},
	PodfsmRace: {module: ".", bin: ".build/race", args: []string{"-race", "./cmd/containerd-podfsm"}, produces: "containerd-podfsm with the race detector"},
	Stock:      {module: ".", bin: ".build/bin", args: []string{"github.com/containerd/containerd/v2/cmd/containerd"}, produces: "containerd"},
	Own:        {module: "examples/own-containerd", bin: ".build/bin", args: []string{"."}, produces: "own-containerd"},
	OwnLTS:     {module: "examples/own-containerd-2.3", bin: ".build/bin", args: []string{"."}, produces: "own-containerd-2.3"},
	TestDaemon: {module: ".", bin: ".build/bin", args: []string{"./integration/testdaemon", "./cmd/podfsm"}, produces: "testdaemon, podfsm"},
	CRIO:       crio,
}

// parts are what every daemon needs around it. The tools have modules of their
// own, so that they are built with the dependencies their authors tested.
var parts = []install{
	{module: ".", bin: ".build/bin", args: []string{
		"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
		"github.com/containerd/containerd/v2/integration/failpoint/cmd/containerd-shim-runc-fp-v1",
		"github.com/containerd/containerd/v2/cmd/ctr",
		"./cmd/podfsm-init",
		"./integration/attack",
		"./integration/faultwrap",
		"./integration/delegate",
	}, produces: "containerd-shim-runc-v2 and -fp-v1, ctr, podfsm-init, attack, faultwrap, delegate"},
	{module: "integration/tools/runc", bin: ".build/bin", args: []string{"-tags=seccomp", "tool"}, produces: "runc"},
	{module: "integration/tools/cni", bin: ".build/bin", args: []string{"tool"}, produces: "CNI plugins"},
}

// kubelet is not a part: few tests need it, and its first build takes minutes.
var kubelet = install{module: "integration/tools/kubelet", bin: ".build/bin", args: []string{"tool"}, produces: "kubelet (minutes the first time)", kubernetes: true}

// cluster is a control plane, with the kubelet of its version.
var cluster = []install{
	{module: "integration/tools/etcd", bin: ".build/kubernetes", args: []string{"."}, produces: "etcd"},
	{
		module: "integration/tools/kubernetes", bin: ".build/kubernetes", args: []string{"tool"},
		produces: "Kubernetes (many minutes the first time)", kubernetes: true,
	},
}

// otherPlugins are CNI plugins of other projects, which few tests need.
var otherPlugins = map[string]install{
	"flannel": {module: "integration/tools/flannel", bin: ".build/bin", args: []string{"tool"}, produces: "flannel's CNI plugin"},
	"multus":  {module: "integration/tools/multus", bin: ".build/bin", args: []string{"tool"}, produces: "Multus (minutes the first time)"},
	// Its program has the name of the folder that its source is in.
	"whereabouts": {module: "integration/tools/whereabouts", bin: ".build/whereabouts", args: []string{"tool"}, produces: "whereabouts (minutes the first time)"},
}

// promql reads PromQL as Prometheus does.
var promql = install{module: "integration/tools/promql", bin: ".build/bin", args: []string{"."}, produces: "promql"}

// path returns where a daemon's binary is, below the repository.
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
var nfpm = install{module: "integration/tools/nfpm", bin: ".build/bin", args: []string{"tool"}, produces: "nfpm"}

// BuildKubelet brings the kubelet up to date and returns its path. Progress goes
// to stderr.
func BuildKubelet(ctx context.Context) (string, error) { return builds.tool(ctx, kubelet, "kubelet") }

// BuildCluster brings etcd, the control plane of Kubernetes, kubectl and the
// kubelet of that version up to date and returns the folder they are in.
// Progress goes to stderr.
func BuildCluster(ctx context.Context) (dir string, err error) {
	for _, i := range cluster {
		if dir, err = builds.tool(ctx, i, ""); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// BuildPlugin brings a CNI plugin of another project up to date and returns its path. Progress goes to stderr.
func BuildPlugin(ctx context.Context, name string) (string, error) {
	program := name
	if name == "whereabouts" {
		program = "cmd"
	}
	return builds.tool(ctx, otherPlugins[name], program)
}

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

// reportProgress says on stderr what is being built, after a second and then
// once a minute. It returns when done is closed, and tells whether it has said
// anything.
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
		args := append([]string{"install", "-buildvcs=false"}, i.args...)
		if i.kubernetes {
			ldflags, err := kubernetesLDFlags(ctx, dir)
			if err != nil {
				return err
			}
			args = slices.Insert(args, 1, ldflags)
		}
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOBIN="+filepath.Join(b.repo, i.bin), "CGO_ENABLED=1", "GOWORK=off")
		return run(cmd)
	})
}

// kubernetesLDFlags have a program of Kubernetes say its version, as a release's
// does. Without symbols it is linked faster and a third smaller.
func kubernetesLDFlags(ctx context.Context, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "GOWORK=off")
	version, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("failed to read the version of Kubernetes in %q: %w", module, err)
	}
	return "-ldflags=-s -w -X k8s.io/component-base/version.gitVersion=" + strings.TrimSpace(string(version)), nil
}

// daemon brings a daemon up to date.
func (b *builder) daemon(ctx context.Context, d Daemon) error {
	if d.isVariant() {
		return b.variant(ctx, d)
	}
	return b.install(ctx, daemons[d])
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
