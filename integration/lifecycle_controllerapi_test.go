package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"

	cg1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	eventtypes "github.com/containerd/containerd/api/events"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// anotherNamespace is a containerd namespace that the CRI does not use.
const anotherNamespace = "plain"

// shareImages makes the images of the node available in another containerd namespace.
func shareImages(t *testing.T, n *harness.Node) context.Context {
	t.Helper()
	cri := namespaces.WithNamespace(t.Context(), "k8s.io")
	var exported bytes.Buffer
	require.NoError(t, n.Containerd.Export(cri, &exported, archive.WithImage(n.Containerd.ImageService(), harness.PauseImage)))
	other := namespaces.WithNamespace(t.Context(), anotherNamespace)
	imported, err := n.Containerd.Import(other, &exported)
	require.NoError(t, err)
	require.NotEmpty(t, imported)
	return other
}

// sandboxEvents counts containerd's events, by the sandbox that they are about and their topic.
type sandboxEvents struct {
	mu    sync.Mutex
	count map[string]map[string]int
}

// watchSandboxes subscribes until the test ends, and returns when events arrive.
func watchSandboxes(t *testing.T, n *harness.Node, namespace string) *sandboxEvents {
	t.Helper()
	e := &sandboxEvents{count: map[string]map[string]int{}}
	envelopes, _ := n.Containerd.Subscribe(t.Context())
	go func() {
		for envelope := range envelopes {
			event, err := typeurl.UnmarshalAny(envelope.Event)
			if err != nil || envelope.Namespace != namespace {
				continue
			}
			switch event := event.(type) {
			case interface{ GetSandboxID() string }:
				e.add(event.GetSandboxID(), envelope.Topic)
			case interface{ GetContainerID() string }:
				e.add(event.GetContainerID(), envelope.Topic)
			}
		}
	}()
	require.Eventually(t, func() bool {
		ctx := namespaces.WithNamespace(t.Context(), namespace)
		require.NoError(t, n.Containerd.EventService().Publish(ctx, "/hello", &eventtypes.SandboxCreate{SandboxID: "hello"}))
		return len(e.about("hello")) > 0
	}, waitFor, tick)
	return e
}

func (e *sandboxEvents) add(id, topic string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.count[id] == nil {
		e.count[id] = map[string]int{}
	}
	e.count[id][topic]++
}

// about returns the events of a sandbox so far.
func (e *sandboxEvents) about(id string) map[string]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.count[id])
}

