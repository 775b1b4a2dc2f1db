package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// prometheusAddress is where Prometheus serves, in the node's network namespace.
const prometheusAddress = "127.0.0.1:9090"

// TestPrometheus has a real Prometheus test the alerting rules, load them, scrape a node and fire an alert, and run every query of the
// dashboard. Only make long runs it, because Prometheus takes minutes to build.
func TestPrometheus(t *testing.T) {
	server, promtool, err := harness.BuildPrometheus(t.Context())
	require.NoError(t, err)
	deploy, err := filepath.Abs("../deploy")
	require.NoError(t, err)
	check := func(t *testing.T, args ...string) {
		t.Helper()
		out, err := osexec.CommandContext(t.Context(), promtool, args...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	t.Run("promtool accepts the rules", func(t *testing.T) {
		check(t, "check", "rules", "--lint=all", "--lint-fatal", filepath.Join(deploy, "alerts.yaml"))
	})
	t.Run("each alert fires when it should", func(t *testing.T) {
		check(t, "test", "rules", filepath.Join(deploy, "testdata", "alerts_test.yaml"))
	})

	n := harness.StartNode(t, harness.Config{
		Daemon: harness.TestDaemon, TOML: usernsTOML(`mode = "auto"`, "ranges = [{ host_id = 2100000768, size = 262144 }]"),
	})
	startPrometheus(t, n, server, filepath.Join(deploy, "alerts.yaml"))
	t.Run("an alert fires", func(t *testing.T) {
		require.Eventually(t, func() bool { return len(ask(t, n, "podfsm_build_info")) == 1 }, waitFor, tick)
		require.NoError(t, n.Fault("bridge.ADD", "error(injected)"))
		for _, name := range []string{"a", "b"} {
			failRun(t, n, harness.PodfsmHandler, n.PodConfig(name, harness.HostUsers()))
		}
		require.Eventually(t, func() bool {
			return slices.Equal([]string{"2"}, ask(t, n, `podfsm_failing_pods{step="attach_network"}`))
		}, waitFor, tick)
		require.Empty(t, ask(t, n, `ALERTS{alertname="PodfsmStepFails"}`), "two bad pods don't make a bad node")
		failRun(t, n, harness.PodfsmHandler, n.PodConfig("c", harness.HostUsers()))
		require.Eventually(t, func() bool {
			return len(ask(t, n, `ALERTS{alertname="PodfsmStepFails", alertstate="firing", step="attach_network", severity="warning"}`)) == 1
		}, waitFor, tick)
		require.NoError(t, n.Heal())
	})
	t.Run("every query of the dashboard has an answer", func(t *testing.T) {
		cli(t, n, "leaks")
		require.Eventually(t, func() bool { return len(ask(t, n, "podfsm_leaks")) == 1 }, waitFor, tick)
		for where, expression := range dashboardExpressions(t) {
			answer := ask(t, n, expression)
			if !strings.HasPrefix(where, `panel "Failed checks of podfsm doctor"`) { // this panel only shows failures
				require.NotEmpty(t, answer, where)
			}
		}
	})
}

// startPrometheus starts a Prometheus that scrapes the node, with the rules. Alerts are pending for
// a second instead of minutes.
func startPrometheus(t *testing.T, n *harness.Node, server, rules string) {
	t.Helper()
	dir := t.TempDir()
	text, err := os.ReadFile(rules)
	require.NoError(t, err)
	text = regexp.MustCompile(`(?m)^( +for:) .*$`).ReplaceAll(text, []byte("$1 1s"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "alerts.yaml"), text, 0o644))
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [alerts.yaml]
scrape_configs:
  - job_name: containerd
    metrics_path: /v1/metrics
    static_configs: [{targets: [%q]}]
`, harness.MetricsAddress)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o644))
	cmd := osexec.CommandContext(t.Context(), server, "--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+prometheusAddress)
	log, err := os.Create(filepath.Join(dir, "log"))
	require.NoError(t, err)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, n.Inside(cmd.Start))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("Prometheus: %s", text)
		}
		require.NoError(t, log.Close())
	})
	require.Eventually(t, func() bool {
		resp, err := n.HTTP().Get("http://" + prometheusAddress + "/-/ready")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}, waitFor, tick)
}

// ask returns the present values of an expression.
func ask(t *testing.T, n *harness.Node, expression string) (values []string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+prometheusAddress+"/api/v1/query?query="+url.QueryEscape(expression), nil)
	require.NoError(t, err)
	resp, err := n.HTTP().Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s: %s", expression, text)
	var answer struct {
		Data struct {
			Result []struct{ Value []any }
		}
	}
	require.NoError(t, json.Unmarshal(text, &answer), "%s", text)
	for _, sample := range answer.Data.Result {
		values = append(values, sample.Value[1].(string))
	}
	return values
}
