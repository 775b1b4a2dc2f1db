package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The benchmark runs on a small image and leaves nothing. Its page in the repository has the same
// methods and images.
func TestSmallImage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "image")
	img := image{name: "small", bytes: 4 << 20, inodes: 400, copied: 2, meta: 1}
	rows, err := measure(context.Background(), dir, img, 1)
	require.NoError(t, err)
	require.NoDirExists(t, dir)

	of := func(row int) cost { return rows[row].costs[0] }
	require.Less(t, of(rowIDMap).inodes, int64(10))
	for _, row := range []int{rowChown, rowChownMetacopy, rowMetacopy, rowMetacopy + 2} {
		require.GreaterOrEqual(t, of(row).inodes, int64(img.inodes), rows[row].name)
		require.Less(t, of(row).inodes, int64(img.inodes)+10, rows[row].name)
	}
	for _, row := range []int{rowChown, rowMetacopy + 2} {
		require.Greater(t, of(row).bytes, img.bytes, rows[row].name)
	}
	require.Less(t, of(rowMetacopy).bytes, img.bytes/2)
	require.Less(t, of(rowMetacopy+1).inodes, int64(10), "the second pod shares")

	written, err := os.ReadFile(filepath.Join("../..", pagePath))
	require.NoError(t, err)
	for _, row := range rows {
		require.Equal(t, len(published), strings.Count(string(written), "| "+row.name+" |"), "%s is stale: make bench-remap", pagePath)
	}
	for _, img := range published {
		require.Contains(t, string(written), "## "+img.name+": ")
	}
}
