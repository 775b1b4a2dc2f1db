package pause

//lint:file-ignore SA1019 older clients name seccomp profiles by the old field

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
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
		for _, m := range spec.OCI.Mounts {
			if m.Type == "bind" {
				require.Contains(t, []string{"/sys", hostShm, testSettings().Files.shm(pod.ID), testSettings().Files.resolvConf(pod.ID)}, m.Source)
			}
		}
		_ = pod.Config.String()
	})
}

// FuzzParseShim has the arguments of a process, which anybody may have made up: what passes for a shim has named both, whole.
func FuzzParseShim(f *testing.F) {
	f.Add([]byte("/usr/bin/containerd-shim-runc-v2\x00-namespace\x00k8s.io\x00-id\x00s1\x00-address\x00/run/c.sock\x00start\x00"))
	f.Add([]byte("-id"))
	f.Add([]byte("-id\x00-namespace\x00-id"))
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, cmdline []byte) {
		shim, ok := parseShim(cmdline)
		if !ok {
			return
		}
		args := bytes.Split(cmdline, []byte{0})
		require.Contains(t, args, []byte(shim.Namespace))
		require.Contains(t, args, []byte(shim.ID))
	})
}

// FuzzSocketPaths has the table of unix sockets. Who binds one chooses its path, newlines included, and only those of the process's own
// inodes are taken for it.
func FuzzSocketPaths(f *testing.F) {
	const line = "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/containerd/s/abc\n"
	f.Add("Num RefCount Protocol Flags Type St Inode Path\n" + line)
	f.Add(strings.Replace(line, "4711", "4712", 1))
	f.Add(strings.Replace(line, "/run", "@/run", 1) + line)
	f.Add(strings.Replace(line, "/run", "/a b", 1))
	f.Fuzz(func(t *testing.T, table string) {
		for _, path := range socketPaths(strings.NewReader(table), map[string]bool{"4711": true}) {
			require.True(t, filepath.IsAbs(path))
			require.Contains(t, table, "4711")
			require.Contains(t, table, path)
		}
	})
}
