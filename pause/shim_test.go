package pause

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBundles(t *testing.T) {
	bundles := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(bundles, "test", "s1"), 0o755))
	require.NoError(t, os.Mkdir(filepath.Join(bundles, "test", ".s5"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(bundles, "test", "file"), nil, 0o644))
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
