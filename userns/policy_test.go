package userns

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestChoose(t *testing.T) {
	const node = runtime.NamespaceMode_NODE
	type (
		security = runtime.LinuxSandboxSecurityContext
		options  = runtime.NamespaceOption
	)
	id := func(n int64) *runtime.Int64Value { return &runtime.Int64Value{Value: n} }
	for name, tc := range map[string]struct {
		change  func(*security, *options)
		sysctls map[string]string
		asks    bool   // for a mapping of its own
		reason  string // why it can't be mapped
	}{
		"nothing said": {},
		"mode NODE":    {change: func(_ *security, o *options) { o.UsernsOptions = &runtime.UserNamespace{Mode: node} }},
		"mode POD": {asks: true, change: func(s *security, o *options) {
			s.Privileged = true
			o.UsernsOptions = podMode(extents(0, 131072, 65536), extents(0, 131072, 65536))
		}},
		"privileged": {reason: "it is privileged, which", change: func(s *security, _ *options) { s.Privileged = true }},
		"everything of the node": {reason: "it is privileged and shares the node's network namespace and shares the node's pid namespace and shares the node's ipc namespace, which",
			change: func(s *security, o *options) { s.Privileged, o.Network, o.Pid, o.Ipc = true, node, node, node }},
		"last ids": {change: func(s *security, _ *options) {
			s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = id(65535), id(65535), []int64{65535}
		}},
		"no ids":            {change: func(s *security, _ *options) { s.RunAsUser, s.SupplementalGroups = id(-1), []int64{-1} }},
		"user beyond":       {reason: "it runs as user 65536, beyond the 65536 ids of its user namespace, which", change: func(s *security, _ *options) { s.RunAsUser = id(65536) }},
		"group beyond":      {reason: "it runs as group 70000, beyond", change: func(s *security, _ *options) { s.RunAsUser, s.RunAsGroup = id(1), id(70000) }},
		"fsGroup beyond":    {reason: "it has the group 1000660000, beyond", change: func(s *security, _ *options) { s.SupplementalGroups = []int64{1, 1000660000} }},
		"id of no user":     {reason: "it runs as user 4294967296, beyond", change: func(s *security, _ *options) { s.RunAsUser = id(1 << 32) }},
		"sysctl of a pod":   {sysctls: map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}},
		"groups that may":   {sysctls: map[string]string{"net.ipv4.ping_group_range": "0 65535"}},
		"empty range":       {sysctls: map[string]string{"net.ipv4.ping_group_range": "1 0"}},
		"no groups":         {sysctls: map[string]string{"net.ipv4.ping_group_range": "all"}},
		"all groups may":    {sysctls: map[string]string{"net.ipv4.ping_group_range": "0 2147483647"}},
		"groups beyond":     {reason: `it has the sysctl net.ipv4.ping_group_range = "65536 2147483647", beyond`, sysctls: map[string]string{"net.ipv4.ping_group_range": "65536 2147483647"}},
		"with slashes":      {reason: `it has the sysctl net/ipv4/ping_group_range = "65536 65536", beyond`, sysctls: map[string]string{"net/ipv4/ping_group_range": "65536 65536"}},
		"routes of IPv6":    {sysctls: map[string]string{"net.ipv6.route.max_size": "4096"}},
		"sysctl that hides": {reason: "it has the sysctl net.ipv6.route.gc_thresh, reserved", sysctls: map[string]string{"net.ipv6.route.gc_thresh": "1"}},
		"sysctls that hide": {reason: "it has the sysctl net.core.xfrm_larval_drop, reserved to the node's users and has the sysctl net.ipv6.route.flush", sysctls: map[string]string{"net.ipv6.route.flush": "1", "net.core.xfrm_larval_drop": "1"}},
		"several at a time": {reason: "it shares the node's pid namespace and runs as user 70000, beyond the 65536 ids of its user namespace, which", change: func(s *security, o *options) { o.Pid, s.RunAsUser = node, id(70000) }},
	} {
		config := &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{Sysctls: tc.sysctls, SecurityContext: &security{
			NamespaceOptions: &options{Pid: runtime.NamespaceMode_CONTAINER},
		}}}
		if tc.change != nil {
			tc.change(config.Linux.SecurityContext, config.Linux.SecurityContext.NamespaceOptions)
		}
		for _, mode := range []Mode{ModeKubelet, ModeAuto, ModeNode} {
			for _, unmappable := range []Unmappable{UnmappableRefuse, UnmappableHost} {
				t.Run(name+" "+string(mode)+" "+string(unmappable), func(t *testing.T) {
					got, kept, err := Policy{Mode: mode, Unmappable: unmappable}.Choose(config)
					unfit := mode != ModeKubelet && tc.reason != ""
					if unfit && unmappable == UnmappableRefuse {
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
					require.Equal(t, unfit, kept != "", kept)
					if unfit {
						require.Contains(t, kept+", which", tc.reason)
					}
				})
			}
		}
	}
	got, kept, err := Policy{Mode: ModeAuto}.Choose(nil)
	require.NoError(t, err)
	require.Equal(t, ModeAuto, got)
	require.Empty(t, kept)
}

// The ids of a node-wide mapping are as many as the configuration gives.
func TestChooseByTheNodeWideMapping(t *testing.T) {
	of := func(length uint32) Mapping { return Mapping{HostID: 1 << 30, Length: length} }
	policy := Policy{Mode: ModeNode, NodeWide: &Mappings{UIDs: of(1000), GIDs: of(1000)}}
	config := &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
		RunAsUser: &runtime.Int64Value{Value: 1000},
	}}}
	_, _, err := policy.Choose(config)
	require.ErrorContains(t, err, "runs as user 1000, beyond the 1000 ids")
	policy.NodeWide = &Mappings{UIDs: of(1 << 20), GIDs: of(1 << 20)}
	config.Linux.SecurityContext.RunAsUser.Value = 1<<20 - 1
	mode, _, err := policy.Choose(config)
	require.NoError(t, err)
	require.Equal(t, ModeNode, mode)
}
