package pause

//lint:file-ignore SA1019 older clients name seccomp profiles by the old field

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	podUIDs = []specs.LinuxIDMapping{{HostID: 131072, Size: 65536}}
	podGIDs = []specs.LinuxIDMapping{{HostID: 262144, Size: 65536}}

	noCapabilities = &specs.LinuxCapabilities{}
)

// testPod is a pod as the kubelet sends it; each call returns a new one.
func testPod() Pod {
	return Pod{
		ID: "sandbox",
		Config: &runtime.PodSandboxConfig{
			Metadata:     &runtime.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "uid-1"},
			Hostname:     "web",
			LogDirectory: "/var/log/pods/web",
			Annotations:  map[string]string{"example.com/team": "blue"},
			Linux: &runtime.LinuxPodSandboxConfig{
				SecurityContext: &runtime.LinuxSandboxSecurityContext{
					NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
				},
			},
		},
		ImageConfig: imagespec.ImageConfig{Entrypoint: []string{"/pause"}, Env: []string{"PATH=/bin"}},
		ImageRef:    "registry.example/pause:3.10.1",
	}
}

func testSettings() Settings {
	return Settings{Files: Files{RootDir: "/root", StateDir: "/state"}}
}

// complete builds a spec and applies its options, as creating the container does.
func complete(t *testing.T, settings Settings, pod Pod) (*specs.Spec, error) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	spec, err := settings.Spec(ctx, pod)
	if err != nil {
		return nil, err
	}
	container := &containers.Container{ID: pod.ID}
	return spec.OCI, oci.ApplyOpts(ctx, nil, container, spec.OCI, spec.Opts...)
}

func mountAt(spec *specs.Spec, destination string) *specs.Mount {
	for i := range spec.Mounts {
		if filepath.Clean(spec.Mounts[i].Destination) == destination {
			return &spec.Mounts[i]
		}
	}
	return nil
}

func namespaceOf(spec *specs.Spec, kind specs.LinuxNamespaceType) *specs.LinuxNamespace {
	for i := range spec.Linux.Namespaces {
		if spec.Linux.Namespaces[i].Type == kind {
			return &spec.Linux.Namespaces[i]
		}
	}
	return nil
}

