package integration

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// pages returns README.md and the pages of docs by their paths. TestIndex in docs requires that
// none is deeper.
func pages(t *testing.T) map[string]string {
	all := map[string]string{}
	for _, pattern := range []string{"../README.md", "../docs/*.md", "../docs/*/*.md"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			all[strings.TrimPrefix(file, "../")] = string(text)
		}
	}
	return all
}

// cli runs podfsm's command line tool against a node. The daemon may be down.
func cli(t *testing.T, n *harness.Node, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	args = append([]string{"--address", n.Socket(), "--root-dir", filepath.Join(n.Dir(), "root"), "--state-dir", filepath.Join(n.Dir(), "state")}, args...)
	cmd := osexec.CommandContext(t.Context(), n.CLI(), args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		require.ErrorAs(t, err, new(*osexec.ExitError))
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// leaks returns the leaks that podfsm leaks finds, with the outcome of a fix.
func leaks(t *testing.T, n *harness.Node, args ...string) (found []*podfsmv1.Leak, code int) {
	t.Helper()
	out, errOut, code := cli(t, n, append([]string{"leaks", "-o", "json"}, args...)...)
	var response podfsmv1.LeaksResponse
	require.NoError(t, protojson.Unmarshal([]byte(out), &response), errOut)
	return response.GetLeaks(), code
}

// planted is a leak that the test has made.
type planted struct{ kind, id string }

// kinds returns leaks without their names: the name of a shim is its pid, and a cgroup has one name
// per hierarchy.
func kinds(found []*podfsmv1.Leak) []planted {
	var all []planted
	for _, leak := range found {
		if p := (planted{leak.GetKind(), leak.GetSandboxId()}); !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	return all
}

func randomID(t *testing.T) string {
	t.Helper()
	id := make([]byte, 32)
	_, err := rand.Read(id)
	require.NoError(t, err)
	return hex.EncodeToString(id)
}

// leavePending leaves a pod whose cleanup is pending until the node is healed, and returns its id.
func leavePending(t *testing.T, n *harness.Node) (id string) {
	t.Helper()
	require.NoError(t, n.Fault("declare_ready.do.after", "1*error(not ready)"))
	require.NoError(t, n.Fault("attach_network.undo.before", "error(no luck)"))
	require.ErrorContains(t, failRun(t, n, harness.PodfsmHandler, n.PodConfig("pending")), "no luck")
	return inspect(t, n, "pending").GetSandbox().GetId()
}

// retryNow retries the pending cleanup of a rollback at once.
func retryNow(t *testing.T, n *harness.Node, id string) {
	t.Helper()
	_, err := n.Runtime.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: id})
	require.NoError(t, err)
}

// line is one line of the daemon's log in JSON.
type line map[string]any

// loud are those that are not for who looks for something.
func loud(lines []line) []line {
	return slices.DeleteFunc(slices.Clone(lines), func(l line) bool { return l["level"] == "debug" || l["level"] == "trace" })
}

// looked returns the output of podfsm inspect for a sandbox. The daemon may be down.
func looked(t *testing.T, n *harness.Node, ref string) *podfsmv1.InspectResponse {
	t.Helper()
	out, errOut, code := cli(t, n, "inspect", ref)
	require.Zero(t, code, errOut)
	response := &podfsmv1.InspectResponse{}
	require.NoError(t, protojson.Unmarshal([]byte(out), response))
	return response
}

// timelineOf returns the output of podfsm timeline for a sandbox.
func timelineOf(t *testing.T, n *harness.Node, args ...string) string {
	t.Helper()
	out, errOut, code := cli(t, n, append([]string{"timeline"}, args...)...)
	require.Zero(t, code, errOut)
	return out
}
