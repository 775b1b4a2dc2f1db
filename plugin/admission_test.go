package plugin

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/userns"
)

func mappings(change func(*runtime.UserNamespace)) func(*runtime.PodSandboxConfig) {
	return func(config *runtime.PodSandboxConfig) { change(options(config).UsernsOptions) }
}

func modes(change func(*runtime.NamespaceOption)) func(*runtime.PodSandboxConfig) {
	return func(config *runtime.PodSandboxConfig) { change(options(config)) }
}

func TestCheckRefuses(t *testing.T) {
	const top = 1 << 32
	for name, tc := range map[string]struct {
		change func(*runtime.PodSandboxConfig)
		want   []string
	}{
		"no metadata":         {func(c *runtime.PodSandboxConfig) { c.Metadata = nil }, []string{"metadata"}},
		"network CONTAINER":   {modes(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_CONTAINER }), []string{"network", "CONTAINER"}},
		"network TARGET":      {modes(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_TARGET }), []string{"network", "TARGET"}},
		"network of no name":  {modes(func(o *runtime.NamespaceOption) { o.Network = 9 }), []string{"network", "9"}},
		"ipc CONTAINER":       {modes(func(o *runtime.NamespaceOption) { o.Ipc = runtime.NamespaceMode_CONTAINER }), []string{"ipc", "CONTAINER"}},
		"ipc TARGET":          {modes(func(o *runtime.NamespaceOption) { o.Ipc = runtime.NamespaceMode_TARGET }), []string{"ipc", "TARGET"}},
		"pid TARGET":          {modes(func(o *runtime.NamespaceOption) { o.Pid = runtime.NamespaceMode_TARGET }), []string{"pid", "TARGET"}},
		"userns CONTAINER":    {mappings(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_CONTAINER }), []string{"CONTAINER"}},
		"userns TARGET":       {mappings(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_TARGET }), []string{"TARGET"}},
		"userns NODE, mapped": {mappings(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_NODE }), []string{"NODE"}},
		"no uid mapping":      {mappings(func(u *runtime.UserNamespace) { u.Uids = nil }), []string{"0 uid mappings"}},
		"two uid mappings":    {mappings(func(u *runtime.UserNamespace) { u.Uids = append(u.Uids, u.Uids[0]) }), []string{"2 uid mappings"}},
		"two gid mappings":    {mappings(func(u *runtime.UserNamespace) { u.Gids = append(u.Gids, u.Gids[0]) }), []string{"2 gid mappings"}},
		"a nil mapping":       {mappings(func(u *runtime.UserNamespace) { u.Uids[0] = nil }), []string{"length 0"}},
		"length 0":            {mappings(func(u *runtime.UserNamespace) { u.Uids[0].Length, u.Gids[0].Length = 0, 0 }), []string{"length 0"}},
		"lengths that differ": {mappings(func(u *runtime.UserNamespace) { u.Gids[0].Length = 1000 }), []string{"65536", "1000"}},
		"not from 0":          {mappings(func(u *runtime.UserNamespace) { u.Gids[0].ContainerId = 1 }), []string{"gid", "container id 1"}},
		"to 2^32-1":           {mappings(func(u *runtime.UserNamespace) { u.Uids[0].HostId = top - 65536 }), []string{fmt.Sprint(uint64(top - 1))}},
		"past 2^32":           {mappings(func(u *runtime.UserNamespace) { u.Uids[0].HostId = top - 2 }), []string{"host ids"}},
	} {
		t.Run(name, func(t *testing.T) {
			config := podConfig(tc.change)
			before := proto.CloneOf(config)
			mapping, err := check(config)
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			require.Nil(t, mapping)
			for _, want := range tc.want {
				require.ErrorContains(t, err, want)
			}
			require.True(t, proto.Equal(before, config))
		})
	}
	t.Run("nothing", func(t *testing.T) {
		_, err := check(nil)
		require.True(t, errdefs.IsInvalidArgument(err))
	})
}

// The kubelet aggregates events by their text.
func TestCheckAlwaysSaysTheSame(t *testing.T) {
	config := podConfig(modes(func(o *runtime.NamespaceOption) {
		o.Network, o.Ipc = runtime.NamespaceMode_TARGET, runtime.NamespaceMode_TARGET
	}))
	_, first := check(config)
	for range 100 {
		_, err := check(config)
		require.EqualError(t, err, first.Error())
	}
}