func TestSpec(t *testing.T) {
	security := func(pod *Pod) *runtime.LinuxSandboxSecurityContext { return pod.Config.Linux.SecurityContext }
	options := func(pod *Pod) *runtime.NamespaceOption { return security(pod).NamespaceOptions }
	userNS := func(pod *Pod) { pod.UIDs, pod.GIDs = podUIDs, podGIDs }

	for name, tc := range map[string]struct {
		pod      func(*Pod)
		settings func(*Settings)
		check    func(*testing.T, *specs.Spec)
	}{
		"process": {
			pod: func(p *Pod) {
				p.ImageConfig.Cmd = []string{"-v"}
				p.ImageConfig.WorkingDir = "/work"
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, []string{"/pause", "-v"}, s.Process.Args)
				require.Equal(t, []string{"PATH=/bin"}, s.Process.Env)
				require.Equal(t, "/work", s.Process.Cwd)
				require.True(t, s.Process.NoNewPrivileges)
				require.False(t, s.Process.Terminal)
				require.Empty(t, s.Process.Rlimits)
				require.Empty(t, s.Process.ApparmorProfile)
				require.Equal(t, noCapabilities, s.Process.Capabilities)
			},
		},
		"command without entrypoint": {
			pod: func(p *Pod) { p.ImageConfig.Entrypoint, p.ImageConfig.Cmd = nil, []string{"/pause"} },
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, []string{"/pause"}, s.Process.Args)
				require.Equal(t, "/", s.Process.Cwd)
			},
		},
		"rootfs": {
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, &specs.Root{Path: "rootfs", Readonly: true}, s.Root)
				require.Equal(t, []specs.Mount{
					{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "nodev", "mode=755", "size=64k"}},
					{Destination: "/dev/shm", Type: "bind", Source: "/state/sandboxes/sandbox/shm", Options: []string{"rbind", "ro", "nosuid", "nodev", "noexec"}},
				}, s.Mounts)
				require.Empty(t, s.Linux.MaskedPaths)
				require.Empty(t, s.Linux.ReadonlyPaths)
				require.Empty(t, s.Linux.Resources.Devices)
			},
		},
		"namespaces": {
			check: func(t *testing.T, s *specs.Spec) {
				require.ElementsMatch(t, []specs.LinuxNamespace{
					{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
					{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
				}, s.Linux.Namespaces)
				require.Equal(t, "web", s.Hostname)
				require.Empty(t, s.Linux.UIDMappings)
			},
		},
		"user namespace": {
			pod: userNS,
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, &specs.LinuxNamespace{Type: specs.UserNamespace}, namespaceOf(s, specs.UserNamespace))
				require.Equal(t, &specs.LinuxNamespace{Type: specs.NetworkNamespace}, namespaceOf(s, specs.NetworkNamespace))
				require.Equal(t, podUIDs, s.Linux.UIDMappings)
				require.Equal(t, podGIDs, s.Linux.GIDMappings)
			},
		},
		"network namespace of the caller": {
			pod: func(p *Pod) { p.NetNSPath = "/run/netns/mine" },
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, &specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/run/netns/mine"}, namespaceOf(s, specs.NetworkNamespace))
			},
		},
		"node's network": {
			pod: func(p *Pod) { options(p).Network = runtime.NamespaceMode_NODE },
			check: func(t *testing.T, s *specs.Spec) {
				require.Nil(t, namespaceOf(s, specs.NetworkNamespace))
				require.Nil(t, namespaceOf(s, specs.UTSNamespace))
				require.Empty(t, s.Hostname, "runc refuses it without a UTS namespace")
			},
		},
		"node's network in a user namespace": {
			pod: func(p *Pod) {
				userNS(p)
				options(p).Network = runtime.NamespaceMode_NODE
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.NotNil(t, namespaceOf(s, specs.UserNamespace))
				require.Nil(t, namespaceOf(s, specs.NetworkNamespace))
			},
		},
		"node's pids": {
			pod: func(p *Pod) { options(p).Pid = runtime.NamespaceMode_NODE },
			check: func(t *testing.T, s *specs.Spec) {
				require.Nil(t, namespaceOf(s, specs.PIDNamespace))
				require.NotNil(t, namespaceOf(s, specs.IPCNamespace))
			},
		},
		"node's ipc": {
			pod: func(p *Pod) { options(p).Ipc = runtime.NamespaceMode_NODE },
			check: func(t *testing.T, s *specs.Spec) {
				require.Nil(t, namespaceOf(s, specs.IPCNamespace))
				require.NotNil(t, namespaceOf(s, specs.PIDNamespace))
				require.Equal(t, "/dev/shm", mountAt(s, "/dev/shm").Source)
			},
		},
		"privileged": {
			pod: func(p *Pod) { security(p).Privileged = true },
			check: func(t *testing.T, s *specs.Spec) {
				require.Empty(t, s.Process.SelinuxLabel)
				require.Equal(t, noCapabilities, s.Process.Capabilities, "pause needs none for it")
				require.True(t, s.Process.NoNewPrivileges)
				require.Len(t, s.Mounts, 2)
			},
		},
		"cgroup by default": {
			check: func(t *testing.T, s *specs.Spec) { require.Equal(t, "/k8s.io/sandbox", s.Linux.CgroupsPath) },
		},
		"cgroup parent": {
			pod: func(p *Pod) { p.Config.Linux.CgroupParent = "/kubepods/poduid-1" },
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, "/kubepods/poduid-1/sandbox", s.Linux.CgroupsPath)
			},
		},
		"cpu shares": {
			check: func(t *testing.T, s *specs.Spec) { require.EqualValues(t, 2, *s.Linux.Resources.CPU.Shares) },
		},
		"no sysctls by default": {
			check: func(t *testing.T, s *specs.Spec) { require.Empty(t, s.Linux.Sysctl) },
		},
		"unprivileged ports and icmp": {
			settings: func(s *Settings) { s.EnableUnprivilegedPorts, s.EnableUnprivilegedICMP = true, true },
			pod:      func(p *Pod) { p.Config.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"} },
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, map[string]string{
					"kernel.shm_rmid_forced":              "1",
					"net.ipv4.ip_unprivileged_port_start": "0",
					"net.ipv4.ping_group_range":           "0 2147483647",
				}, s.Linux.Sysctl)
			},
		},
		"unprivileged ports and icmp as the pod has them": {
			settings: func(s *Settings) { s.EnableUnprivilegedPorts, s.EnableUnprivilegedICMP = true, true },
			pod: func(p *Pod) {
				p.Config.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "1 0"}
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "1 0"}, s.Linux.Sysctl)
			},
		},
		"unprivileged icmp in a user namespace": {
			settings: func(s *Settings) { s.EnableUnprivilegedPorts, s.EnableUnprivilegedICMP = true, true },
			pod:      userNS,
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}, s.Linux.Sysctl)
			},
		},
		"unprivileged ports and icmp on the node's network": {
			settings: func(s *Settings) { s.EnableUnprivilegedPorts, s.EnableUnprivilegedICMP = true, true },
			pod:      func(p *Pod) { options(p).Network = runtime.NamespaceMode_NODE },
			check:    func(t *testing.T, s *specs.Spec) { require.Empty(t, s.Linux.Sysctl) },
		},
		"oom score": {
			check: func(t *testing.T, s *specs.Spec) { require.Equal(t, -998, *s.Process.OOMScoreAdj) },
		},
		"annotations": {
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, map[string]string{
					"io.kubernetes.cri.container-type":        "sandbox",
					"io.kubernetes.cri.sandbox-id":            "sandbox",
					"io.kubernetes.cri.sandbox-name":          "web",
					"io.kubernetes.cri.sandbox-namespace":     "shop",
					"io.kubernetes.cri.sandbox-uid":           "uid-1",
					"io.kubernetes.cri.sandbox-log-directory": "/var/log/pods/web",
					"io.kubernetes.cri.podsandbox.image-name": "registry.example/pause:3.10.1",
				}, s.Annotations)
			},
		},
		"resource annotations": {
			pod: func(p *Pod) {
				p.Config.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 1, CpuQuota: -1, CpuShares: 3, MemoryLimitInBytes: 4}
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.Subset(t, s.Annotations, map[string]string{
					"io.kubernetes.cri.sandbox-cpu-period": "1",
					"io.kubernetes.cri.sandbox-cpu-quota":  "-1",
					"io.kubernetes.cri.sandbox-cpu-shares": "3",
					"io.kubernetes.cri.sandbox-memory":     "4",
				})
			},
		},
		"passed annotations": {
			pod: func(p *Pod) {
				p.PodAnnotations = []string{"[", "example.com/*", "exact"}
				p.Config.Annotations = map[string]string{"example.com/a": "1", "example.com/b/c": "2", "exact": "3", "exactly": "4"}
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, "1", s.Annotations["example.com/a"])
				require.Equal(t, "3", s.Annotations["exact"])
				require.NotContains(t, s.Annotations, "example.com/b/c")
				require.NotContains(t, s.Annotations, "exactly")
			},
		},
		"annotations that claim to be ours": {
			pod: func(p *Pod) {
				p.PodAnnotations = []string{"io.kubernetes.cri.*"}
				p.Config.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 4}
				p.Config.Annotations = map[string]string{
					"io.kubernetes.cri.container-type": "container",
					"io.kubernetes.cri.sandbox-id":     "another",
					"io.kubernetes.cri.sandbox-memory": "999",
				}
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, "sandbox", s.Annotations["io.kubernetes.cri.container-type"])
				require.Equal(t, "sandbox", s.Annotations["io.kubernetes.cri.sandbox-id"])
				require.Equal(t, "4", s.Annotations["io.kubernetes.cri.sandbox-memory"])
			},
		},
		"an annotation that names another pod's shim": {
			pod: func(p *Pod) {
				p.PodAnnotations = []string{"*"}
				p.Config.Annotations = map[string]string{"io.containerd.runc.v2.group": "another", "a": "1"}
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.NotContains(t, s.Annotations, "io.containerd.runc.v2.group")
				require.Equal(t, "1", s.Annotations["a"])
			},
		},
		"seccomp unset":       {},
		"seccomp by the node": {settings: func(s *Settings) { s.UnsetSeccompProfile = "runtime/default" }},
		"seccomp by the pod": {
			settings: func(s *Settings) { s.UnsetSeccompProfile = "unconfined" },
			pod: func(p *Pod) {
				security(p).Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
				security(p).SeccompProfilePath = "docker/default"
			},
		},
		"seccomp default": {
			pod: func(p *Pod) {
				security(p).Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
			},
		},
		"seccomp file, which pause doesn't read": {
			pod: func(p *Pod) {
				security(p).Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "localhost/absent"}
			},
		},
		"deprecated seccomp path":            {pod: func(p *Pod) { security(p).SeccompProfilePath = "docker/default" }},
		"deprecated seccomp path to a file":  {pod: func(p *Pod) { security(p).SeccompProfilePath = "localhost/absent" }},
		"deprecated seccomp path unconfined": {pod: func(p *Pod) { security(p).SeccompProfilePath = "unconfined" }},
		"seccomp of a privileged pod": {
			pod: func(p *Pod) {
				security(p).Privileged, security(p).SeccompProfilePath = true, "unconfined"
			},
		},
		"root by default": {
			check: func(t *testing.T, s *specs.Spec) { require.Equal(t, specs.User{}, s.Process.User) },
		},
		"image's user": {
			pod: func(p *Pod) { p.ImageConfig.User = "65535:65534" },
			check: func(t *testing.T, s *specs.Spec) {
				require.EqualValues(t, 65535, s.Process.User.UID)
				require.EqualValues(t, 65534, s.Process.User.GID)
			},
		},
		"pod's user, group and groups": {
			pod: func(p *Pod) {
				p.ImageConfig.User = "65535:65534"
				security(p).RunAsUser = &runtime.Int64Value{Value: 1000}
				security(p).RunAsGroup = &runtime.Int64Value{Value: 2000}
				security(p).SupplementalGroups = []int64{4000, 3000, 4000}
			},
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, specs.User{UID: 1000, GID: 2000, AdditionalGids: []uint32{2000, 3000, 4000}}, s.Process.User)
			},
		},
		"groups without a user": {
			pod: func(p *Pod) { security(p).SupplementalGroups = []int64{3000} },
			check: func(t *testing.T, s *specs.Spec) {
				require.Equal(t, []uint32{3000}, s.Process.User.AdditionalGids)
			},
		},
		"every message missing": {
			pod: func(p *Pod) { p.Config = nil },
			check: func(t *testing.T, s *specs.Spec) {
				require.NotNil(t, namespaceOf(s, specs.NetworkNamespace))
				require.Equal(t, "sandbox", s.Annotations["io.kubernetes.cri.sandbox-id"])
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			pod, settings := testPod(), testSettings()
			if tc.pod != nil {
				tc.pod(&pod)
			}
			if tc.settings != nil {
				tc.settings(&settings)
			}
			before := proto.Clone(pod.Config)

			spec, err := complete(t, settings, pod)
			require.NoError(t, err)
			require.NotEmpty(t, spec.Linux.Seccomp.Syscalls, "pause is under RuntimeDefault whatever the pod asks for")
			if tc.check != nil {
				tc.check(t, spec)
			}
			require.True(t, proto.Equal(before, pod.Config), "the pod's config is only read")
		})
	}
}

