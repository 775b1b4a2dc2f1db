package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// hostNetworkUserNS makes a pod share the node's network, but not its users.
func hostNetworkUserNS(c *runtime.PodSandboxConfig) {
	nsOptions(c).Network = runtime.NamespaceMode_NODE
	c.Hostname = ""
}

// usernsTOML is podfsm's configuration of user namespaces for the handlers of the tests, and its
// pool.
func usernsTOML(handler, pool string) string {
	const section = `[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.`
	return section + "userns.podfsm]\n" + handler + "\n" + section + "userns_pool]\n" + pool + "\n"
}

// poolOf returns a pool of some ranges, far from those of other tests.
func poolOf(ranges int) string {
	return fmt.Sprintf("ranges = [{ host_id = 1000013824, size = %d }]", ranges*65536)
}

// requireRefused requires that a pod is refused with a code and an error that has each of the
// texts.
func requireRefused(t *testing.T, n *harness.Node, config *runtime.PodSandboxConfig, code codes.Code, texts ...string) {
	t.Helper()
	err := failRun(t, n, harness.PodfsmHandler, config)
	require.Equal(t, code, status.Code(err), "%v", err)
	for _, text := range texts {
		require.ErrorContains(t, err, text)
	}
}

// hostUID returns the first host uid of a sandbox, 0 for a sandbox in the host's user namespace.
func hostUID(t *testing.T, n *harness.Node, pod *harness.Pod) uint32 {
	t.Helper()
	uids := inspect(t, n, pod.ID).GetSandbox().GetUserns().GetUids()
	if len(uids) == 0 {
		return 0
	}
	pid, err := pod.Pid(t.Context())
	require.NoError(t, err)
	for _, file := range []string{"uid_map", "gid_map"} {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		require.NoError(t, err)
		require.Equal(t, []string{"0", fmt.Sprint(uids[0].GetHostId()), fmt.Sprint(uids[0].GetLength())}, strings.Fields(string(content)))
	}
	return uids[0].GetHostId()
}

// allowed are the capabilities and system calls of a fully privileged container.
func allowed(c *runtime.ContainerConfig) {
	c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"ALL"}}
	c.Linux.SecurityContext.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
	c.Linux.SecurityContext.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
}

// ownerOf returns the inode of the user namespace that owns the namespace at path (ioctl_ns(2)).
func ownerOf(t *testing.T, path string) uint64 {
	t.Helper()
	ns, err := os.Open(path)
	require.NoError(t, err)
	defer ns.Close()
	fd, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	require.NoError(t, err)
	defer unix.Close(fd)
	return inode(t, fmt.Sprintf("/proc/self/fd/%d", fd))
}

// remapped is a runtime handler with podfsm's snapshotter.
const remapped = "remapped"
