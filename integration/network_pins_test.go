package integration

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/podfsm/podfsm/integration/harness"
)

func isPin(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.NSFS_MAGIC
}

// The pin of a pod is removed, as by "ip netns delete", or the directory of the pins is covered by
// a mount, as by "ip netns add" on a private mount. The pod continues to run, and CNI plugins get
// its namespace at DEL: otherwise the rules of masqueraded addresses would stay.
func TestPinsTakenAway(t *testing.T) {
	t.Parallel() // it mostly waits
	n := harness.StartNode(t, harness.Config{})
	private(t, filepath.Dir(filepath.Join(n.Dir(), netNSDir)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	deletePin := func(t *testing.T, pod *harness.Pod) {
		require.NoError(t, unix.Unmount(pinOf(n, pod), unix.MNT_DETACH))
		require.NoError(t, unix.Unlink(pinOf(n, pod)))
	}

	t.Run("noticed", func(t *testing.T) {
		pod := runPod(t, n, n.PodConfig("pod"))
		deletePin(t, pod)
		require.Eventually(t, func() bool { return isPin(pinOf(n, pod)) }, waitFor, tick)
		works(t, pod, "main")
		require.NoError(t, pod.StopAndRemove(t.Context()))
		n.RequireClean(t, before)
	})

	for _, tc := range []struct {
		name string
		take func(*testing.T, *harness.Pod)
	}{
		{"deleted", deletePin},
		{"unmounted", func(t *testing.T, pod *harness.Pod) {
			require.NoError(t, unix.Unmount(pinOf(n, pod), unix.MNT_DETACH))
		}},
		{"deleted while containerd is down", func(t *testing.T, pod *harness.Pod) {
			require.NoError(t, n.Kill(t.Context()))
			deletePin(t, pod)
			require.NoError(t, n.Start(t.Context()))
		}},
	} {
		t.Run("stopped when it is "+tc.name, func(t *testing.T) {
			pod := runPod(t, n, n.PodConfig("pod"))
			tc.take(t, pod)
			require.NoError(t, pod.StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}

	t.Run("another namespace is in its place", func(t *testing.T) {
		pod := runPod(t, n, n.PodConfig("pod"))
		ips := podIPs(t, pod)
		require.NoError(t, unix.Unmount(pinOf(n, pod), unix.MNT_DETACH))
		require.NoError(t, unix.Mount("/proc/self/ns/net", pinOf(n, pod), "", unix.MS_BIND, ""))
		err := pod.Stop(t.Context())
		require.Equal(t, codes.AlreadyExists, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "umount "+pinOf(n, pod))
		require.Equal(t, ips, reserved(t, n), "no plugin has looked into it")
		require.NoError(t, unix.Unmount(pinOf(n, pod), unix.MNT_DETACH))
		require.NoError(t, pod.StopAndRemove(t.Context()), "what the kubelet does next")
		n.RequireClean(t, before)
	})

	dir := filepath.Join(n.Dir(), netNSDir)
	for _, tc := range []struct {
		name  string
		cover func() error
	}{
		{"itself", func() error { return unix.Mount(dir, dir, "", unix.MS_BIND, "") }},
		{"itself, with the mounts in it", func() error { return unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, "") }},
		{"an empty filesystem of its own", func() error { return unix.Mount("cover", dir, "tmpfs", 0, "") }},
	} {
		t.Run("the directory is covered by "+tc.name, func(t *testing.T) {
			pod := runPod(t, n, n.PodConfig("pod"))
			require.NoError(t, tc.cover())
			covered := true
			uncover := func() {
				if covered {
					require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
				}
				covered = false
			}
			t.Cleanup(uncover)
			err := pod.Stop(t.Context())
			require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
			require.ErrorContains(t, err, "umount "+dir)
			census, err := n.Census(t.Context())
			require.NoError(t, err)
			require.Equal(t, before[harness.IPTables], census[harness.IPTables], "DEL had the namespace")
			require.Equal(t, before[harness.Links], census[harness.Links])

			uncover()
			require.NoError(t, pod.StopAndRemove(t.Context()), "what the kubelet does next")
			n.RequireClean(t, before)
		})
	}
}

// private makes a directory a private mount until the end of the test.
func private(t *testing.T, dir string) {
	t.Helper()
	require.NoError(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	require.NoError(t, unix.Mount("", dir, "", unix.MS_PRIVATE, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}
