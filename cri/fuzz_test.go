package cri

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/userns"

	"github.com/podfsm/podfsm/ledger/records"
)

// FuzzRunRequest has a request as it comes in by gRPC. What is passed on differs from it by the network mode alone, and the request itself
// stays as it is.
func FuzzRunRequest(f *testing.F) {
	for _, request := range []*runtime.RunPodSandboxRequest{
		{},
		{RuntimeHandler: "podfsm", Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "web", Attempt: 1}}},
		{Config: &runtime.PodSandboxConfig{Labels: map[string]string{"a": "b"}, Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtime.NamespaceOption{Network: 99, UsernsOptions: &runtime.UserNamespace{Uids: []*runtime.IDMapping{{}}}},
		}}}},
	} {
		b, err := proto.Marshal(request)
		require.NoError(f, err)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		request, before := &runtime.RunPodSandboxRequest{}, &runtime.RunPodSandboxRequest{}
		if proto.Unmarshal(b, request) != nil || proto.Unmarshal(b, before) != nil {
			return
		}
		passed := onNodeNetwork(request)
		require.True(t, proto.Equal(before, request))
		require.True(t, records.OnNodeNetwork(passed.GetConfig()))
		require.True(t, sameShape(request, before))
		require.Equal(t, attemptOf(request.GetConfig()), attemptOf(passed.GetConfig()))
		asked := request.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork()
		ensure(&ensure(&ensure(&ensure(&before.Config).Linux).SecurityContext).NamespaceOptions)
		passed.Config.Linux.SecurityContext.NamespaceOptions.Network = asked
		require.True(t, proto.Equal(before, passed))
		_ = records.PodName(request.GetConfig())
		require.NotEmpty(t, Attributes(request.GetConfig(), request.GetRuntimeHandler()))
	})
}

// FuzzContainerRequest has a container of a pod that podfsm has mapped. What may be mapped is mapped as a whole.
func FuzzContainerRequest(f *testing.F) {
	for _, request := range []*runtime.CreateContainerRequest{
		{},
		{Config: &runtime.ContainerConfig{Mounts: []*runtime.Mount{{HostPath: "/a", ContainerPath: "/b"}, {Propagation: 2}}}},
		{Config: &runtime.ContainerConfig{Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{Privileged: true}}}},
	} {
		b, err := proto.Marshal(request)
		require.NoError(f, err)
		f.Add(b)
	}
	ids := userns.Mappings{UIDs: userns.Mapping{HostID: 131072, Length: 65536}, GIDs: userns.Mapping{HostID: 131072, Length: 65536}}
	users := ids.CRI()
	f.Fuzz(func(t *testing.T, b []byte) {
		request, before := &runtime.CreateContainerRequest{}, &runtime.CreateContainerRequest{}
		if proto.Unmarshal(b, request) != nil || proto.Unmarshal(b, before) != nil ||
			(userns.Container{Config: request.GetConfig(), Mapped: ids, Chosen: true}).Check() != nil {
			return
		}
		require.False(t, request.GetConfig().GetLinux().GetSecurityContext().GetPrivileged())
		mapped := inUserNS(request, users)
		require.True(t, proto.Equal(before, request))
		require.True(t, proto.Equal(users, mapped.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions))
		require.True(t, proto.Equal(users, mapped.SandboxConfig.Linux.SecurityContext.NamespaceOptions.UsernsOptions))
		for _, m := range mapped.Config.Mounts {
			require.NotEmpty(t, m.UidMappings)
			require.NotEmpty(t, m.GidMappings)
		}
	})
}

// FuzzRestoreInfo has the verbose status of a container, by containerd's service.
func FuzzRestoreInfo(f *testing.F) {
	f.Add(`{"config":{"linux":{"security_context":{"namespace_options":{"userns_options":{"mode":0}}}},"mounts":[{"uid_mappings":[{}]},null]},"pid":7}`)
	f.Add(`{"config":null}`)
	f.Add(`null`)
	f.Add(`{}`)
	f.Fuzz(func(t *testing.T, info string) {
		restored, err := restoreInfo(info, nil)
		if err != nil {
			return
		}
		var fields struct{ Config *runtime.ContainerConfig }
		require.NoError(t, json.Unmarshal([]byte(restored), &fields))
		require.Nil(t, fields.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
		for _, m := range fields.Config.GetMounts() {
			require.Empty(t, m.GetUidMappings())
		}
	})
}