// A client of containerd's sandbox API, without any CRI, has the same features: podfsm attaches a
// network, or uses the namespace of the client.
func TestControllerAPI(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	ctx := shareImages(t, n)
	controller := n.Containerd.SandboxController("podfsm")
	events := watchSandboxes(t, n, anotherNamespace)

	own := filepath.Join(n.Dir(), "own-netns")
	require.NoError(t, os.WriteFile(own, nil, 0o444))
	require.NoError(t, n.Inside(func() error { // on a thread that ends after it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", own, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "mine"}})
	}))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(own, unix.MNT_DETACH)) })

	runc, err := typeurl.MarshalAny(&runcoptions.Options{
		BinaryName: filepath.Join(n.Dir(), "bin/runc"), Root: filepath.Join(n.Dir(), "state/runc"), // default: /run/containerd/runc
	})
	require.NoError(t, err)
	run := func(t *testing.T, id, netNS string, config *runtime.PodSandboxConfig) {
		info := sandbox.Sandbox{ID: id, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2", Options: runc}, Sandboxer: "podfsm"}
		require.NoError(t, controller.Create(ctx, info, sandbox.WithOptions(config), sandbox.WithNetNSPath(netNS)))
		require.True(t, errdefs.IsAlreadyExists(controller.Create(ctx, info, sandbox.WithOptions(config))))
		started, err := controller.Start(ctx, id)
		require.NoError(t, err)
		require.Equal(t, id, started.SandboxID)
		require.NotZero(t, started.CreatedAt)

		status, err := controller.Status(ctx, id, true)
		require.NoError(t, err)
		require.Equal(t, "SANDBOX_READY", status.State)
		require.Equal(t, started.Pid, status.Pid)
		var verbose struct {
			SandboxMetadata struct {
				Metadata struct{ NetNSPath, IP string }
			}
		}
		require.NoError(t, json.Unmarshal([]byte(status.Info["info"]), &verbose))
		known := verbose.SandboxMetadata.Metadata
		same := func() bool {
			path, err := os.Stat(known.NetNSPath)
			require.NoError(t, err)
			pause, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", started.Pid))
			require.NoError(t, err)
			return os.SameFile(path, pause)
		}
		require.True(t, same(), "pause is in the namespace that the status names")
		link, inside := "eth0", func(name string) error {
			return ns.WithNetNSPath(known.NetNSPath, func(ns.NetNS) error {
				_, err := netlink.LinkByName(name)
				return err
			})
		}
		if netNS != "" {
			link = "mine"
			require.Equal(t, netNS, known.NetNSPath)
			require.Empty(t, known.IP, "no network but what the caller has made")
			require.Error(t, inside("eth0"))
		} else {
			require.NotEmpty(t, known.IP)
		}
		require.NoError(t, inside(link))

		metric, err := controller.Metrics(ctx, id)
		require.NoError(t, err)
		require.Equal(t, id, metric.GetID())
		figures := &cg1.Metrics{}
		require.NoError(t, typeurl.UnmarshalTo(metric.GetData(), figures))
		require.NotZero(t, figures.GetMemory().GetUsage().GetUsage())

		exited := make(chan error, 1)
		go func() {
			exit, err := controller.Wait(ctx, id)
			if err == nil && exit.ExitStatus != 128+uint32(unix.SIGKILL) {
				err = fmt.Errorf("pause ended with %d", exit.ExitStatus)
			}
			exited <- err
		}()
		require.NoError(t, controller.Stop(ctx, id))
		require.NoError(t, <-exited)
		require.NoError(t, controller.Stop(ctx, id))
		status, err = controller.Status(ctx, id, false)
		require.NoError(t, err)
		require.Equal(t, "SANDBOX_NOTREADY", status.State)
		require.NoError(t, controller.Shutdown(ctx, id))
		require.NoError(t, controller.Shutdown(ctx, id))
		_, err = controller.Status(ctx, id, false)
		require.True(t, errdefs.IsNotFound(err), "%v", err)

		// Not /tasks/exit and /tasks/delete: a shim that is deleted may end before it has sent them.
		want := map[string]int{"/sandboxes/create": 1, "/sandboxes/start": 1, "/sandboxes/exit": 1, "/tasks/start": 1}
		require.Eventually(t, func() bool {
			about := events.about(id)
			maps.DeleteFunc(about, func(topic string, _ int) bool { return want[topic] == 0 })
			return maps.Equal(want, about)
		}, waitFor, tick, "%v", events)
	}
	config := func(name string) *runtime.PodSandboxConfig { return n.PodConfig(name) }
	hostUsers := n.PodConfig("brought", harness.HostUsers())
	run(t, "warm-up", "", config("warm-up"))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("network by podfsm", func(t *testing.T) { run(t, "made", "", config("made")) })
	t.Run("network of the caller's", func(t *testing.T) {
		run(t, "brought", own, hostUsers)
		require.NoError(t, ns.WithNetNSPath(own, func(ns.NetNS) error {
			_, err := netlink.LinkByName("mine")
			return err
		}), "what the caller has made is the caller's to remove")
	})
	t.Run("without options", func(t *testing.T) {
		err := controller.Create(ctx, sandbox.Sandbox{ID: "bare", Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}})
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	})
	t.Run("unknown", func(t *testing.T) {
		_, err := controller.Start(ctx, "nobody")
		require.True(t, errdefs.IsNotFound(err), "%v", err)
		_, err = controller.Metrics(ctx, "nobody")
		require.True(t, errdefs.IsNotFound(err), "%v", err)
	})
	n.RequireClean(t, before)
}
