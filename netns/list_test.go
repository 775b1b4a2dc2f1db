package netns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

func TestPinsAndUsers(t *testing.T) {
	roottest.Require(t)
	path := pinPath(t)
	dir := filepath.Dir(path)
	pins, err := Pins(dir)
	require.NoError(t, err)
	require.Empty(t, pins, "there is no directory")

	p := startPod(t, unix.CLONE_NEWUSER|unix.CLONE_NEWNET)
	h, err := Capture(p.Process)
	require.NoError(t, err)
	defer h.Close()
	require.NoError(t, h.Pin(path))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "empty"), nil, 0o444))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "full"), []byte("x"), 0o444))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "directory"), 0o755))
	require.NoError(t, os.Symlink(path, filepath.Join(dir, "link")))
	pins, err = Pins(dir)
	require.NoError(t, err)
	require.Equal(t, []string{"empty", "pin"}, pins)

	users, err := Users(t.Context(), path)
	require.NoError(t, err)
	require.Contains(t, users, p.Pid())
	require.NotContains(t, users, os.Getpid())
	users, err = Users(t.Context(), filepath.Join(dir, "empty"))
	require.NoError(t, err)
	require.Empty(t, users)
}
