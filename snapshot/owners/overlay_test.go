package owners

import (
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/stretchr/testify/require"
)

// overlays are mounted until the test ends.
type overlays struct {
	dir string // of what they are made of
}

// mount mounts layers, the upper one first, until the test ends or before. What is written goes to the directory upper.
func (o overlays) mount(t testing.TB, layers []string, upper string, options ...string) (merged string, unmount func()) {
	t.Helper()
	work := o.newDir(t, "work")
	options = append(options, "lowerdir="+strings.Join(layers, ":"), "upperdir="+upper, "workdir="+work)
	merged = t.TempDir()
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
	require.NoError(t, m.Mount(merged))
	unmount = sync.OnceFunc(func() {
		require.NoError(t, mount.Unmount(merged, 0))
		// The names that an index gives to hard linked files count as links.
		require.NoError(t, os.RemoveAll(work))
	})
	t.Cleanup(unmount)
	return merged, unmount
}

func (o overlays) newDir(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp(o.dir, name)
	require.NoError(t, err)
	return dir
}
