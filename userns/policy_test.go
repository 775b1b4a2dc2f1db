package userns

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestChoose(t *testing.T) {
	config := func(change func(*runtime.LinuxSandboxSecurityContext, *runtime.NamespaceOption)) *runtime.PodSandboxConfig {
		security := &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}}
		change(security, security.NamespaceOptions)
		return &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: security}}
	}
	type change = func(*runtime.LinuxSandboxSecurityContext, *runtime.NamespaceOption)
	for name, tc := range map[string]struct {
		change change
		asks   bool   // for a mapping of its own
		reason string // why it can't be mapped
	}{
		"nothing said": {change: func(*runtime.LinuxSandboxSecurityContext, *runtime.NamespaceOption) {}},
		"mode NODE": {change: func(_ *runtime.LinuxSandboxSecurityContext, o *runtime.NamespaceOption) {
			o.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
		}},
		"mode POD": {asks: true, change: func(s *runtime.LinuxSandboxSecurityContext, o *runtime.NamespaceOption) {
			s.Privileged = true
			o.UsernsOptions = podMode(extents(0, 131072, 65536), extents(0, 131072, 65536))
		}},
		"privileged": {reason: "it is privileged, which", change: func(s *runtime.LinuxSandboxSecurityContext, _ *runtime.NamespaceOption) { s.Privileged = true }},
		"everything of the node": {reason: "it is privileged and shares the node's network namespace and shares the node's pid namespace and shares the node's ipc namespace, which",
			change: func(s *runtime.LinuxSandboxSecurityContext, o *runtime.NamespaceOption) {
				s.Privileged, o.Network, o.Pid, o.Ipc = true, runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
			}},
	} {
		for _, mode := range []Mode{ModeKubelet, ModeAuto, ModeNode} {
			for _, unmappable := range []Unmappable{UnmappableRefuse, UnmappableHost} {
				t.Run(name+" "+string(mode)+" "+string(unmappable), func(t *testing.T) {
					got, err := Policy{Mode: mode, Unmappable: unmappable}.Choose(config(tc.change))
					if mode != ModeKubelet && tc.reason != "" && unmappable == UnmappableRefuse {
						require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
						require.ErrorContains(t, err, tc.reason)
						require.ErrorContains(t, err, `unmappable = "host"`)
						return
					}
					require.NoError(t, err)
					want := mode
					if tc.asks || tc.reason != "" {
						want = ModeKubelet
					}
					require.Equal(t, want, got)
				})
			}
		}
	}
	got, err := Policy{Mode: ModeAuto}.Choose(nil)
	require.NoError(t, err)
	require.Equal(t, ModeAuto, got)
}
