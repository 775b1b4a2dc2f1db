package pause

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestInitArguments(t *testing.T) {
	newTestbed(t)
	out, err := exec.Command(programs.init, "--version").CombinedOutput()
	require.NoError(t, err)
	require.Equal(t, "podfsm-init (devel) protocol "+protocol+"\n", string(out))
	for _, args := range [][]string{{}, {"0"}, {protocol, "x"}} {
		out, err := exec.Command(programs.init, args...).CombinedOutput()
		require.ErrorContains(t, err, "exit status 1")
		require.Contains(t, string(out), "only the daemon starts podfsm-init, and both must be of the same release")
	}
}

func TestLoadRefuses(t *testing.T) {
	newTestbed(t)
	p, err := NewProcesses(nil)
	require.NoError(t, err)
	for path, text := range map[string]string{
		filepath.Join(t.TempDir(), "absent"): "no such file",
		t.TempDir():                          "is a directory",
		"/bin/true":                          "podfsm-init reports the version",
		programs.prober:                      `podfsm-init reports the version "podfsm-init v9 protocol 99", but this release needs protocol ` + protocol,
		"/bin/false":                         "failed to get the version of podfsm-init: exit status 1",
	} {
		fds := countFDs(t)
		err := p.Load(path)
		require.True(t, errdefs.IsFailedPrecondition(err), err)
		require.ErrorContains(t, err, "install the podfsm-init of this release there, or set init_path")
		require.ErrorContains(t, err, text)
		require.Equal(t, fds, countFDs(t))
		_, err = p.Start(t.Context(), StartRequest{Key: "sandbox"})
		require.True(t, errdefs.IsFailedPrecondition(err), err)
		require.ErrorContains(t, err, "podfsm-init is not loaded")
	}
	require.NoError(t, p.Close())
}

func TestFindInit(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	_, err := FindInit()
	require.True(t, errdefs.IsNotFound(err), err)
	require.ErrorContains(t, err, "set init_path in podfsm's section of containerd's configuration")
	path := filepath.Join(dir, InitName)
	require.NoError(t, os.WriteFile(path, nil, 0o755))
	found, err := FindInit()
	require.NoError(t, err)
	require.Equal(t, path, found)
}
