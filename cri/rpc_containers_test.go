package cri

import (
	"context"
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// chosen is a user namespace that podfsm has chosen.
func chosen() *runtime.UserNamespace {
	return &runtime.UserNamespace{
		Mode: runtime.NamespaceMode_POD,
		Uids: []*runtime.IDMapping{{HostId: 1 << 20, Length: 65536}},
		Gids: []*runtime.IDMapping{{HostId: 2 << 20, Length: 65536}},
	}
}

// hostUsers is what the kubelet sends for a pod that asks for nothing.
func hostUsers(o *runtime.NamespaceOption) {
	o.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
}

// containerRequest is one as the kubelet sends it for a pod.
func containerRequest(pod *runtime.PodSandboxConfig, mounts ...*runtime.Mount) *runtime.CreateContainerRequest {
	return &runtime.CreateContainerRequest{
		PodSandboxId: "s1",
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "main"},
			Mounts:   mounts,
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: pod.GetLinux().GetSecurityContext().GetNamespaceOptions(),
			}},
		},
		SandboxConfig: pod,
	}
}

// createIn runs CreateContainer against a pod with the id s1, and returns what containerd's service gets; nil when nothing.
func createIn(t *testing.T, pod Sandbox, request *runtime.CreateContainerRequest) (*runtime.CreateContainerRequest, *controller, error) {
	t.Helper()
	before := proto.CloneOf(request)
	var got *runtime.CreateContainerRequest
	s := &stock{create: func(_ context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
		got = r
		return &runtime.CreateContainerResponse{ContainerId: "c1"}, nil
	}}
	c := &controller{pods: map[string]Sandbox{"s1": pod}}
	resp, err := newFront(t, s, c).CreateContainer(t.Context(), request)
	requireEqual(t, before, request, "the caller's message stays as it was")
	if err == nil {
		require.Equal(t, "c1", resp.GetContainerId())
	}
	return got, c, err
}

func TestContainerGetsTheChosenUserNamespace(t *testing.T) {
	config := podConfig(hostUsers)
	pod := Sandbox{Config: config, UserNS: chosen()}
	request := containerRequest(config,
		&runtime.Mount{HostPath: "/data", ContainerPath: "/data"},
		&runtime.Mount{ContainerPath: "/image", Image: &runtime.ImageSpec{Image: "model"}, Readonly: true})
	want := proto.CloneOf(request)
	want.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions = chosen()
	want.SandboxConfig.Linux.SecurityContext.NamespaceOptions.UsernsOptions = chosen()
	for _, m := range want.Config.Mounts {
		m.UidMappings, m.GidMappings = chosen().Uids, chosen().Gids
	}
	got, c, err := createIn(t, pod, request)
	require.NoError(t, err)
	requireEqual(t, want, got)
	require.Equal(t, []string{"admit s1"}, c.calls)
	requireEqual(t, request.Config, c.admitted, "as the caller has sent it")
	requireEqual(t, chosen(), pod.UserNS)

	t.Run("where any message may be nil", func(t *testing.T) {
		for name, request := range map[string]*runtime.CreateContainerRequest{
			"configurations":    {PodSandboxId: "s1"},
			"Linux sections":    {PodSandboxId: "s1", Config: &runtime.ContainerConfig{}, SandboxConfig: &runtime.PodSandboxConfig{}},
			"security contexts": {PodSandboxId: "s1", Config: &runtime.ContainerConfig{Linux: &runtime.LinuxContainerConfig{}}, SandboxConfig: &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{}}},
			"a mount":           {PodSandboxId: "s1", Config: &runtime.ContainerConfig{Mounts: []*runtime.Mount{nil}}},
		} {
			got, _, err := createIn(t, pod, request)
			require.NoError(t, err, name)
			requireEqual(t, chosen(), got.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions, name)
			requireEqual(t, chosen(), got.SandboxConfig.Linux.SecurityContext.NamespaceOptions.UsernsOptions, name)
		}
	})
}

func TestContainerOfPodThatWasAskedStays(t *testing.T) {
	asked := podConfig()
	users := asked.Linux.SecurityContext.NamespaceOptions.UsernsOptions
	for name, test := range map[string]struct {
		pod     Sandbox
		request *runtime.CreateContainerRequest
	}{
		"in a user namespace": {
			pod: Sandbox{Config: asked},
			request: containerRequest(asked,
				&runtime.Mount{HostPath: "/data", ContainerPath: "/data", UidMappings: users.Uids, GidMappings: users.Gids},
				&runtime.Mount{HostPath: "/raw", ContainerPath: "/raw"},
				&runtime.Mount{ContainerPath: "/image", Image: &runtime.ImageSpec{Image: "model"}, UidMappings: users.Uids, GidMappings: users.Gids}),
		},
		"on the node's users": {
			pod:     Sandbox{Config: podConfig(hostUsers)},
			request: containerRequest(podConfig(hostUsers), &runtime.Mount{HostPath: "/data", ContainerPath: "/data"}),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, c, err := createIn(t, test.pod, test.request)
			require.NoError(t, err)
			require.Same(t, test.request, got)
			require.Equal(t, []string{"admit s1"}, c.calls)
		})
	}
}

