// Package deploy has the tests of the files beside it.
package deploy

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write prometheus-rule.yaml anew")

// alerts are the alerts of alerts.yaml, by their names.
func alerts(t *testing.T) map[string]alert {
	t.Helper()
	text, err := os.ReadFile("alerts.yaml")
	require.NoError(t, err)
	var file struct {
		Groups []struct {
			Name  string
			Rules []alert
		}
	}
	require.NoError(t, yaml.UnmarshalStrict(text, &file))
	all := map[string]alert{}
	for _, group := range file.Groups {
		for _, a := range group.Rules {
			all[a.Alert] = a
		}
	}
	require.Greater(t, len(all), 10)
	return all
}

type alert struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

// Every alert says how bad it is, what it means and what to do.
func TestAlertsAreComplete(t *testing.T) {
	for name, a := range alerts(t) {
		require.Regexp(t, "^Podfsm[A-Z]", name)
		require.NotEmpty(t, a.For, name)
		require.Contains(t, []string{"info", "warning", "critical"}, a.Labels["severity"], name)
		require.NotEmpty(t, a.Annotations["summary"], name)
		require.NotEmpty(t, a.Annotations["description"], name)
		require.Equal(t, "https://github.com/podfsm/podfsm/blob/main/docs/runbooks/"+runbook(name), a.Annotations["runbook_url"], name)
	}
}

// Every alert has a runbook that names it.
func TestRunbooksOfAlerts(t *testing.T) {
	for name := range alerts(t) {
		text, err := os.ReadFile(filepath.Join("../docs/runbooks", runbook(name)))
		require.NoError(t, err)
		require.Contains(t, string(text), "`"+name+"`", runbook(name))
	}
}

// runbook is the file of an alert's runbook: PodfsmStepFails has step-fails.md.
func runbook(alert string) string {
	words := regexp.MustCompile(`[A-Z][a-z]+`).FindAllString(strings.TrimPrefix(alert, "Podfsm"), -1)
	return strings.ToLower(strings.Join(words, "-")) + ".md"
}

// Every alert is seen firing in the tests of the rules, which promtool runs.
func TestAlertsAreTested(t *testing.T) {
	text, err := os.ReadFile("testdata/alerts_test.yaml")
	require.NoError(t, err)
	for name := range alerts(t) {
		require.Regexp(t, fmt.Sprintf(`ALERTS\{alertname="%[1]s", alertstate="firing", .*\}'\n|alertname: %[1]s\n.*\n +exp_alerts:\n`, name), string(text), name)
	}
}

// The operator's object has the rules of alerts.yaml.
func TestPrometheusRule(t *testing.T) {
	rules, err := os.ReadFile("alerts.yaml")
	require.NoError(t, err)
	_, groups, _ := strings.Cut(string(rules), "groups:\n")
	want := `# Generated from alerts.yaml by go test ./deploy -update; do not edit. The rules for the Prometheus operator.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: podfsm
  namespace: monitoring
  labels:
    app.kubernetes.io/name: podfsm
spec:
  groups:
`
	for line := range strings.Lines(groups) {
		if strings.TrimSpace(line) != "" {
			line = "  " + line
		}
		want += line
	}
	if *update {
		require.NoError(t, os.WriteFile("prometheus-rule.yaml", []byte(want), 0o644))
	}
	is, err := os.ReadFile("prometheus-rule.yaml")
	require.NoError(t, err)
	require.Equal(t, want, string(is), "go test ./deploy -update writes it")
}

// node-problem-detector finds the plugin where the package puts it.
func TestNodeProblemDetectorFindsThePlugin(t *testing.T) {
	text, err := os.ReadFile("node-problem-detector/podfsm.json")
	require.NoError(t, err)
	var config struct {
		Plugin     string
		Conditions []struct{ Type, Reason, Message string }
		Rules      []struct{ Type, Condition, Reason, Path string }
	}
	require.NoError(t, json.Unmarshal(text, &config))
	require.Equal(t, "custom", config.Plugin)
	require.Equal(t, config.Conditions[0].Type, config.Rules[0].Condition)
	require.Equal(t, "permanent", config.Rules[0].Type)
	tree, err := os.ReadFile("package/tree")
	require.NoError(t, err)
	require.Contains(t, string(tree), strings.TrimPrefix(filepath.Dir(config.Rules[0].Path), "/")+` "$deploy/node-problem-detector/check-podfsm"`)
	info, err := os.Stat("node-problem-detector/check-podfsm")
	require.NoError(t, err)
	require.NotZero(t, info.Mode()&0o111)
}

// The plugin translates the exit status of podfsm doctor, and names the checks that fail.
func TestNodeProblemDetectorPlugin(t *testing.T) {
	findings, err := filepath.Abs("../cmd/podfsm/testdata/doctor.json")
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		doctor string
		code   int
		says   string
	}{
		"all is well":    {doctor: "exit 0", says: "no check of podfsm doctor fails\n"},
		"a check fails":  {doctor: "cat " + findings + "; exit 2", code: 1, says: "podfsm doctor: failed: runtime\n"},
		"nobody can say": {doctor: "echo 'podfsm: no luck' >&2; exit 1", code: 2, says: "podfsm doctor: podfsm: no luck\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(dir, "podfsm"), []byte("#!/bin/sh\n[ \"$*\" = 'doctor -o json' ] || exit 9\n"+tc.doctor+"\n"), 0o755))
			cmd := osexec.CommandContext(t.Context(), "node-problem-detector/check-podfsm")
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			out, err := cmd.Output()
			require.Equal(t, tc.code, cmd.ProcessState.ExitCode(), "%v", err)
			require.Equal(t, tc.says, string(out))
		})
	}
}

// docs/howto/install.md lists every file that is installed, by the Debian package and by all else, and the links of the installed README lead
// to installed files.
func TestInstalledFilesAreInThePage(t *testing.T) {
	dir := t.TempDir()
	script := `mkdir "$1/bin" "$1/tar"
touch "$1"/bin/{containerd-podfsm,podfsm,podfsm-init}
package/tree 1.2.3 0 "$1/bin" "$1/deb"
package/pack v1.2.3 0 amd64 "$1/bin" "$1/bin" "$1" tar
tar -C "$1/tar" -xzf "$1"/*.tar.gz
find "$1/deb" "$1/tar" -type f -printf '/%P\n'
`
	out, err := osexec.CommandContext(t.Context(), "bash", "-euc", script, "install", dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	page, err := os.ReadFile("../docs/howto/install.md")
	require.NoError(t, err)
	_, table, _ := strings.Cut(string(page), "## What is installed\n")
	there := map[string]bool{}
	for _, cell := range regexp.MustCompile(`(?m)^\| (.*?) \|`).FindAllString(table, -1) {
		for _, path := range regexp.MustCompile("`(/[^`]+)`").FindAllStringSubmatch(cell, -1) {
			there[path[1]] = false
		}
	}
	for _, file := range strings.Fields(string(out)) {
		found := false
		for path := range there {
			if file == path || strings.HasSuffix(path, "/") && strings.HasPrefix(file, path) {
				there[path], found = true, true
			}
		}
		require.True(t, found, "the page lacks %s", file)
	}
	for path, installed := range there {
		require.True(t, installed, "nothing installs %s", path)
	}
	readme, err := os.ReadFile(dir + "/tar/usr/share/doc/podfsm/README.md")
	require.NoError(t, err)
	for _, link := range regexp.MustCompile(`\]\(([^):#]+)[)#]`).FindAllStringSubmatch(string(readme), -1) {
		require.FileExists(t, dir+"/tar/usr/share/doc/podfsm/"+link[1])
	}
}
