package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/internal/roottest"
)

// Main runs a package's tests from its TestMain and returns the exit code. It fails without root,
// and if a node of this process has left anything on the machine.
func Main(m *testing.M) int {
	return roottest.Main(func() int { return runAndSweep(m) }, os.Stderr)
}

func runAndSweep(m *testing.M) int {
	if err := Sweep(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "failed to remove the nodes of killed test runs:", err)
		return 1
	}
	code := m.Run()
	RemoveEmptyDirs()
	left, err := Leftovers()
	if err != nil || len(left) > 0 {
		fmt.Fprintf(os.Stderr, "nodes have left something on the machine: %v\n%s\n", err, strings.Join(left, "\n"))
		return 1
	}
	return code
}

// RemoveEmptyDirs removes empty directories that stock pods, and pods without a cgroup parent,
// share with those of other containerds: libcni's cache, and the cgroup named after containerd's
// namespace. A daemon makes them again when needed.
func RemoveEmptyDirs() {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + criNamespace) // a pattern that is well-formed
	dirs = append(dirs, "/sys/fs/cgroup/"+criNamespace, cniCacheDir, filepath.Dir(cniCacheDir))
	for _, dir := range dirs {
		_ = os.Remove(dir) // fails unless it is empty
	}
}

// StartNode makes a node for the test and closes it at the end. A failed test shows the end of the
// daemon's log. A data race or panic of the daemon fails the test. With PODFSM_KEEP in the
// environment, the node is kept.
func StartNode(t testing.TB, c Config) *Node {
	t.Helper()
	n, err := NewNode(t.Context(), c)
	require.NoError(t, err)
	t.Cleanup(func() {
		log := n.Log()
		if os.Getenv(keepEnv) != "" {
			n.keep(t)
		} else if err := n.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("failed to close the node: %v", err)
		}
		for _, bug := range []string{"WARNING: DATA RACE", "\npanic: ", "\nfatal error: "} {
			if _, after, found := strings.Cut(log, bug); found {
				t.Errorf("the daemon has a bug:%s%.4000s", bug, after)
			}
		}
		if t.Failed() {
			n.KeepLog(t, "containerd", log)
		}
	})
	return n
}

// KeepLog shows the end of a program's log if the test has failed, and writes the whole log into
// the build folder.
func (n *Node) KeepLog(t testing.TB, program, log string) {
	t.Helper()
	t.Logf("the end of the log of %s:\n%s", program, tail(log, 100))
	dir := filepath.Join(n.repo, ".build/failed")
	file := filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "_")+"."+program+".log")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(file, []byte(log), 0o644)); err != nil {
		t.Logf("failed to keep the log of %s: %v", program, err)
		return
	}
	t.Logf("all of it is in %s", file)
}

// RequireClean fails the test unless the node returns to the state before within a time limit.
func (n *Node) RequireClean(t testing.TB, before Census) {
	t.Helper()
	require.NoError(t, n.WaitClean(t.Context(), before))
}
