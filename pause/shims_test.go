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
