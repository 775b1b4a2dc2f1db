package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/containernetworking/cni/libcni"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/podfsm/podfsm/integration/harness"
)

// floor runs what nobody who starts a pod by a shim, runc and CNI plugins can do without, and nothing else: those programs themselves, as
// far as possible at the same time.
//
//	start:  shim start -> runc create ----------------> runc start
//	                      its namespaces are made -> CNI ADD, plugin by plugin
//	stop:   runc kill -> end of the process -> runc delete -> end of the shim -> shim delete
//	                                        -> CNI DEL, plugin by plugin
//
// (containerd runs the last program, which deletes again by runc, after every shim.)
//
// There is no daemon in it, no record and no image: OCI configuration and root filesystem are made before, after a model pod of podfsm's.
type floor struct {
	node   *harness.Node
	group  cgroup
	models map[string]*model // by kind
	chain  *libcni.NetworkConfigList
	netns  string // the node's, as in /proc/PID/ns
	count  atomic.Int64
}

// model is a pod that runs all the time.
type model struct {
	pod  *harness.Pod
	spec *specs.Spec
}

func newFloor(ctx context.Context, n *harness.Node) (*floor, error) {
	f := &floor{node: n, models: map[string]*model{}}
	var err error
	if f.group, err = newCgroup(n); err != nil {
		return nil, err
	}
	if f.netns, err = os.Readlink(fmt.Sprintf("/proc/%d/ns/net", n.Pid())); err != nil {
		return nil, err
	}
	if f.chain, err = libcni.NetworkConfFromFile(filepath.Join(n.CNIConfDir(), "10-pods.conflist")); err != nil {
		return nil, err
	}
	for _, k := range []kind{userNS, onHost} {
		if f.models[k.name], err = f.newModel(ctx, k); err != nil {
			return nil, fmt.Errorf("failed to make a model of pods (%s): %w", k.name, err)
		}
	}
	return f, nil
}

// newModel runs a pod and takes its configuration, with a copy of its root filesystem.
func (f *floor) newModel(ctx context.Context, k kind) (*model, error) {
	name := strings.ReplaceAll(k.name, " ", "-")
	pod, err := f.node.RunPod(ctx, harness.PodfsmHandler, f.node.PodConfig("model-"+name, k.options...))
	if err != nil {
		return nil, err
	}
	pid, err := pod.Pid(ctx)
	if err != nil {
		return nil, err
	}
	config, err := os.ReadFile(filepath.Join(f.node.Dir(), "state/io.containerd.runtime.v2.task/k8s.io", pod.ID, "config.json"))
	if err != nil {
		return nil, err
	}
	m := &model{pod: pod, spec: &specs.Spec{}}
	if err := json.Unmarshal(config, m.spec); err != nil {
		return nil, err
	}
	root := f.path("root-" + name)
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	program, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s", pid, m.spec.Process.Args[0]))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(root, m.spec.Process.Args[0]), program, 0o755); err != nil {
		return nil, err
	}
	m.spec.Root.Path = root
	if len(m.spec.Linux.UIDMappings) > 0 { // runc makes mount points in there as the pod's root
		return m, os.Chown(root, int(m.spec.Linux.UIDMappings[0].HostID), int(m.spec.Linux.GIDMappings[0].HostID))
	}
	return m, nil
}

func (f *floor) path(below string) string { return filepath.Join(f.node.Dir(), "f", below) }

func (f *floor) runc() string { return filepath.Join(f.node.Dir(), "bin/runc") }

func (f *floor) cycle(ctx context.Context, k kind) (times, error) { return cycle(ctx, f, k) }

// bare is a pod of the floor.
type bare struct {
	floor         *floor
	id            string
	bundle, netns string
	log           *os.File // the shim's, which it can't write to without a reader
	shim          string   // its address
	pid           int
	config        *libcni.RuntimeConf
}