func TestSpecRefuses(t *testing.T) {
	security := func(pod *Pod) *runtime.LinuxSandboxSecurityContext { return pod.Config.Linux.SecurityContext }
	for name, tc := range map[string]struct {
		pod      func(*Pod)
		settings func(*Settings)
		text     string
	}{
		"hostile id":  {pod: func(p *Pod) { p.ID = "../x" }, text: "invalid sandbox id"},
		"empty image": {pod: func(p *Pod) { p.ImageConfig.Entrypoint = nil }, text: `"registry.example/pause:3.10.1" has neither entrypoint nor command`},
		"network namespace of another user namespace": {
			pod:  func(p *Pod) { p.UIDs, p.GIDs, p.NetNSPath = podUIDs, podGIDs, "/run/netns/mine" },
			text: `network namespace "/run/netns/mine" can't be used with a new user namespace`,
		},
		"group without user":     {pod: func(p *Pod) { security(p).RunAsGroup = &runtime.Int64Value{Value: 5} }, text: "group 5 can't be set without a user"},
		"negative user":          {pod: func(p *Pod) { security(p).RunAsUser = &runtime.Int64Value{Value: -1} }, text: "id -1 is out of the range"},
		"user that wraps to 0":   {pod: func(p *Pod) { security(p).RunAsUser = &runtime.Int64Value{Value: 1 << 32} }, text: "id 4294967296 is out of the range 0 to 2147483647"},
		"groups that wrap to 0":  {pod: func(p *Pod) { security(p).SupplementalGroups = []int64{5, 1 << 32} }, text: "id 4294967296 is out of the range"},
		"seccomp path":           {pod: func(p *Pod) { security(p).SeccompProfilePath = "/etc/shadow" }, text: `seccomp profile "/etc/shadow" is none of`},
		"seccomp of the node":    {settings: func(s *Settings) { s.UnsetSeccompProfile = "none" }, text: `seccomp profile "none" is none of`},
		"seccomp file untyped":   {pod: func(p *Pod) { security(p).Seccomp = &runtime.SecurityProfile{LocalhostRef: "x"} }, text: `RuntimeDefault takes no file, got "x"`},
		"seccomp type":           {pod: func(p *Pod) { security(p).Seccomp = &runtime.SecurityProfile{ProfileType: 42} }, text: "unknown seccomp profile type 42"},
		"selinux level":          {pod: func(p *Pod) { security(p).SelinuxOptions = &runtime.SELinuxOption{Level: "s0:c1,evil"} }, text: `SELinux level "s0:c1,evil"`},
		"selinux level newline":  {pod: func(p *Pod) { security(p).SelinuxOptions = &runtime.SELinuxOption{Level: "s0\n"} }, text: "SELinux level"},
		"selinux level category": {pod: func(p *Pod) { security(p).SelinuxOptions = &runtime.SELinuxOption{Level: "s0:c12345"} }, text: "SELinux level"},
	} {
		t.Run(name, func(t *testing.T) {
			pod, settings := testPod(), testSettings()
			if tc.pod != nil {
				tc.pod(&pod)
			}
			if tc.settings != nil {
				tc.settings(&settings)
			}
			_, err := complete(t, settings, pod)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.text)
			require.ErrorContains(t, err, "failed to build the pause spec of sandbox")
		})
	}
}

