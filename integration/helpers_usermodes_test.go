package integration

import (
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// userMode is a way for pods to get their user namespace.
type userMode struct {
	name    string
	handler string
	option  harness.PodOption
	shared  bool // by all pods, by design
}

// hostUsers is the control for everything that a user namespace prevents: a pod without one.
var hostUsers = userMode{"host users", harness.PodfsmHandler, harness.HostUsers(), false}

// userModes are the modes with a user namespace.
var userModes = []userMode{
	{"kubelet", harness.PodfsmHandler, func(*runtime.PodSandboxConfig) {}, false},
	{"auto", autoHandler, harness.HostUsers(), false},
	{"node", nodeHandler, harness.HostUsers(), true},
}

// The handlers of podfsm that map pods without hostUsers: false.
const (
	autoHandler = "podfsm-auto"
	nodeHandler = "podfsm-node"
)

// poolStart is the first host id of the tests' pool. It is above all ranges of the kubelet's mode.
const poolStart = 3_000_000_000

// usersOf returns the configuration of the user namespaces of a handler.
func usersOf(handler, settings string) string {
	return fmt.Sprintf("[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.%s]\n%s\n", handler, settings)
}

// startNodeWithPool returns a node whose handlers have a pool of ranges, and its census without pods. One of its handlers is autoHandler.
func startNodeWithPool(t *testing.T, c harness.Config) (*harness.Node, harness.Census) {
	t.Helper()
	c.TOML += usersOf(autoHandler, `mode = "auto"`) +
		fmt.Sprintf("[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns_pool]\nranges = [{host_id = %d, size = 6553600}]\n", poolStart)
	n := harness.StartNode(t, c)
	first, err := n.RunPod(t.Context(), autoHandler, n.PodConfig("first", harness.HostUsers())) // makes the pool's own file
	require.NoError(t, err)
	require.NoError(t, first.StopAndRemove(t.Context()))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	return n, before
}

// startNodeWithModes returns a node with a handler for each of userModes.
func startNodeWithModes(t *testing.T) (*harness.Node, harness.Census) {
	t.Helper()
	return startNodeWithPool(t, modesConfig())
}

// modesConfig is the configuration with a handler for each of userModes, for startNodeWithPool.
func modesConfig() harness.Config {
	return harness.Config{Handlers: []string{autoHandler, nodeHandler}, TOML: usersOf(nodeHandler, `
		mode = "node"
		node_wide_uid_mapping = {container_id = 0, host_id = 2000000000, size = 65536}
		node_wide_gid_mapping = {container_id = 0, host_id = 2000000000, size = 65536}`)}
}

// requireOwner requires the owner of a file on the host.
func requireOwner(t *testing.T, path string, uid, gid uint32) {
	t.Helper()
	var stat unix.Stat_t
	require.NoError(t, unix.Lstat(path, &stat))
	require.Equal(t, []uint32{uid, gid}, []uint32{stat.Uid, stat.Gid}, path)
}

// mappingOf returns the host's user id for id 0 in the user namespace of a process, 0 in that of
// the node.
func mappingOf(t *testing.T, pid int) uint32 {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", pid))
	require.NoError(t, err)
	var container, host, length uint32
	_, err = fmt.Sscan(string(content), &container, &host, &length)
	require.NoError(t, err)
	require.Zero(t, container)
	return host
}