func TestCheckAccepts(t *testing.T) {
	whole := &userns.Mappings{UIDs: userns.Mapping{HostID: 131072, Length: 65536}, GIDs: userns.Mapping{HostID: 131072, Length: 65536}}
	for name, tc := range map[string]struct {
		change func(*runtime.PodSandboxConfig)
		want   *userns.Mappings
	}{
		"a user namespace": {func(*runtime.PodSandboxConfig) {}, whole},
		"the host's":       {modes(func(o *runtime.NamespaceOption) { o.UsernsOptions = nil }), nil},
		"the host's, said so": {modes(func(o *runtime.NamespaceOption) {
			o.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
		}), nil},
		"all modes POD":          {modes(func(o *runtime.NamespaceOption) { o.Pid = runtime.NamespaceMode_POD }), whole},
		"all modes NODE":         {modes(func(o *runtime.NamespaceOption) { o.Pid, o.Ipc, o.Network = 2, 2, 2 }), whole},
		"no security context":    {func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext = nil }, nil},
		"no namespace options":   {func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = nil }, nil},
		"metadata without names": {func(c *runtime.PodSandboxConfig) { c.Metadata = &runtime.PodSandboxMetadata{} }, whole},
	} {
		t.Run(name, func(t *testing.T) {
			mapping, err := check(podConfig(tc.change))
			require.NoError(t, err)
			require.Equal(t, tc.want, mapping)
		})
	}
}

func TestNewSpec(t *testing.T) {
	packed, err := typeurl.MarshalAny(&runcoptions.Options{BinaryName: "/usr/bin/crun"})
	require.NoError(t, err)
	info := sandbox.Sandbox{ID: "s1", Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2", Options: packed}}
	stock := stockWith(func(s *stockConfig) {
		s.Containerd.Runtimes["podfsm"] = handler{
			Sandboxer: Name, Path: "/usr/bin/shim", PodAnnotations: []string{"a.*"}, Snapshotter: "stargz",
		}
		s.Containerd.Runtimes["runc"] = handler{Path: "/not/this", PodAnnotations: []string{"not.*"}, Snapshotter: "not-this"}
	})

	config := podConfig()
	got, err := newSpec(stock, "podfsm", config, info, "/run/netns/own")
	require.NoError(t, err)
	require.Equal(t, &Spec{
		Config:         config,
		Handler:        "podfsm",
		Mapping:        &userns.Mappings{UIDs: userns.Mapping{HostID: 131072, Length: 65536}, GIDs: userns.Mapping{HostID: 131072, Length: 65536}},
		NetNSPath:      "/run/netns/own",
		RuntimeType:    "io.containerd.runc.v2",
		RuntimePath:    "/usr/bin/shim",
		RuntimeOptions: &ledger.Data{TypeURL: packed.GetTypeUrl(), Value: packed.GetValue()},
		PodAnnotations: []string{"a.*"},
		Snapshotter:    "stargz",
		Image:          "registry.example/pause:3.10.1",
	}, got)

	t.Run("a caller that names no handler", func(t *testing.T) {
		got, err := newSpec(stock, "", config, info, "")
		require.NoError(t, err)
		require.Equal(t, "overlayfs", got.Snapshotter, "the default handler isn't podfsm's: nothing is taken from it")
		require.Empty(t, got.RuntimePath)
		require.Empty(t, got.PodAnnotations)

		stock := stockWith(func(s *stockConfig) { s.Containerd.DefaultRuntimeName = "podfsm" })
		stock.Containerd.Runtimes["podfsm"] = handler{Sandboxer: Name, Snapshotter: "stargz"}
		got, err = newSpec(stock, "", config, info, "")
		require.NoError(t, err)
		require.Equal(t, "stargz", got.Snapshotter)
	})
	t.Run("no runtime options", func(t *testing.T) {
		got, err := newSpec(stock, "podfsm", config, sandbox.Sandbox{}, "")
		require.NoError(t, err)
		require.Nil(t, got.RuntimeOptions)
		require.True(t, got.Options() == nil, "a typed nil would be marshalled")

		// What comes from containerd's store or over gRPC is such a typed nil.
		info := sandbox.FromProto(&types.Sandbox{Runtime: &types.Sandbox_Runtime{Name: "io.containerd.runc.v2"}})
		got, err = newSpec(stock, "podfsm", config, info, "")
		require.NoError(t, err)
		require.Nil(t, got.RuntimeOptions)
	})
	t.Run("no pause image", func(t *testing.T) {
		stock := stockWith(func(s *stockConfig) { s.image.PinnedImages = nil })
		_, err := newSpec(stock, "podfsm", config, info, "")
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.ErrorContains(t, err, "pinned_images")
	})
	t.Run("bad input", func(t *testing.T) {
		_, err := newSpec(stock, "podfsm", nil, info, "")
		require.True(t, errdefs.IsInvalidArgument(err))
	})
	t.Run("where the pod's network comes from", func(t *testing.T) {
		onNode := podConfig(modes(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_NODE }))
		for _, tc := range []struct {
			config       *runtime.PodSandboxConfig
			path         string
			onNode, ours bool
		}{
			{config, "", false, true},
			{config, "/run/netns/own", false, false},
			{onNode, "", true, false},
			{onNode, "/run/netns/own", false, false},
		} {
			got, err := newSpec(stock, "podfsm", tc.config, info, tc.path)
			require.NoError(t, err)
			require.Equal(t, tc.onNode, got.OnNodeNetwork())
			require.Equal(t, tc.ours, got.NetworkIsOurs())
		}
	})
}