func TestSpecNeedsANamespace(t *testing.T) {
	_, err := testSettings().Spec(context.Background(), testPod())
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

// The sysctls of the pod are a map, which a shared spec could write through.
func TestSpecSharesNothingWithThePod(t *testing.T) {
	pod := testPod()
	pod.Config.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
	pod.UIDs, pod.GIDs = []specs.LinuxIDMapping{{Size: 1}}, []specs.LinuxIDMapping{{Size: 1}}
	pod.ImageConfig.Entrypoint = append(make([]string, 0, 8), "/pause")
	pod.ImageConfig.Cmd = []string{"-v"}
	before := proto.Clone(pod.Config)

	spec, err := complete(t, testSettings(), pod)
	require.NoError(t, err)
	spec.Linux.Sysctl["x"] = "y"
	spec.Annotations["x"] = "y"
	spec.Linux.UIDMappings[0].Size = 2
	spec.Process.Args[0] = "x"
	spec.Process.Env[0] = "x"

	require.True(t, proto.Equal(before, pod.Config))
	require.EqualValues(t, 1, pod.UIDs[0].Size)
	require.Equal(t, []string{"/pause"}, pod.ImageConfig.Entrypoint)
	require.Empty(t, pod.ImageConfig.Entrypoint[:2][1], "nor the space behind its slices")
	require.Equal(t, []string{"PATH=/bin"}, pod.ImageConfig.Env)
}

func TestRestrictedOOMScore(t *testing.T) {
	spec, err := complete(t, Settings{RestrictOOMScoreAdj: true}, testPod())
	require.NoError(t, err)
	text, err := os.ReadFile("/proc/self/oom_score_adj")
	require.NoError(t, err)
	own, err := strconv.Atoi(strings.TrimSpace(string(text)))
	require.NoError(t, err)
	require.Equal(t, max(own, -998), *spec.Process.OOMScoreAdj)
}

func TestCgroupPath(t *testing.T) {
	for parent, want := range map[string]string{
		"":                                     "/k8s.io/id",
		"/kubepods/burstable/pod-1":            "/kubepods/burstable/pod-1/id",
		"kubepods/":                            "kubepods/id",
		"/kubepods.slice/kubepods-pod1.slice":  "kubepods-pod1.slice:cri-containerd:id",
		"/kubepods.slice/kubepods-pod1.slice/": "kubepods-pod1.slice:cri-containerd:id",
		"/kubepods.slice/pod1":                 "/kubepods.slice/pod1/id",
	} {
		config := &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: parent}}
		require.Equal(t, want, CgroupPath(config, "k8s.io", "id"), parent)
	}
	require.Equal(t, "/k8s.io/id", CgroupPath(nil, "k8s.io", "id"))

	spec, err := oci.GenerateSpec(namespaces.WithNamespace(t.Context(), "k8s.io"), nil, &containers.Container{ID: "id"})
	require.NoError(t, err)
	require.Equal(t, spec.Linux.CgroupsPath, CgroupPath(nil, "k8s.io", "id"), "containerd's default")
}

