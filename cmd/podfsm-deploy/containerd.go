package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	processes "github.com/podfsm/podfsm/host"
)

// pollInterval is between two questions whether something has happened.
const pollInterval = 500 * time.Millisecond

// state is that of a containerd that answers.
type state struct {
	podfsm bool     // its plugin is loaded
	ready  bool     // for pods: its CRI service says so
	flags  []string // of its command line, without those that have containerd's defaults
}

func (h *host) connect() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+h.address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// The list of sandboxes has the annotations of all pods.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize)))
}

// containerd asks the containerd that runs.
func (h *host) containerd(ctx context.Context) (s state, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := h.connect()
	if err != nil {
		return s, err
	}
	defer conn.Close()
	client := introspection.NewIntrospectionClient(conn)
	loaded, err := client.Plugins(ctx, &introspection.PluginsRequest{})
	if err != nil {
		return s, err
	}
	s.podfsm = slices.ContainsFunc(loaded.GetPlugins(), func(p *introspection.Plugin) bool {
		return p.GetType() == string(plugins.PodSandboxPlugin) && p.GetID() == "podfsm" && p.GetInitErr() == nil
	})
	server, err := client.Server(ctx, &emptypb.Empty{})
	if err != nil {
		return s, err
	}
	if s.flags, err = flagsOf(ctx, int(server.GetPid())); err != nil {
		return s, err
	}
	told, err := runtime.NewRuntimeServiceClient(conn).Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return s, err
	}
	s.ready = slices.ContainsFunc(told.GetStatus().GetConditions(), func(c *runtime.RuntimeCondition) bool {
		return c.GetType() == runtime.RuntimeReady && c.GetStatus()
	})
	return s, nil
}

// flagsOf reads the flags of a running containerd.
func flagsOf(ctx context.Context, pid int) ([]string, error) {
	args, err := processes.Args(ctx, pid)
	if err != nil {
		return nil, err
	}
	args = args[1:]
	if slices.Equal(args, []string{"--config", configFile}) || slices.Equal(args, []string{"--config=" + configFile}) {
		return nil, nil
	}
	return args, nil
}

// require returns an error unless containerd runs with podfsm, or without it.
func (s state) require(podfsm bool) error {
	switch {
	case podfsm && !s.podfsm:
		return errors.New("containerd runs without podfsm; does another drop-in of containerd.service set ExecStart?")
	case !podfsm && s.podfsm:
		return errors.New("containerd still runs with podfsm; does another drop-in of containerd.service run containerd-podfsm?")
	}
	return nil
}

// awaitReady waits until containerd is ready, and asks then whether it is the
// right one. More time doesn't change that, nor bring a CRI service.
func (h *host) awaitReady(ctx context.Context, right func(state) error) error {
	var last error
	for {
		s, err := h.containerd(ctx)
		switch {
		case err == nil && s.ready:
			return right(s)
		case err == nil:
			err = errors.New("containerd's runtime is not ready")
		case status.Code(err) == codes.Unimplemented:
			return fmt.Errorf("containerd has no CRI service; see journalctl --unit containerd: %w", err)
		}
		if ctx.Err() == nil || last == nil { // the end of ctx says less
			last = err
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(pollInterval):
		}
	}
}

// noPodError says that podfsm runs, but not its pods.
type noPodError struct{ error }

// verify runs a pod of podfsm's. A pod that fails is no reason for a rollback:
// containerd works, the node is not labelled, and podfsm timeline shows why.
func (h *host) verify(ctx context.Context, i installation) error {
	if err := h.takePods(ctx, i); err != nil {
		return err
	}
	config, err := readConfig(ctx)
	if err != nil {
		return err
	}
	conn, err := h.connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	client := runtime.NewRuntimeServiceClient(conn)
	ctx, cancel := context.WithTimeout(ctx, h.verifyTimeout)
	defer cancel()
	for attempt := uint32(0); ; attempt++ {
		err := errors.Join(removePods(ctx, client), runPod(ctx, client, config.cgroupParent(), attempt))
		if err == nil {
			h.say("a pod has run")
			return nil
		}
		h.say("a pod has failed: %v", err)
		select {
		case <-ctx.Done():
			return noPodError{fmt.Errorf("failed to run a pod: %w; podfsm timeline podfsm-deploy/verify shows why", err)}
		case <-time.After(10 * time.Second): // as the kubelet waits
		}
	}
}

// podfsm-deploy's own pods are known by these. No pod of the kubelet's has such a uid: the API server
// gives a UUID to each. A label would be no proof, since users choose those of their pods.
const (
	verifyNamespace = "podfsm-deploy"
	verifyUID       = "podfsm-deploy-verify"
)

// runPod starts a sandbox and removes it.
func runPod(ctx context.Context, client runtime.RuntimeServiceClient, cgroupParent string, attempt uint32) error {
	_, err := client.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{
		RuntimeHandler: "podfsm",
		Config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Name: "verify", Namespace: verifyNamespace, Uid: verifyUID, Attempt: attempt},
			Linux:    &runtime.LinuxPodSandboxConfig{CgroupParent: cgroupParent},
		},
	})
	if err != nil {
		return err
	}
	return removePods(ctx, client)
}

// removePods stops and removes the sandboxes of this verification, or of an earlier
// one that was killed.
func removePods(ctx context.Context, client runtime.RuntimeServiceClient) error {
	list, err := client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, sandbox := range list.GetItems() {
		if m := sandbox.GetMetadata(); m.GetNamespace() != verifyNamespace || m.GetUid() != verifyUID {
			continue
		}
		_, stopErr := client.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: sandbox.GetId()})
		_, removeErr := client.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: sandbox.GetId()})
		if err := errors.Join(stopErr, removeErr); err != nil {
			return err
		}
	}
	return nil
}

// config is what matters here of containerd's configuration.
type config struct {
	Root    string   `toml:"root"`
	State   string   `toml:"state"`
	Imports []string `toml:"imports"`
	Plugins struct {
		Runtime struct {
			Containerd struct {
				Runtimes map[string]struct {
					Options struct{ SystemdCgroup bool } `toml:"options"`
				} `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"io.containerd.cri.v1.runtime"`
	} `toml:"plugins"`
}

// readConfig reads all files of containerd's configuration, as containerd does.
func readConfig(ctx context.Context) (c config, err error) {
	text, err := exec.CommandContext(ctx, program, "config", "dump").Output()
	if err != nil {
		return c, fmt.Errorf("failed to read containerd's configuration: %w", err)
	}
	return c, toml.Unmarshal(text, &c)
}

// cgroupParent is where a pod's cgroup may be, in the words of the cgroup driver.
func (c config) cgroupParent() string {
	if c.Plugins.Runtime.Containerd.Runtimes["podfsm"].Options.SystemdCgroup {
		return "system.slice"
	}
	return "/"
}

// withImport has a config.toml import the handler's file.
func withImport(text []byte) ([]byte, error) {
	var has config
	if err := toml.Unmarshal(text, &has); err != nil {
		return nil, fmt.Errorf("failed to read %q: %w", configFile, err)
	}
	for _, pattern := range has.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(configFile), pattern)
		}
		if found, err := filepath.Match(pattern, handlerFile); err == nil && found {
			return text, nil
		}
	}
	pattern := filepath.Join(filepath.Dir(handlerFile), "*.toml")
	if has.Imports != nil {
		return nil, fmt.Errorf("failed to import %q: %q has other imports; add %q to them", handlerFile, configFile, pattern)
	}
	return fmt.Appendf(nil, "imports = [%q]\n%s", pattern, text), nil
}