// newLife prepares what is not measured: a bundle, as containerd makes one.
func (f *floor) newLife(_ context.Context, k kind) (life, error) {
	n := f.count.Add(1)
	b := &bare{floor: f, id: fmt.Sprint("floor-", n)}
	b.bundle, b.netns = f.path(b.id), f.path(b.id+"/netns")
	if err := os.MkdirAll(b.bundle, 0o711); err != nil {
		return nil, err
	}
	spec := *f.models[k.name].spec
	linux := *spec.Linux
	linux.CgroupsPath = filepath.Join("/", f.node.Name(), "podfloor", b.id)
	spec.Linux, spec.Annotations = &linux, map[string]string{"io.kubernetes.cri.sandbox-id": b.id} // one shim for each
	config, err := json.Marshal(&spec)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(b.bundle, "config.json"), config, 0o644); err != nil {
		return nil, err
	}
	// What the shim leaves in a bundle for its own deletion.
	for name, content := range map[string]string{"runtime": f.runc(), "options.json": fmt.Sprintf(`{"root":%q}`, f.path("runc"))} {
		if err := os.WriteFile(filepath.Join(b.bundle, name), []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	log := filepath.Join(b.bundle, "log")
	if err := unix.Mkfifo(log, 0o600); err != nil {
		return nil, err
	}
	if b.log, err = os.OpenFile(log, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	return b, os.WriteFile(b.netns, nil, 0o644)
}

func (b *bare) start(ctx context.Context) (float64, error) {
	return timed(func() error {
		if err := b.startShim(ctx); err != nil {
			return err
		}
		both, ctx := errgroup.WithContext(ctx)
		created := make(chan struct{})
		both.Go(func() error {
			defer close(created)
			return b.create(ctx)
		})
		both.Go(func() error {
			if err := b.pin(created); err != nil {
				return err
			}
			return b.attach(ctx)
		})
		return both.Wait()
	})
}

// create has runc make the process and start it.
func (b *bare) create(ctx context.Context) error {
	pidFile := filepath.Join(b.bundle, "pid")
	if err := b.runc(ctx, "create", "--bundle", b.bundle, "--pid-file", pidFile, b.id); err != nil {
		return err
	}
	pid, err := os.ReadFile(pidFile)
	if err != nil {
		return err
	}
	if b.pid, err = strconv.Atoi(string(pid)); err != nil {
		return err
	}
	return b.runc(ctx, "start", b.id)
}

// pin pins the network namespace as soon as runc has made it, and looks for the last time when runc has ended.
func (b *bare) pin(created <-chan struct{}) error {
	for ticker := time.NewTicker(time.Millisecond / 2); ; {
		select {
		case <-ticker.C:
		case <-created:
			ticker.Stop()
			created = nil
		}
		procs, err := os.ReadFile(filepath.Join(b.floor.group.path("podfloor"), b.id, "cgroup.procs"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for pid := range strings.FieldsSeq(string(procs)) {
			netns := fmt.Sprintf("/proc/%s/ns/net", pid)
			name, err := os.Readlink(netns)
			if err == nil && name != b.floor.netns && unix.Mount(netns, b.netns, "", unix.MS_BIND, "") == nil {
				ticker.Stop()
				return nil
			}
		}
		if created == nil {
			return fmt.Errorf("found no network namespace of %s", b.id)
		}
	}
}

func (b *bare) stop(ctx context.Context) (float64, error) {
	return timed(func() error {
		process, err := unix.PidfdOpen(b.pid, 0)
		if err != nil {
			return err
		}
		defer unix.Close(process)
		if err := b.runc(ctx, "kill", b.id, "KILL"); err != nil {
			return err
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, -1); err != nil {
			return err
		}
		both, ctx := errgroup.WithContext(ctx)
		both.Go(func() error {
			if err := b.runc(ctx, "delete", b.id); err != nil {
				return err
			}
			if err := b.endShim(ctx); err != nil {
				return err
			}
			return b.deleteShim(ctx)
		})
		both.Go(func() error { return b.detach(ctx) })
		if err := both.Wait(); err != nil {
			return err
		}
		return unix.Unmount(b.netns, unix.MNT_DETACH)
	})
}

// remove is not a part of the floor: no external program does anything then.
func (b *bare) remove(context.Context) (float64, error) {
	return 0, errors.Join(b.log.Close(), os.RemoveAll(b.bundle))
}

// startShim starts a shim as containerd does, and waits for its address.
func (b *bare) startShim(ctx context.Context) error {
	n := b.floor.node
	input, err := proto.Marshal(&bootstrap.BootstrapParams{
		InstanceID: b.id, Namespace: namespace, LogLevel: bootstrap.LogLevel_LOG_LEVEL_INFO, SocketDir: proto.String(b.floor.path("")),
		ContainerdGrpcAddress: n.Socket(), ContainerdTtrpcAddress: n.Socket() + ".ttrpc", ContainerdBinary: os.Args[0],
	})
	if err != nil {
		return err
	}
	stdout, err := b.runShim(ctx, input, "start")
	if err != nil {
		return err
	}
	var answer bootstrap.BootstrapResult
	if err := proto.Unmarshal(stdout, &answer); err != nil {
		return fmt.Errorf("failed to read a shim's answer: %w", err)
	}
	b.shim = strings.TrimPrefix(answer.GetAddress(), "unix://")
	return nil
}

// deleteShim cleans up after the shim.
func (b *bare) deleteShim(ctx context.Context) error {
	_, err := b.runShim(ctx, nil, "-bundle", b.bundle, "delete")
	return err
}

// runShim runs the shim's program as containerd does.
func (b *bare) runShim(ctx context.Context, input []byte, args ...string) ([]byte, error) {
	n := b.floor.node
	cmd := exec.CommandContext(ctx, n.Program("containerd-shim-runc-v2"), append([]string{
		"-namespace", namespace, "-address", n.Socket(), "-publish-binary", os.Args[0], "-id", b.id}, args...)...)
	cmd.Dir, cmd.Stdin = b.bundle, bytes.NewReader(input)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", "MAX_SHIM_VERSION=2", "TTRPC_ADDRESS="+n.Socket()+".ttrpc", "GRPC_ADDRESS="+n.Socket(), "NAMESPACE="+namespace)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := b.floor.inside(cmd.Run); err != nil {
		return nil, fmt.Errorf("shim %s failed: %w: %s", args[len(args)-1], err, stderr.String())
	}
	return stdout.Bytes(), nil
}

// endShim asks the shim to end, and returns when its connection is closed, as containerd does.
func (b *bare) endShim(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", b.shim)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	_, err = task.NewTTRPCTaskClient(client).Shutdown(ctx, &task.ShutdownRequest{ID: b.id, Now: true})
	if err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("failed to end a shim: %w", err)
	}
	return client.UserOnCloseWait(ctx)
}

func (b *bare) runc(ctx context.Context, args ...string) error {
	log := filepath.Join(b.bundle, "runc.log")
	cmd := exec.CommandContext(ctx, b.floor.runc(), append([]string{"--root", b.floor.path("runc/" + namespace), "--log", log}, args...)...)
	if err := b.floor.inside(cmd.Run); err != nil {
		text, _ := os.ReadFile(log) // the error says it all the same
		return fmt.Errorf("runc %s failed: %w: %s", args[0], err, text)
	}
	return nil
}

func (b *bare) cni() *libcni.CNIConfig {
	b.config = &libcni.RuntimeConf{ContainerID: b.id, NetNS: b.netns, IfName: "eth0"}
	return libcni.NewCNIConfigWithCacheDir([]string{filepath.Join(b.floor.node.Dir(), "cni/bin")}, b.floor.path("cache"), nil)
}

func (b *bare) attach(ctx context.Context) error {
	return b.floor.inside(func() error {
		_, err := b.cni().AddNetworkList(ctx, b.floor.chain, b.config)
		return err
	})
}

func (b *bare) detach(ctx context.Context) error {
	return b.floor.inside(func() error { return b.cni().DelNetworkList(ctx, b.floor.chain, b.config) })
}

// inside runs f where the programs of a pod run: in the node's network namespace, and in the cgroup whose CPU time is counted.
func (f *floor) inside(run func() error) error {
	return f.node.Inside(func() error {
		if err := f.group.addThread(); err != nil {
			return err
		}
		return run()
	})
}
