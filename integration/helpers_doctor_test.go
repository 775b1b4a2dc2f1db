package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// examine runs podfsm doctor, and requires the exit status of its findings.
func examine(t *testing.T, n *harness.Node, flags ...string) []*podfsmv1.Finding {
	t.Helper()
	out, errOut, code := cli(t, n, append([]string{"doctor", "-o", "json"}, flags...)...)
	var response podfsmv1.DoctorResponse
	require.NoError(t, protojson.Unmarshal([]byte(out), &response), errOut)
	want := 0
	for _, f := range response.GetFindings() {
		if f.GetStatus() == "fail" {
			want = 2
		}
		require.Equal(t, f.GetStatus() == "ok", f.GetRemedy() == "", "%v", f)
		require.NotEmpty(t, f.GetEvidence(), "%v", f)
	}
	require.Equal(t, want, code, errOut)
	return response.GetFindings()
}

// findingOf returns the finding of a check, or of a part of the check unless part is "".
func findingOf(t *testing.T, findings []*podfsmv1.Finding, check, subject string) *podfsmv1.Finding {
	t.Helper()
	for _, f := range findings {
		if f.GetCheck() == check && (subject == "" || f.GetSubject() == subject) {
			return f
		}
	}
	require.Fail(t, "no such finding", "%s %s in %v", check, subject, findings)
	return nil
}

// away moves a file away.
func away(path string) func(*testing.T, *harness.Node) func() {
	return func(t *testing.T, n *harness.Node) func() {
		hidden := filepath.Join(n.Dir(), "hidden")
		require.NoError(t, os.Rename(filepath.Join(n.Dir(), path), hidden))
		return func() { require.NoError(t, os.Rename(hidden, filepath.Join(n.Dir(), path))) }
	}
}

// replaced replaces a file. REAL in the new content is the path of the original.
func replaced(path, content string, mode os.FileMode) func(*testing.T, *harness.Node) func() {
	return func(t *testing.T, n *harness.Node) func() {
		back := away(path)(t, n)
		file := filepath.Join(n.Dir(), path)
		require.NoError(t, os.WriteFile(file, []byte(strings.ReplaceAll(content, "REAL", filepath.Join(n.Dir(), "hidden"))), mode))
		return func() {
			require.NoError(t, os.Remove(file))
			back()
		}
	}
}

// covered mounts a filesystem on a directory.
func covered(path, filesystem, options string) func(*testing.T, *harness.Node) func() {
	return func(t *testing.T, n *harness.Node) func() {
		dir := filepath.Join(n.Dir(), path)
		require.NoError(t, unix.Mount(filesystem, dir, filesystem, 0, options))
		return func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) }
	}
}

// Wrappers of the real runtime with other answers about its features.
const (
	forgetsIDMap = `#!/bin/sh
if [ "$1" = features ]; then REAL features | sed 's/"idmap"/"else"/'; else exec REAL "$@"; fi
`
	knowsNoFeatures = `#!/bin/sh
if [ "$1" = features ]; then echo unknown command >&2; exit 1; else exec REAL "$@"; fi
`
)

// failedChecks returns the checks of the doctor that podfsm status shows as failed.
func failedChecks(t *testing.T, n *harness.Node) []string {
	t.Helper()
	nodeStatus, err := n.Sandboxes().Status(t.Context(), &podfsmv1.StatusRequest{})
	require.NoError(t, err)
	return nodeStatus.GetFailedChecks()
}
