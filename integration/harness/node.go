// Package harness runs real containerds side by side and examines what they leave behind. It knows
// podfsm only from outside: by CRI, containerd's API, traces and the state of the machine.
//
// It needs root, cgroups, and the packages of `make deps`.
package harness

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/faults"
	"github.com/podfsm/podfsm/integration/traces"
)

// The runtime handlers that every node has.
const (
	StockHandler  = "runc"
	PodfsmHandler = "podfsm"
)

const (
	// startTimeout bounds the start of a daemon until CRI serves. A race build on a busy machine
	// needs several seconds.
	startTimeout = 60 * time.Second
	stopTimeout  = 30 * time.Second
	pollInterval = 10 * time.Millisecond
)

// Config configures a node. The zero value is the product with defaults.
type Config struct {
	Daemon Daemon   // Podfsm when empty
	TOML   string   // merged over the harness's config.toml
	Env    []string // added to the daemon's environment, as KEY=value
	Traces bool     // receive the daemon's spans
	// Handlers are runtime handlers of podfsm besides PodfsmHandler.
	Handlers []string
	// Install, if set, installs the daemon before its first start and returns the program to run.
	// Otherwise the daemon runs from the build folder.
	Install func(*Node) (executable string, err error)
}

// Node is one containerd with its own directories, sockets, network namespace, CNI network and
// cgroups. Its methods are safe for concurrent use, except for those that start and end the daemon.
type Node struct {
	// Faults is the control directory for Fault's points.
	Faults faults.Dir
	// Traces is nil unless Config.Traces was set.
	Traces *traces.Collector

	// Runtime, Images and Containerd are clients of the running daemon. Every Start replaces them.
	Runtime    runtime.RuntimeServiceClient
	Images     runtime.ImageServiceClient
	Containerd *client.Client

	dir        string
	name       string
	repo       string
	lock       *os.File // held while this process uses dir
	executable string
	env        []string
	daemon     *process
	tracer     *exec.Cmd // strace, while it stalls the daemon
	conn       *grpc.ClientConn
	ranges     atomic.Uint32 // id ranges given to pods
	boots      int
}

// NewNode makes a node, starts its daemon and imports the images. The caller must Close it.
func NewNode(ctx context.Context, c Config) (_ *Node, err error) {
	daemon := cmp.Or(c.Daemon, Podfsm)
	repo, images, err := builds.build(ctx, daemon)
	if err != nil {
		return nil, err
	}
	n := &Node{repo: repo, executable: filepath.Join(repo, daemon.path())}
	if err := n.makeDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close(context.WithoutCancel(ctx)))
		}
	}()
	if err := n.prepare(ctx, c, images); err != nil {
		return nil, fmt.Errorf("failed to prepare node %q: %w", n.name, err)
	}
	if c.Install != nil {
		if n.executable, err = c.Install(n); err != nil {
			return nil, fmt.Errorf("failed to install the daemon of node %q: %w", n.name, err)
		}
	}
	if err := n.Start(ctx); err != nil {
		return nil, err
	}
	if !n.isCRIO() { // CRI-O got them before its start
		if err := n.load(ctx, images); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// prepare makes what must exist before the daemon starts.
func (n *Node) prepare(ctx context.Context, c Config, images []byte) error {
	if err := n.makeNetNS(); err != nil {
		return err
	}
	n.env = append([]string{
		"PATH=" + n.path("bin") + ":" + n.binary("") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"TMPDIR=" + n.path("tmp"),
		faults.Env + "=" + string(n.Faults),
		bootIDEnv + "=" + n.path("boot-id"),
	}, c.Env...)
	if err := n.boot(); err != nil {
		return err
	}
	if c.Traces {
		l, err := n.Listen()
		if err != nil {
			return fmt.Errorf("failed to listen for traces: %w", err)
		}
		n.Traces = traces.Serve(l)
		n.env = append(n.env,
			"OTEL_EXPORTER_OTLP_ENDPOINT=http://"+l.Addr().String(),
			"OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
			"OTEL_BSP_SCHEDULE_DELAY=20") // ms; the default is 5 s
	}
	if err := n.installParts(); err != nil {
		return err
	}
	if err := n.SetChain(ctx, n.DefaultChain()...); err != nil {
		return err
	}
	if n.isCRIO() {
		return n.prepareCRIO(ctx, images)
	}
	return n.writeConfig(c)
}

// binary returns the path of a built program, such as "ctr".
func (n *Node) binary(name string) string { return filepath.Join(n.repo, ".build/bin", name) }

// Program returns the path of a built program other than a daemon, such as
// "containerd-shim-runc-v2".
func (n *Node) Program(name string) string { return n.binary(name) }

// CLI returns the path of the podfsm command line tool.
func (n *Node) CLI() string { return filepath.Join(filepath.Dir(n.executable), "podfsm") }

// Attack returns the path of the program that tries what a pod must not be able to do.
func (n *Node) Attack() string { return n.binary("attack") }

// Dir returns the node's directory. All files of the node are below it, except for cgroups and
// libcni's default cache.
func (n *Node) Dir() string { return n.dir }

// Name returns the node's name, which is also that of its CNI network and its cgroups.
func (n *Node) Name() string { return n.name }

// Socket returns the path of the daemon's gRPC socket.
func (n *Node) Socket() string { return n.path("containerd.sock") }

// Pid returns the process id of the running daemon.
func (n *Node) Pid() int { return n.daemon.cmd.Process.Pid }

// Log returns the log of all daemons of this node so far.
func (n *Node) Log() string {
	log, err := os.ReadFile(n.path("containerd.log"))
	if err != nil {
		return err.Error()
	}
	return string(log)
}

// Start starts the daemon and waits until CRI serves. The error has the end of the log.
func (n *Node) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Patience(startTimeout), fmt.Errorf("not ready within %v", Patience(startTimeout)))
	defer cancel()
	daemon, err := n.launch()
	if err != nil {
		return err
	}
	n.daemon = daemon
	if err := n.connect(); err != nil {
		return err
	}
	if err := n.waitReady(ctx, daemon); err != nil {
		return fmt.Errorf("containerd of node %q does not serve: %w; the end of its log:\n%s", n.name, err, tail(n.Log(), 30))
	}
	return nil
}