func TestSELinuxOptions(t *testing.T) {
	for _, level := range []string{"", "s0", "s0-s1", "s0:c1", "s0:c1,c2", "s0-s0:c1.c1023,c7"} {
		options, err := selinuxOptions(&runtime.SELinuxOption{User: "u", Role: "r", Type: "t", Level: level})
		require.NoError(t, err, level)
		want := []string{"user:u", "role:r", "type:t"}
		if level != "" {
			want = append(want, "level:"+level)
		}
		require.Equal(t, want, options)
	}
	options, err := selinuxOptions(nil)
	require.NoError(t, err)
	require.Empty(t, options)
}

func TestCheckHostname(t *testing.T) {
	onNode := with(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_NODE })
	for _, tc := range []struct {
		name string
		pod  Pod
		text string
	}{
		{"", testPod(), ""},
		{strings.Repeat("w", 64), testPod(), ""},
		{strings.Repeat("w", 65), testPod(), "has 65 bytes; choose one of at most 64"},
		{strings.Repeat("ü", 33), testPod(), "has 66 bytes; choose one of at most 64"},
		{"", onNode, ""},
		{"web", onNode, `"web" would be the node's, whose network the pod shares`},
	} {
		tc.pod.Config.Hostname = tc.name
		err := CheckHostname(tc.pod.Config)
		if tc.text == "" {
			require.NoError(t, err, tc.name)
			continue
		}
		require.Truef(t, errdefs.IsInvalidArgument(err), "%q: %v", tc.name, err)
		require.ErrorContains(t, err, tc.text)
	}
}