func TestContainerIsRefusedBeforeAnythingIsMade(t *testing.T) {
	for name, test := range map[string]struct {
		pod    Sandbox
		change func(*runtime.ContainerConfig)
		class  func(error) bool
		says   string
	}{
		"mapped by podfsm": {
			pod:    Sandbox{Config: podConfig(hostUsers), UserNS: chosen()},
			change: func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
			class:  errdefs.IsInvalidArgument,
			says:   `container "main" is privileged`,
		},
		"mapped as it asks": {
			pod:    Sandbox{Config: podConfig()},
			change: func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
			class:  errdefs.IsInvalidArgument,
			says:   `container "main" is privileged`,
		},
		"an image that can't be mapped": {
			pod:    Sandbox{Config: podConfig(hostUsers), UserNS: chosen()},
			change: func(c *runtime.ContainerConfig) { c.Image = &runtime.ImageSpec{Image: "unmapped"} },
			class:  errdefs.IsFailedPrecondition,
			says:   `root filesystem of container "main" of pod "default/web": uid 70000`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			request := containerRequest(podConfig(hostUsers))
			test.change(request.Config)
			got, _, err := createIn(t, test.pod, request)
			require.Nil(t, got, "containerd's service hears nothing of it")
			require.True(t, test.class(err), "%v", err)
			require.ErrorContains(t, err, test.says)
		})
	}
}

func TestRootFSIsReadyWhileTheContainerIsMade(t *testing.T) {
	c := &controller{pods: map[string]Sandbox{"s1": {ID: "s1", Config: podConfig()}}}
	s := &stock{create: func(context.Context, *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
		require.Zero(t, c.released.Load(), "released too early")
		return &runtime.CreateContainerResponse{ContainerId: "c1"}, nil
	}}
	_, err := newFront(t, s, c).CreateContainer(t.Context(), containerRequest(podConfig()))
	require.NoError(t, err)
	require.EqualValues(t, 1, c.released.Load())
}

func TestContainerOfOtherHandlersPassesThrough(t *testing.T) {
	request := containerRequest(podConfig(), &runtime.Mount{HostPath: "/ramfs", ContainerPath: "/data", UidMappings: chosen().Uids, GidMappings: chosen().Gids})
	s := &stock{create: func(_ context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
		require.Same(t, request, r)
		return &runtime.CreateContainerResponse{ContainerId: "c1"}, nil
	}}
	c := &controller{}
	_, err := newFront(t, s, c).CreateContainer(t.Context(), request)
	require.NoError(t, err)
	require.Empty(t, c.calls)
}

// What containerd's service shows of a container in a chosen user namespace is what the caller sent.
func TestContainerStatusIsRestored(t *testing.T) {
	config := podConfig(hostUsers)
	sent := containerRequest(config, &runtime.Mount{HostPath: "/data", ContainerPath: "/data"})
	pod := Sandbox{Config: config, UserNS: chosen()}
	made := inUserNS(sent, pod.UserNS)
	record := proto.CloneOf(made.Config) // containerd's own, which statuses share
	status := func() *runtime.ContainerStatus {
		return &runtime.ContainerStatus{Id: "c1", Mounts: record.Mounts}
	}
	info, err := json.Marshal(map[string]any{"sandboxID": "s1", "config": record, "runtimeSpec": map[string]string{"ociVersion": "1.2.0"}})
	require.NoError(t, err)
	s := &stock{}
	c := &controller{pods: map[string]Sandbox{"s1": pod}, containers: map[string]string{"c1": "s1", "c2": "s2"}}

	s.containerStatus = &runtime.ContainerStatusResponse{Status: status(), Info: map[string]string{"info": string(info), "more": "x"}}
	got, err := newFront(t, s, c).ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: "c1", Verbose: true})
	require.NoError(t, err)
	requireEqual(t, &runtime.ContainerStatus{Id: "c1", Mounts: sent.Config.Mounts}, got.GetStatus())
	require.Equal(t, "x", got.GetInfo()["more"])
	want, err := json.Marshal(map[string]any{"sandboxID": "s1", "config": sent.Config, "runtimeSpec": map[string]string{"ociVersion": "1.2.0"}})
	require.NoError(t, err)
	require.JSONEq(t, string(want), got.GetInfo()["info"])
	requireEqual(t, made.Config, record, "containerd's record stays as it was")

	t.Run("where a mount is nil", func(t *testing.T) {
		s.containerStatus = &runtime.ContainerStatusResponse{
			Status: &runtime.ContainerStatus{Id: "c1", Mounts: []*runtime.Mount{nil}},
			Info:   map[string]string{"info": `{"config": {"mounts": [null]}}`},
		}
		_, err := newFront(t, s, c).ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: "c1", Verbose: true})
		require.NoError(t, err)
	})

	t.Run("whose pod can't be found", func(t *testing.T) {
		s.containerStatus = &runtime.ContainerStatusResponse{Status: status()}
		lost := &controller{lookErr: errdefs.ErrUnavailable}
		_, err := newFront(t, s, lost).ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: "c1"})
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
	})

	t.Run("in events", func(t *testing.T) {
		event := &runtime.ContainerEventResponse{PodSandboxStatus: &runtime.PodSandboxStatus{Id: "s1"}, ContainersStatuses: []*runtime.ContainerStatus{status(), nil}}
		s.events = func(_ *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
			return stream.Send(event)
		}
		stream := &sink{}
		require.NoError(t, newFront(t, s, c).GetContainerEvents(nil, stream))
		requireEqual(t, &runtime.ContainerStatus{Id: "c1", Mounts: sent.Config.Mounts}, stream.sent[0].GetContainersStatuses()[0])
		requireEqual(t, made.Config, record)
	})

	t.Run("not of others", func(t *testing.T) {
		c.pods["s3"] = Sandbox{Config: podConfig()} // its mapping is the caller's
		c.containers["c3"] = "s3"
		for _, id := range []string{"c2", "c3", "c4"} {
			s.containerStatus = &runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: id, Mounts: record.Mounts}}
			got, err := newFront(t, s, c).ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: id})
			require.NoError(t, err)
			require.Same(t, s.containerStatus, got)
			requireEqual(t, record.Mounts[0], got.GetStatus().GetMounts()[0])
		}
	})
}