// containerd's service keeps images under their full names, and its own controller looks for the pause image there: "pause" or
// "rancher/mirrored-pause:3.6" (k3s) are fine references in its configuration.
func TestPauseImageIsLookedForByItsFullName(t *testing.T) {
	const digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for reference, want := range map[string]string{
		"registry.example/pause:3.10.1":                    "registry.example/pause:3.10.1",
		"registry.example/pause:3.10.1@" + digest:          "registry.example/pause@" + digest,
		"rancher/mirrored-pause:3.6":                       "docker.io/rancher/mirrored-pause:3.6",
		"pause":                                            "docker.io/library/pause:latest",
		"registry.example:5000/google_containers/pause":    "registry.example:5000/google_containers/pause:latest",
		"localhost/pause:test":                             "localhost/pause:test",
		"registry.example/pause@" + digest:                 "registry.example/pause@" + digest,
		"registry.example/google_containers/pause-amd64:1": "registry.example/google_containers/pause-amd64:1",
	} {
		t.Run(reference, func(t *testing.T) {
			stock := stockWith(func(s *stockConfig) { s.image.PinnedImages["sandbox"] = reference })
			got, err := newSpec(stock, "podfsm", podConfig(), sandbox.Sandbox{}, "")
			require.NoError(t, err)
			require.Equal(t, want, got.Image)
		})
	}
}

// What a restart reads back is what was recorded.
func TestSpecInTheLedger(t *testing.T) {
	packed, err := typeurl.MarshalAny(&runcoptions.Options{BinaryName: "/usr/bin/crun"})
	require.NoError(t, err)
	info := sandbox.Sandbox{Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2", Options: packed}}
	spec, err := newSpec(stockWith(), "podfsm", podConfig(func(c *runtime.PodSandboxConfig) {
		c.Annotations = map[string]string{"odd": "\"\u2028\x00</script>"}
		c.PortMappings = []*runtime.PortMapping{{Protocol: runtime.Protocol_SCTP, ContainerPort: 80, HostPort: 8080}}
		c.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 1 << 40, Unified: map[string]string{"memory.high": "1"}}
	}), info, "/run/netns/own")
	require.NoError(t, err)

	data, err := ledger.Marshal(spec)
	require.NoError(t, err)
	back := &Spec{}
	require.NoError(t, (&ledger.Record{Data: data}).Unmarshal(back))
	require.True(t, proto.Equal(spec.Config, back.Config))
	spec.Config, back.Config = nil, nil
	require.Equal(t, spec, back)
}

// What can't be a pod's cgroup is refused before anything is made, and so is what the runtime handler's driver makes no cgroups in.
func TestCheckCgroup(t *testing.T) {
	t.Parallel()
	const remedy = `set SystemdCgroup = false in the options of the handler, or cgroupDriver: systemd in the kubelet's configuration`
	for _, tc := range []struct {
		parent  string
		systemd bool
		says    string // "" where the pod can be run
	}{
		{parent: ""},
		{parent: "/"},
		{parent: "/kubepods/pod1"},
		{parent: "/kubepods//pod1/"},
		{parent: "/kubepods/../../pod1"},
		{parent: "kubepods/pod1"},
		{parent: "/.."},
		{parent: "/kubepods.slice/kubepods-pod1.slice"},
		{parent: "/kubepods.slice/kubepods-pod1.slice/"},
		{parent: "/kubepods/\x00", says: "NUL"},
		{parent: "/kubepods/a\nb", says: "line break"},
		{parent: "/kubepods/" + strings.Repeat("x", 256), says: "more than 255 bytes"},
		{parent: strings.Repeat("x", 250) + ".slice", says: "more than 255 bytes"},
		{parent: "", systemd: true, says: remedy},
		{parent: "/kubepods/pod1", systemd: true, says: remedy},
		{parent: "/kubepods.slice/pod1", systemd: true, says: remedy},
		{parent: "/kubepods.slice/kubepods--pod1.slice", systemd: true, says: "in no slice of systemd's"},
		{parent: "/kubepods.slice/\x00.slice", systemd: true, says: "NUL"},
		{parent: "/kubepods.slice/a\nb.slice", systemd: true, says: "line break"},
		{parent: strings.Repeat("x", 250) + ".slice", systemd: true, says: "more than 255 bytes"},
		{parent: "/a:b.slice", systemd: true, says: "slice:prefix:name"},
	} {
		spec := &Spec{Config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: "default"},
			Linux:    &runtime.LinuxPodSandboxConfig{CgroupParent: tc.parent},
		}}
		err := checkCgroup(spec, "fast", tc.systemd)
		if tc.says == "" {
			require.NoError(t, err, tc.parent)
			continue
		}
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", tc.parent, err)
		for _, text := range []string{tc.says, `pod "default/web"`, `runtime handler "fast"`, fmt.Sprintf("%q", tc.parent)} {
			require.ErrorContains(t, err, text, tc.parent)
		}
	}
}
