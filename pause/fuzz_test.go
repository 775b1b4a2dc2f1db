package pause

//lint:file-ignore SA1019 older clients name seccomp profiles by the old field

import (
	"encoding/json"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// FuzzSpec has the configuration of a pod, as it comes in by gRPC, and the configuration of the pause image. A specification keeps the
// pod from what it didn't ask for.
func FuzzSpec(f *testing.F) {
	pod := testPod()
	config, err := proto.Marshal(pod.Config)
	require.NoError(f, err)
	image, err := json.Marshal(pod.ImageConfig)
	require.NoError(f, err)
	f.Add(config, image)
	f.Add([]byte{}, []byte(`{"Cmd":["/pause"],"User":"0:0:0","WorkingDir":"relative","Env":["=","A"]}`))
	pod.Config.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{
		SelinuxOptions: &runtime.SELinuxOption{Level: "s0:c1.c2"}, SupplementalGroups: []int64{-1}, SeccompProfilePath: "localhost/../x",
	}
	pod.Config.Linux.Sysctls, pod.Config.Linux.CgroupParent = map[string]string{"": ""}, "../../a.slice"
	config, err = proto.Marshal(pod.Config)
	require.NoError(f, err)
	f.Add(config, image)
	ctx := namespaces.WithNamespace(f.Context(), "k8s.io")
	f.Fuzz(func(t *testing.T, config, image []byte) {
		pod := testPod()
		pod.Config, pod.ImageConfig, pod.UIDs, pod.GIDs = &runtime.PodSandboxConfig{}, imagespec.ImageConfig{}, podUIDs, podGIDs
		if proto.Unmarshal(config, pod.Config) != nil || json.Unmarshal(image, &pod.ImageConfig) != nil {
			return
		}
		spec, err := testSettings().Spec(ctx, pod)
		if err != nil {
			return
		}
		require.True(t, spec.OCI.Root.Readonly)
		require.Equal(t, podUIDs, spec.OCI.Linux.UIDMappings)
		require.Equal(t, podGIDs, spec.OCI.Linux.GIDMappings)
		require.Empty(t, spec.OCI.Process.Capabilities)
		require.NotEmpty(t, spec.OCI.Linux.Seccomp.Syscalls)
		for _, m := range spec.OCI.Mounts {
			if m.Type == "bind" {
				require.Contains(t, []string{hostShm, testSettings().Files.shm(pod.ID)}, m.Source)
			}
		}
		_ = pod.Config.String()
	})
}
