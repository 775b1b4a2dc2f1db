package integration

import (
	"fmt"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/podfsm/podfsm/integration/harness"
)

// The pods of mode node share their users, and so the kernel keys of each user. Pause takes no key,
// a container one. When no key is left, the error and the doctor name the settings.
func TestKeysOfSharedUsersAreUsedUp(t *testing.T) {
	const user = 2_100_000_000 // no other test's
	n := harness.StartNode(t, harness.Config{Handlers: []string{nodeHandler}, TOML: usersOf(nodeHandler, fmt.Sprintf(`
		mode = "node"
		node_wide_uid_mapping = {container_id = 0, host_id = %[1]d, size = 65536}
		node_wide_gid_mapping = {container_id = 0, host_id = %[1]d, size = 65536}`, user))})
	free := useUpKeys(t, user)
	found := findingOf(t, examine(t, n), "keys", "")
	require.Equal(t, "warn", found.GetStatus(), "%v", found)
	require.Contains(t, found.GetEvidence(), fmt.Sprintf("user %d has ", user))
	require.Contains(t, found.GetRemedy(), "sysctl -w kernel.keys.maxkeys=")

	pod := startPod(t, n, nodeHandler, n.PodConfig("pod", harness.HostUsers()))
	container, err := pod.StartContainer(t.Context(), "main")
	require.Equal(t, codes.ResourceExhausted, status.Code(err), "%v", err)
	require.ErrorContains(t, err, "disk quota exceeded")
	require.ErrorContains(t, err, "raise kernel.keys.maxkeys and kernel.keys.maxbytes")
	require.NotNil(t, container, "it was created before")

	free()
	require.Eventually(t, func() bool { // the kernel collects keys later
		return !strings.Contains(findingOf(t, examine(t, n), "keys", "").GetEvidence(), fmt.Sprintf("user %d has ", user))
	}, waitFor, tick)
	startContainer(t, pod, "next")
}

// useUpKeys makes as many keys for a user of the host as the kernel allows, until free is called or
// the test ends.
func useUpKeys(t *testing.T, user int) (free func()) {
	t.Helper()
	made, stop, ended := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		goruntime.LockOSThread() // never unlocked: the thread ends with its user and its keys
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), uintptr(user), uintptr(user)); errno != 0 {
			made <- errno
			return
		}
		var err error
		for i := 0; err == nil; i++ {
			_, err = unix.AddKey("user", fmt.Sprint("key", i), []byte{1}, unix.KEY_SPEC_THREAD_KEYRING)
		}
		made <- err
		<-stop
	}()
	require.ErrorIs(t, <-made, unix.EDQUOT)
	free = sync.OnceFunc(func() {
		close(stop)
		<-ended
	})
	t.Cleanup(free)
	return free
}
