package pause

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// startShim starts a process with a shim's arguments that listens on socket, and ignores SIGTERM when it is stubborn.
func startShim(t *testing.T, id, socket string, stubborn bool) *exec.Cmd {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	require.NoError(t, err)
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	file, err := listener.(*net.UnixListener).File()
	require.NoError(t, err)
	require.NoError(t, listener.Close())
	script := "read line"
	if stubborn {
		script = "trap '' TERM; read line"
	}
	cmd := exec.Command("sh", "-c", script, "shim", "-namespace", "test", "-id", id)
	cmd.ExtraFiles = []*os.File{file}
	_, err = cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	require.NoError(t, file.Close())
	return cmd
}

func TestEndShims(t *testing.T) {
	dir := t.TempDir()
	for name, stubborn := range map[string]bool{"willing": false, "stubborn": true} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(dir, name)
			mine, other := startShim(t, "s1", socket, stubborn), startShim(t, "s12", filepath.Join(dir, name+"-other"), false)
			reaped := make(chan error, 1)
			go func() { reaped <- mine.Wait() }()
			require.NoError(t, endShims(t.Context(), "test", "s1"))
			require.Error(t, <-reaped)
			require.NoFileExists(t, socket)
			left, err := shimsOf("test", "s12")
			require.NoError(t, err)
			require.Equal(t, []int{other.Process.Pid}, left)
			require.NoError(t, other.Process.Kill())
			require.Error(t, other.Wait())
			require.NoError(t, endShims(t.Context(), "test", "s1"), "there is none")
		})
	}
}

func TestShimsAreOfOneContainerd(t *testing.T) {
	bundles := t.TempDir()
	start := func(dir, id string) int {
		require.NoError(t, os.MkdirAll(dir, 0o755))
		cmd := exec.Command("sh", "-c", "read line", "shim", "-namespace", "test", "-id", id)
		cmd.Dir = dir
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		t.Cleanup(func() {
			in.Close()
			_ = cmd.Wait()
		})
		return cmd.Process.Pid
	}
	ours := start(filepath.Join(bundles, "test", "s1"), "s1")
	gone := start(filepath.Join(bundles, "test", "s2"), "s2")
	require.NoError(t, os.Remove(filepath.Join(bundles, "test", "s2")))
	start(t.TempDir(), "s3")
	start(filepath.Join(bundles, "another", "s4"), "s4")

	shims, err := Shims(bundles)
	require.NoError(t, err)
	require.ElementsMatch(t, []Shim{{Pid: ours, Namespace: "test", ID: "s1"}, {Pid: gone, Namespace: "test", ID: "s2"}}, shims)

	require.NoError(t, os.Mkdir(filepath.Join(bundles, "test", ".s5"), 0o755))
	found, err := Bundles(bundles, "test")
	require.NoError(t, err)
	require.Equal(t, []Bundle{
		{Path: filepath.Join(bundles, "test", ".s5"), ID: "s5"},
		{Path: filepath.Join(bundles, "test", "s1"), ID: "s1"},
	}, found)
	found, err = Bundles(bundles, "nobody")
	require.NoError(t, err)
	require.Empty(t, found)
}

// The process that starts a shim outlives the containerd that was killed. Its shim comes later, with the socket.
func TestEndShimsWaitsForOneThatIsBeingStarted(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	starter := exec.Command("sh", "-c", "read line", "shim", "-namespace", "test", "-id", "s2", "start")
	line, err := starter.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, starter.Start())
	ended := make(chan error, 1)
	go func() { ended <- endShims(t.Context(), "test", "s2") }()

	shim := startShim(t, "s2", socket, false)
	reaped := make(chan error, 1)
	go func() { reaped <- shim.Wait() }()
	_, err = line.Write([]byte("done\n"))
	require.NoError(t, err)
	require.NoError(t, starter.Wait(), "it was let finish")
	require.NoError(t, <-ended)
	require.Error(t, <-reaped)
	require.NoFileExists(t, socket)
}
