package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/podfsm/podfsm/integration/harness"
)

// A volume whose filesystem can't be mapped is refused before anything of the container is made.
// containerd alone only fails at the start of the created container.
func TestUnmappableVolumes(t *testing.T) {
	n, _ := startNodeWithModes(t)
	ramfs := filepath.Join(n.Dir(), "ramfs")
	require.NoError(t, os.Mkdir(ramfs, 0o755))
	require.NoError(t, unix.Mount("ramfs", ramfs, "ramfs", 0, ""))
	require.NoError(t, os.WriteFile(filepath.Join(ramfs, "file"), nil, 0o644))
	link := filepath.Join(n.Dir(), "link")
	require.NoError(t, os.Symlink(ramfs, link))
	overlay := filepath.Join(n.Dir(), "overlay")
	require.NoError(t, os.Mkdir(overlay, 0o755))
	require.NoError(t, unix.Mount("overlay", overlay, "overlay", 0, "lowerdir="+filepath.Join(n.Dir(), "bin")+":"+filepath.Join(n.Dir(), "cni")))
	above := filepath.Join(n.Dir(), "above")
	below := filepath.Join(above, "data/below")
	require.NoError(t, os.MkdirAll(below, 0o755))
	require.NoError(t, unix.Mount("tmpfs", below, "tmpfs", 0, ""))
	before, err := n.Rest(t.Context())
	require.NoError(t, err)

	for _, mode := range userModes {
		remedy := "run the pod by a runtime handler that leaves it on the node's users"
		if mode.name == "kubelet" {
			remedy = "run the pod with hostUsers: true"
		}
		t.Run(mode.name, func(t *testing.T) {
			t.Run("pod", func(t *testing.T) {
				pod := startPod(t, n, mode.handler, n.PodConfig("pod", mode.option))
				with, err := n.Rest(t.Context())
				require.NoError(t, err)
				for _, tc := range []struct{ path, filesystem string }{
					{ramfs, "ramfs"},
					{filepath.Join(ramfs, "file"), "ramfs"},
					{filepath.Join(ramfs, "a/b"), "ramfs"}, // not there yet
					{link, "ramfs"},
					{overlay, "overlay"},
					{"/proc/sys", "proc"},
					{"/sys", "sysfs"},
				} {
					_, err := pod.StartContainer(t.Context(), "main", harness.Volume(tc.path, "/data"))
					require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
					for _, says := range []string{`"main"`, `"default/pod"`, `"/data"`, fmt.Sprintf("%q", tc.path), tc.filesystem, "put the volume on", remedy} {
						require.ErrorContains(t, err, says)
					}
					if tc.path == ramfs {
						require.Equal(t, fmt.Sprintf(`container "main" of pod "default/pod" can't have its volume "/data" from %q: this kernel can't map the ids of its filesystem, `+
							"ramfs: invalid argument; put the volume on a filesystem that can, such as ext4, xfs or btrfs, or %s", tc.path, remedy), status.Convert(err).Message())
					}
					require.NoFileExists(t, filepath.Join(ramfs, "a"))
					n.RequireClean(t, with)
				}
				for _, path := range []string{above, filepath.Dir(below)} {
					container, err := pod.StartContainer(t.Context(), filepath.Base(path), harness.Volume(path, "/data"))
					if mode.name == "kubelet" { // the pod has asked for it, and stock runs it
						require.NoError(t, err)
						require.Equal(t, "65534\n", exec(t, container, "stat", "-c", "%u", "/data"+strings.TrimPrefix(below, path)))
						continue
					}
					require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
					require.ErrorContains(t, err, fmt.Sprintf(`from %q: %q, of the filesystem tmpfs, is mounted below it, and the runtime maps no ids there; `+
						"give the container volumes that have no mount below them, or %s", path, below, remedy))
					n.RequireClean(t, with)
				}
				startContainer(t, pod, "main", harness.Volume(filepath.Join(n.Dir(), "bin"), "/data"), harness.Volume(below, "/below"))
			})
			n.RequireClean(t, before)
		})
	}

	t.Run("containerd alone", func(t *testing.T) {
		pod := startPod(t, n, harness.StockHandler, n.PodConfig("pod"))
		started, err := pod.StartContainer(t.Context(), "main", harness.Volume(ramfs, "/data"))
		require.Equal(t, codes.Unknown, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "MOUNT_ATTR_IDMAP")
		require.NotNil(t, started, "it was created before")
	})
	n.RequireClean(t, before)
}
