package leaks

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/pause"
)

func TestThingsGoInOrder(t *testing.T) {
	first, second := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	things := []Thing{{NetNS, second, "n"}, {Record, first, "r"}, {Plugin, second, "2"}, {Cgroup, second, "b"}, {Cgroup, second, "a"}, {Lease, first, "l"}}
	Sort(things)
	require.Equal(t, []Thing{
		{Lease, first, "l"}, {Record, first, "r"},
		{Plugin, second, "2"}, {Cgroup, second, "a"}, {Cgroup, second, "b"}, {NetNS, second, "n"},
	}, things)
	require.Equal(t, []string{first, second}, IDs(things))
}

func TestOnlyIDsOfTheCRIAreLookedAt(t *testing.T) {
	id := strings.Repeat("0a", 32)
	require.Len(t, add(nil, Files, id, id), 1)
	for _, other := range []string{"", "web", id[1:], id + "0", strings.ToUpper(id), id[1:] + "\n", "../" + id[3:]} {
		require.Empty(t, add(nil, Files, other, other), "%q", other)
	}
}

func TestPinned(t *testing.T) {
	id := strings.Repeat("0a", 32)
	for _, name := range Pins(id) {
		got, ok := Pinned(name)
		require.True(t, ok, name)
		require.Equal(t, id, got)
	}
	require.Equal(t, []string{"podfsm-web"}, Pins("web"), "containerd's own names never have a sandbox's id")
	for _, name := range []string{"cni-67a5b3a1-2f5c-bd3b-8cf3-c4a1be66d5c1", "cni-web", "cni-", "web", id} {
		_, ok := Pinned(name)
		require.False(t, ok, name)
	}
}

// Without containerd's stores, an unmarked thing is a leak only if its sandbox also has a marked
// one.
func TestWithoutStores(t *testing.T) {
	dir := t.TempDir()
	h := Host{
		NetNSDirs: []string{filepath.Join(dir, "none"), filepath.Join(dir, "netns")},
		Files:     pause.Files{RootDir: filepath.Join(dir, "root"), StateDir: filepath.Join(dir, "state")},
		Bundles:   filepath.Join(dir, "bundles"),
		Namespace: "test",
	}
	things, err := h.WithoutStores(t.Context(), func(string) bool { return false })
	require.NoError(t, err)
	require.Empty(t, things)

	lost, known, stock := strings.Repeat("0a", 32), strings.Repeat("0b", 32), strings.Repeat("0c", 32)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "netns"), 0o755))
	for _, name := range []string{PinPrefix + lost, StockPinPrefix + lost, StockPinPrefix + known, stock} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "netns", name), nil, 0o444))
	}
	for _, id := range []string{lost, known, stock} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "root/sandboxes", id), 0o755))
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "bundles/test", id), 0o755))
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "bundles/another", id), 0o755))
	}
	require.NoError(t, os.Mkdir(filepath.Join(dir, "bundles/test", "."+lost), 0o755))
	shims := map[string]string{} // by sandbox
	for _, bundle := range []string{lost, known, stock, "." + lost} {
		shims[bundle] = shimIn(t, filepath.Join(dir, "bundles/test", bundle))
	}
	shimIn(t, filepath.Join(dir, "bundles/another", lost))
	things, err = h.WithoutStores(t.Context(), func(id string) bool { return id == known })
	require.NoError(t, err)
	lostShims := []string{shims[lost], shims["."+lost]}
	slices.Sort(lostShims)
	require.Equal(t, []Thing{
		{Shim, lost, lostShims[0]}, {Shim, lost, lostShims[1]},
		{Bundle, lost, filepath.Join(dir, "bundles/test", "."+lost)},
		{Bundle, lost, filepath.Join(dir, "bundles/test", lost)},
		{Files, lost, lost},
		{NetNS, lost, filepath.Join(dir, "netns", StockPinPrefix+lost)},
		{NetNS, lost, filepath.Join(dir, "netns", PinPrefix+lost)},
	}, things)
}

// shimIn starts a process that works in a bundle, as a shim does, and returns its pid.
func shimIn(t *testing.T, bundle string) string {
	shim := exec.Command("sleep", "300")
	shim.Dir = bundle
	require.NoError(t, shim.Start())
	t.Cleanup(func() {
		_ = shim.Process.Kill()
		_ = shim.Wait()
	})
	return strconv.Itoa(shim.Process.Pid)
}
