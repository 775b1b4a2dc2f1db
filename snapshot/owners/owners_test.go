package owners

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// shiftDir shifts the tree in a directory.
func shiftDir(t testing.TB, dir string, m Map) (Stats, error) {
	t.Helper()
	root, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer root.Close()
	return Shift(context.Background(), root, m)
}

func TestUnmappedIDs(t *testing.T) {
	dir := t.TempDir()
	for name, uid := range map[string]int{"a": 0, "b\n": 70000, "c": 65536, "d": 1} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, nil, 0o644))
		require.NoError(t, os.Chown(path, uid, 0))
	}
	_, err := shiftDir(t, dir, podMap)
	require.EqualError(t, err, `failed to change the owners of files: uid 70000 of file "b\n" is not one of the ids that are mapped (0-65535), `+
		`and 1 other files have such ids: failed precondition`)
	require.True(t, errdefs.IsFailedPrecondition(err))
}