// Use replaces the daemon with another build at the next Start, as an upgrade does.
func (n *Node) Use(ctx context.Context, daemon Daemon) error {
	repo, _, err := builds.build(ctx, daemon)
	n.executable = filepath.Join(repo, daemon.path())
	return err
}

// Stop ends the daemon by SIGTERM. Pods continue to run.
func (n *Node) Stop(ctx context.Context) error { return n.end(ctx, unix.SIGTERM) }

// Kill ends the daemon by SIGKILL. Pods continue to run.
func (n *Node) Kill(ctx context.Context) error { return n.end(ctx, unix.SIGKILL) }

// Restart stops the daemon and starts it again.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.Stop(ctx); err != nil {
		return err
	}
	return n.Start(ctx)
}

// Close ends the daemon and removes everything else of the node. The error names what could not be
// removed.
func (n *Node) Close(ctx context.Context) error {
	err := n.Kill(ctx)
	if n.Traces != nil {
		n.Traces.Close()
	}
	err = errors.Join(err, remove(ctx, n.dir))
	n.lock.Close()
	return err
}

// process is a child process whose end is awaited from its start.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

func (n *Node) launch() (*process, error) {
	log, err := os.OpenFile(n.path("containerd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(n.executable, "--config", n.path("config.toml"))
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.Dir = n.env, log, log, n.dir
	if err := n.Inside(cmd.Start); err != nil {
		return nil, fmt.Errorf("failed to start %q: %w", n.executable, err)
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // cmd.ProcessState has the outcome
	}()
	return p, nil
}

func (n *Node) connect() error {
	conn, err := grpc.NewClient("unix://"+n.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: pollInterval, Multiplier: 1, MaxDelay: pollInterval}}))
	if err != nil {
		return err
	}
	n.conn, n.Runtime, n.Images = conn, runtime.NewRuntimeServiceClient(conn), runtime.NewImageServiceClient(conn)
	n.Containerd, err = client.NewWithConn(conn)
	return err
}

// waitReady waits for a daemon that may be killed at the same time.
func (n *Node) waitReady(ctx context.Context, daemon *process) error {
	return poll(ctx, pollInterval, func() error {
		select {
		case <-daemon.exited:
			return final{fmt.Errorf("the daemon ended: %v", daemon.cmd.ProcessState)}
		default:
		}
		_, err := n.Runtime.Status(ctx, &runtime.StatusRequest{})
		return err
	})
}

// end signals the daemon before its clients disconnect. A daemon that sees its clients disconnect
// cancels their requests, which must not happen before a kill.
func (n *Node) end(ctx context.Context, signal syscall.Signal) error {
	defer n.disconnect()
	if n.daemon == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, Patience(stopTimeout))
	defer cancel()
	if err := n.daemon.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("failed to signal containerd of node %q: %w", n.name, err)
	}
	n.endStall()
	select {
	case <-n.daemon.exited:
		n.daemon = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("containerd of node %q did not end after %v: %w", n.name, signal, ctx.Err())
	}
}

func (n *Node) disconnect() {
	if n.conn != nil {
		n.conn.Close()
		n.conn = nil
	}
}

// load imports the images and waits for the event by which CRI learns of them.
func (n *Node) load(ctx context.Context, images []byte) error {
	ctx = namespaces.WithNamespace(ctx, criNamespace)
	imported, err := n.Containerd.Import(ctx, bytes.NewReader(images))
	if err != nil {
		return fmt.Errorf("failed to import the images: %w", err)
	}
	for _, i := range imported {
		if i.Name != OwnersImage { // it has many files, and few tests need it
			if err := client.NewImage(n.Containerd, i).Unpack(ctx, "overlayfs"); err != nil {
				return fmt.Errorf("failed to unpack image %q: %w", i.Name, err)
			}
		}
		err := poll(ctx, pollInterval, func() error {
			status, err := n.Images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: i.Name}})
			if err == nil && status.GetImage() == nil {
				err = fmt.Errorf("CRI does not know image %q: %w", i.Name, errdefs.ErrNotFound)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
