package integration

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// notRun are the commands in the docs that the test does not run, by their beginnings, with the
// reasons and the tests that show them.
var notRun = map[string]string{
	"make demo": "it is a build and a node of its own, as the tests are",

	"dpkg-deb -x ":                        "the node has podfsm already; install.sh of the lab runs it",
	"unpacked/usr/bin/podfsm doctor":      "likewise",
	"apt install ":                        "likewise",
	"podfsm doctor --preflight":           "likewise, and TestPreflight",
	"systemctl restart containerd":        "the node has no systemd; install.sh of the lab runs it",
	"kubectl apply -f /usr/share/podfsm/": "the node has no API server; TestDeployedFilesFit in docs reads the file",
	"kubectl apply -f - <<END":            "the node has no API server; TestPodsInTheDocs in docs reads the pod",
	"kubectl delete pod web":              "the node has no API server; the scenario deploy of the lab runs it",
	"kill -9 $(pidof containerd-podfsm)":  "it kills the daemons of all tests; TestRestart kills its own",
	"podfsm cleanups write-off ":          "the pod has no pending cleanup; TestPendingCleanups writes some off",
	"helm ":                               "the node has no API server; TestCommandsOfChart and the scenario deploy of the lab",
	"kubectl --namespace kube-system ":    "likewise",
	"journalctl --unit podfsm-switch":     "the node has no systemd; TestCommandsOfChart",
	"mkdir /run/netns-aside":              "the node has no cover; TestRemedyKeepsWhatIsOnACover in netns does all five",
	"mount --move /run/netns":             "likewise",
	"umount /run/netns/podfsm-":           "likewise",
	"rmdir /run/netns-aside":              "likewise",
	"grep -n '^func Test' integration/":   "it only reads the source",
	"go test ":                            "it runs tests",
	"PODFSM_KEEP=1 go test ":              "it runs tests; TestKeep in harness keeps a node",
	"make node":                           "it is a node of its own; TestCommands in tools/node",
	"crictl run container.json pod.json":  "it belongs to that node; TestCommands in tools/node",
	"exit":                                "likewise",
	"echo 'crictl pods' | make node":      "likewise",
}

// commands returns the commands in the shell blocks of a page: lines with a prompt in "console"
// blocks, all lines of "sh" blocks except for here-documents.
func commands(page string) (found []string) {
	page = regexp.MustCompile(`(?ms)(<<END)$.*?^END$`).ReplaceAllString(page, "$1")
	for _, block := range regexp.MustCompile("(?ms)^ *```(sh|console)\n(.*?)^ *```").FindAllStringSubmatch(page, -1) {
		for line := range strings.Lines(block[2]) {
			if block[1] == "console" {
				prompted := regexp.MustCompile(`^ *[#$] (.*)`).FindStringSubmatch(line)
				if prompted == nil {
					continue // output
				}
				line = prompted[1]
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
	all := pages(t)
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	all["integration/README.md"] = string(readme)
	n := harness.StartNode(t, harness.Config{})
	startPod(t, n, harness.PodfsmHandler, n.PodConfig("web"))
	inText, unused := map[string]bool{}, maps.Clone(notRun)
	ran := 0
	for page, text := range all {
		for _, m := range regexp.MustCompile("`podfsm ([a-z]+)").FindAllStringSubmatch(text, -1) {
			inText[m[1]] = true
		}
		for _, command := range commands(text) {
			listed := false
			for begin := range notRun {
				if strings.HasPrefix(command, begin) {
					listed = true
					delete(unused, begin)
				}
			}
			if listed {
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
	require.Empty(t, unused, "no page shows these commands")
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
