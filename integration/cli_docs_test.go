package integration

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// notRun are the commands in the docs that the test does not run, by their beginnings, with the
// reasons.
var notRun = map[string]string{
	"make demo": "it is a build and a node of its own, as the tests are",
	"make test": "it runs this test",

	"podfsm doctor --preflight": "the node has podfsm already; TestPreflight runs it",

	"podfsm drain":              "the node takes no pods afterwards; it has tests of its own",
	"mkdir /run/netns-aside":    "the node has no cover; TestRemedyKeepsWhatIsOnACover in netns does all five",
	"mount --move /run/netns":   "likewise",
	"umount /run/netns/podfsm-": "likewise",
	"rmdir /run/netns-aside":    "likewise",

	"podfsm watch": "it doesn't end by itself; TestCLI runs it",
}

// commands returns the commands in the shell blocks of a page: lines with a prompt in "console"
// blocks, all lines of "sh" blocks.
func commands(page string) (found []string) {
	for _, block := range regexp.MustCompile("(?ms)^```(sh|console)\n(.*?)^```").FindAllStringSubmatch(page, -1) {
		for line := range strings.Lines(block[2]) {
			if block[1] == "console" {
				after, prompt := strings.CutPrefix(line, "# ")
				if !prompt {
					continue // output
				}
				line = after
			}
			line, _, _ = strings.Cut(line, " #")
			if line = strings.TrimSpace(line); line != "" {
				found = append(found, line)
			}
		}
	}
	return found
}

// The commands in the docs run on a node with the pod that they name, except for those in notRun.
// podfsm knows its commands that are part of the text.
func TestCommandsInTheDocs(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	startPod(t, n, harness.PodfsmHandler, n.PodConfig("web"))
	inText := map[string]bool{}
	ran := 0
	for page, text := range pages(t) {
		for _, m := range regexp.MustCompile("`podfsm ([a-z]+)").FindAllStringSubmatch(text, -1) {
			inText[m[1]] = true
		}
		for _, command := range commands(text) {
			if slices.ContainsFunc(slices.Collect(maps.Keys(notRun)), func(begin string) bool { return strings.HasPrefix(command, begin) }) {
				continue
			}
			args, ours := strings.CutPrefix(command, "podfsm ")
			require.True(t, ours, "%s shows %q, which no test runs; run it, or list it with the reason", page, command)
			stdout, stderr, code := cli(t, n, strings.Fields(args)...)
			if strings.Fields(args)[0] == "doctor" {
				require.Contains(t, []int{0, 2}, code, "%s: %s", command, stderr) // 2 where the node lacks something
			} else {
				require.Zero(t, code, "%s: %s", command, stderr)
			}
			require.NotEmpty(t, stdout+stderr, command)
			ran++
		}
	}
	require.GreaterOrEqual(t, ran, 6)
	require.Contains(t, inText, "leaks")
	for command := range inText {
		stdout, stderr, code := cli(t, n, command, "--help")
		require.Zero(t, code, "podfsm %s: %s", command, stderr)
		require.Contains(t, stdout, "podfsm "+command)
	}
}

// The example of each mode, with the cgroup driver of the node, runs a pod as its first line says.
func TestExampleConfigurations(t *testing.T) {
	for _, tc := range []struct {
		mode    string
		hostUID uint32
	}{
		{"kubelet", 0}, {"auto", 1000000000}, {"node", 1000000000},
	} {
		t.Run(tc.mode, func(t *testing.T) {
			text, err := os.ReadFile("../docs/reference/config/" + tc.mode + ".toml")
			require.NoError(t, err)
			const driver = "SystemdCgroup = true"
			require.Contains(t, string(text), driver)
			config := strings.ReplaceAll(string(text), driver, fmt.Sprintf("SystemdCgroup = %t", harness.CgroupDriver() == "systemd"))
			n := harness.StartNode(t, harness.Config{TOML: config})
			pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("web", harness.HostUsers()))
			require.Equal(t, "0\n", exec(t, startContainer(t, pod, "main"), "id", "-u"))
			uids := inspect(t, n, pod.ID).GetSandbox().GetUserns().GetUids()
			if tc.hostUID == 0 {
				require.Empty(t, uids)
				return
			}
			require.GreaterOrEqual(t, uids[0].GetHostId(), tc.hostUID)
			require.EqualValues(t, 65536, uids[0].GetLength())
		})
	}
}
