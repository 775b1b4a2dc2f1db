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

// A node gets a build with one more step, then this build, which does not know the step, and then a
// build that has the step at another place of the creation path, with pods in every state each
// time. The cleanups that this build can't do stay pending, with an error that names the build that
// can. They complete as soon as a build with the step runs.
func TestUpgradeOfSteps(t *testing.T) {
	t.Parallel() // it mostly waits
	mark := &unknownStep{name: "mark_pod", after: "capture_netns", release: "added"}
	added, moved := withMark(t, "added", "captureNetNS"), withMark(t, "moved", "allocateIDs")
	u := startUpgrade(t, harness.TestDaemon)
	u.change("added", added)
	u.unknown = mark
	u.change("removed", harness.TestDaemon)
	u.requirePending()
	u.unknown = nil
	u.complete(moved)
	if full() {
		u.change("moved-back", added)
		u.change("moved", moved)
	}
	u.end(added)
}

// withMark is the test daemon with the step of testdata/upgrade, which takes one file and one line.
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

// text is the part of the error of a pending cleanup that names the other build.
func (s *unknownStep) text() string { return "install podfsm " + s.release + " again" }

// requirePending requires that each pending cleanup names the build that can complete it.
func (u *upgrade) requirePending() {
	list, err := u.n.Sandboxes().List(u.Context(), &podfsmv1.ListRequest{})
	require.NoError(u, err)
	pending := 0
	for _, s := range list.GetSandboxes() {
		if s.GetState() != "CleanupOwed" {
			continue
		}
		pending++
		require.Condition(u, func() bool {
			for _, cleanup := range s.GetPendingCleanups() {
				if cleanup.GetStep() == u.unknown.name && strings.Contains(cleanup.GetError(), u.unknown.text()) {
					return true
				}
			}
			return false
		}, "%s: %v", s.GetPodName(), s.GetPendingCleanups())
	}
	require.NotZero(u, pending)
}

// complete replaces the daemon by a build that can complete all pending cleanups.
func (u *upgrade) complete(by harness.Daemon) {
	require.NoError(u, u.n.Stop(u.Context()))
	require.NoError(u, u.n.Use(u.Context(), by))
	require.NoError(u, u.n.Start(u.Context()))
	maps.DeleteFunc(u.want, func(_, state string) bool { return strings.HasPrefix(state, "CleanupOwed") })
	maps.DeleteFunc(u.healed, func(_, state string) bool { return strings.HasPrefix(state, "CleanupOwed") })
	u.requireStates("once the step is known again")
	u.requireReadySame()
}
