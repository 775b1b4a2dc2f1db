package pause

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	shims "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/require"
)

// A shim that containerd doesn't know is looked for once, at the start of a daemon: the end of a pod looks at no other process.
func TestStrayShims(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "test")
	dirs := ShimDirs{Root: t.TempDir(), State: t.TempDir()}
	manager, err := shims.NewShimManager(&shims.ManagerConfig{})
	require.NoError(t, err)
	runIn := func(name string) (ended chan struct{}) {
		bundle := filepath.Join(dirs.State, "test", name)
		require.NoError(t, os.MkdirAll(bundle, 0o700))
		cmd := exec.Command("sleep", "600")
		cmd.Dir = bundle
		require.NoError(t, cmd.Start())
		ended = make(chan struct{})
		go func() {
			defer close(ended)
			_ = cmd.Wait()
		}()
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			<-ended
		})
		return ended
	}
	isOver := func(ended chan struct{}) bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	}

	known, renamed, other := runIn("known"), runIn(".renamed"), runIn("other")
	s := NewShims(manager, dirs)
	require.NoError(t, s.FindStrays(ctx))
	late := runIn("late")
	for _, id := range []string{"known", "renamed", "late"} {
		require.NoError(t, s.End(ctx, id))
	}
	<-known
	<-renamed
	require.False(t, isOver(other), "of another sandbox")
	require.False(t, isOver(late), "nothing that this daemon has started is looked for")
	require.NoError(t, s.EndUnknown(ctx, "late"))
	<-late
	require.Empty(t, s.strays[stray{"test", "known"}])
	require.Len(t, s.strays, 1)
}

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
