package integration

import (
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// A node gets a build with one more step, then this build, which doesn't know that step, and then one that has it at another place of the
// creation path, with pods in every state each time. What this build can't undo is owed, with a text that names the build that can. It is
// paid as soon as a build runs that knows the step.
func TestUpgradeOfSteps(t *testing.T) {
	t.Parallel() // it mostly waits
	mark := &unknownStep{name: "mark_pod", after: "capture_netns", release: "added"}
	added, moved := withMark(t, "added", "captureNetNS"), withMark(t, "moved", "allocateIDs")
	u := startUpgrade(t, harness.TestDaemon)
	u.change("added", added)
	u.unknown = mark
	u.change("removed", harness.TestDaemon)
	u.requireOwed()
	u.unknown = nil
	u.pay(moved)
	if full() {
		u.change("moved-back", added)
		u.change("moved", moved)
	}
	u.end(added)
}

// withMark is the test daemon with the step of testdata/upgrade, by one file and one line behind that of another step.
func withMark(t *testing.T, name, after string) harness.Daemon {
	t.Helper()
	step, err := os.ReadFile("testdata/upgrade/step_mark.go.txt")
	require.NoError(t, err)
	list, err := os.ReadFile("../plugin/steps.go")
	require.NoError(t, err)
	line := fmt.Sprintf("\t\t&%s{n},\n", after)
	require.Equal(t, 1, strings.Count(string(list), line), "plugin/steps.go has no line for %s any more, or several", after)
	return harness.Changed(name, map[string]string{
		"plugin/step_mark.go": string(step),
		"plugin/steps.go":     strings.Replace(string(list), line, line+"\t\t&markPod{n},\n", 1),
	})
}

// text is what the error of an undo says that only another build can do.
func (s *unknownStep) text() string { return "install podfsm " + s.release + " again" }

// requireOwed sees that each pending cleanup says which build can complete it.
func (u *upgrade) requireOwed() {
	list, err := u.n.Sandboxes().List(u.Context(), &podfsmv1.ListRequest{})
	require.NoError(u, err)
	owed := 0
	for _, s := range list.GetSandboxes() {
		if s.GetState() != "CleanupOwed" {
			continue
		}
		owed++
		require.Condition(u, func() bool {
			for _, debt := range s.GetDebts() {
				if debt.GetStep() == u.unknown.name && strings.Contains(debt.GetError(), u.unknown.text()) {
					return true
				}
			}
			return false
		}, "%s: %v", s.GetPodName(), s.GetDebts())
	}
	require.NotZero(u, owed)
}

// pay replaces the daemon by one that can complete all that is owed.
func (u *upgrade) pay(by harness.Daemon) {
	require.NoError(u, u.n.Stop(u.Context()))
	require.NoError(u, u.n.Use(u.Context(), by))
	require.NoError(u, u.n.Start(u.Context()))
	maps.DeleteFunc(u.want, func(_, state string) bool { return strings.HasPrefix(state, "CleanupOwed") })
	maps.DeleteFunc(u.healed, func(_, state string) bool { return strings.HasPrefix(state, "CleanupOwed") })
	u.requireStates("once the step is known again")
	u.requireReadySame()
}
