package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
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

func stepsOf(operation, outcome string, by float64, names ...string) map[string]float64 {
	values := map[string]float64{}
	for _, step := range names {
		values[fmt.Sprintf("podfsm_step_duration_seconds_count{operation=%q,outcome=%q,step=%q}", operation, outcome, step)] = by
	}
	return values
}

func together(all ...map[string]float64) map[string]float64 {
	sum := map[string]float64{}
	for _, m := range all {
		maps.Copy(sum, m)
	}
	return sum
}

func TestMetrics(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon, TOML: `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
  unclaimed_timeout = "1s"
` + usernsTOML(`mode = "auto"`, "ranges = [{ host_id = 2100000768, size = 262144 }]")})
	pod := func(name string) *harness.Pod {
		pod, err := n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig(name, harness.HostUsers()))
		require.NoError(t, err)
		return pod
	}
	plugins := func(command, outcome string, by float64, names ...string) map[string]float64 {
		values := map[string]float64{}
		for _, plugin := range names {
			values[fmt.Sprintf("podfsm_cni_command_duration_seconds_count{command=%q,network=%q,outcome=%q,plugin=%q}", command, n.Name(), outcome, plugin)] = by
		}
		return values
	}
	seen := scraped{} // in all scrapes
	look := func() scraped {
		now := scrape(t, n)
		maps.Copy(seen, now)
		return now
	}
	var pods []*harness.Pod

	t.Run("nothing yet", func(t *testing.T) {
		now := look()
		require.Empty(t, now.nonzero("sandboxes"))
		require.Empty(t, now.nonzero("step_"))
		require.Empty(t, now.nonzero("pending_"))
		require.Empty(t, now.nonzero("failing_"))
		require.Zero(t, now["podfsm_degraded"])
		require.Zero(t, now["podfsm_draining"])
		require.Len(t, now.nonzero("build_info"), 1)
		require.NotContains(t, now, "podfsm_leaks", "nobody has searched")
		// The first scrape after a restart has the present problems, and zeros without problems.
		require.Equal(t, 0.0, now[`podfsm_recovery_pending{outcome="pending_cleanup"}`])
		require.Contains(t, now, `podfsm_recovery_pending{outcome="unknown"}`)
		require.Contains(t, now, `podfsm_recovery_pending{outcome="waiting"}`)
		require.Contains(t, now, `podfsm_failing_pods{step="attach_network"}`)
		require.Contains(t, now, `podfsm_doctor_check_failed{check="kernel"}`)
		require.Contains(t, now, `podfsm_sandboxes{state="Ready"}`)
		require.Equal(t, map[string]float64{`podfsm_id_ranges{state="quarantined"}`: 4}, now.nonzero("id_ranges"))
		require.Positive(t, now[`podfsm_ledger_size_bytes{file="durable"}`])
	})

	t.Run("three pods", func(t *testing.T) {
		before := look()
		for _, name := range []string{"a", "b", "c"} {
			pods = append(pods, pod(name))
		}
		now := look()
		require.Equal(t, stepsOf("do", "ok", 3, steps...), now.increase(before, "step_"))
		require.Equal(t, plugins("ADD", "ok", 3, "bridge", "portmap"), now.increase(before, "cni_"))
		require.Equal(t, map[string]float64{`podfsm_sandbox_creation_duration_seconds_count{outcome="ok"}`: 3}, now.increase(before, "sandbox_creation_duration"))
		require.Equal(t, map[string]float64{`podfsm_sandboxes{state="Ready"}`: 3}, now.nonzero("sandboxes"))
		require.Equal(t, map[string]float64{`podfsm_id_ranges{state="held"}`: 3, `podfsm_id_ranges{state="free"}`: 1}, now.nonzero("id_ranges"))
		require.Equal(t, map[string]float64{`podfsm_remaps_total{strategy="idmap"}`: 3}, now.increase(before, "remaps_"))
		require.Empty(t, now.nonzero("pending_"))
		require.Empty(t, now.nonzero("unfinished"))
		// Begun, and the plans of ids and network, their results, and each plugin's begin and end.
		require.Positive(t, now[`podfsm_ledger_write_duration_seconds_count{file="durable",outcome="ok"}`])
		require.Positive(t, now[`podfsm_ledger_write_duration_seconds_count{file="log",outcome="ok"}`])
		require.Positive(t, now[`podfsm_ledger_size_bytes{file="log"}`])
	})

	t.Run("a pod that fails", func(t *testing.T) {
		before := look()
		require.NoError(t, n.Fault("bridge.ADD", "1*error(injected)"))
		err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("d", harness.HostUsers()))
		require.ErrorContains(t, err, "injected")
		require.NoError(t, n.Heal())
		now := look()
		require.Equal(t, together(
			stepsOf("do", "ok", 1, "allocate_ids", "remap_snapshot", "start_pause", "capture_netns"),
			stepsOf("do", "error", 1, "attach_network"),
			stepsOf("undo", "ok", 1, "allocate_ids", "remap_snapshot", "start_pause", "capture_netns", "attach_network"),
			map[string]float64{`podfsm_step_errors_total{error_type="other",operation="do",step="attach_network"}`: 1},
		), now.increase(before, "step_"))
		require.Equal(t, together(plugins("ADD", "error", 1, "bridge"), plugins("DEL", "ok", 1, "bridge")), now.increase(before, "cni_"))
		require.Equal(t, map[string]float64{`podfsm_sandbox_creation_duration_seconds_count{outcome="error"}`: 1}, now.increase(before, "sandbox_creation_duration"))
		require.Equal(t, map[string]float64{`podfsm_sandboxes{state="Ready"}`: 3}, now.nonzero("sandboxes"))
		require.Equal(t, map[string]float64{`podfsm_failing_pods{step="attach_network"}`: 1}, now.nonzero("failing_"))
	})

	t.Run("the retry of the pod", func(t *testing.T) {
		require.NoError(t, pod("d").StopAndRemove(t.Context()))
		require.Empty(t, look().nonzero("failing_"))
	})

	t.Run("drain and leaks", func(t *testing.T) {
		cli(t, n, "drain", "--config=/dev/null", "--wait=1ms")
		require.Equal(t, 1.0, look()["podfsm_draining"])
		cli(t, n, "drain", "--config=/dev/null", "--cancel")
		require.Zero(t, look()["podfsm_draining"])
		cli(t, n, "leaks")
		require.Contains(t, look(), "podfsm_leaks")
	})

	t.Run("a pending cleanup", func(t *testing.T) {
		require.NoError(t, n.Fault("attach_network.undo.before", "error(injected)"))
		require.Error(t, pods[0].Stop(t.Context()))
		var pending scraped
		owed := map[string]float64{`podfsm_sandboxes{state="Ready"}`: 2, `podfsm_sandboxes{state="CleanupOwed"}`: 1}
		require.Eventually(t, func() bool {
			pending = look()
			return maps.Equal(pending.nonzero("sandboxes"), owed)
		}, waitFor, tick, "between two automatic retries")
		require.Equal(t, map[string]float64{`podfsm_pending_cleanups{step="attach_network"}`: 1, `podfsm_pending_cleanups{step="capture_netns"}`: 1}, pending.nonzero("pending_cleanups"))
		require.Positive(t, pending[`podfsm_pending_cleanup_age_seconds{step="attach_network"}`])
		require.Positive(t, pending[`podfsm_step_errors_total{error_type="other",operation="undo",step="attach_network"}`])

		require.NoError(t, n.Heal())
		require.NoError(t, pods[0].StopAndRemove(t.Context()))
		now := look()
		require.Empty(t, now.nonzero("pending_"), "it is completed")
		require.Equal(t, plugins("DEL", "ok", 1, "bridge", "portmap"), now.increase(pending, "cni_"))
		require.Equal(t, map[string]float64{`podfsm_sandboxes{state="Ready"}`: 2}, now.nonzero("sandboxes"))
	})

	t.Run("a step that hangs, and retries", func(t *testing.T) {
		before := look()
		config := n.PodConfig("e", harness.HostUsers())
		leaveBehind(t.Context(), t, n, "bridge.ADD", config)
		_, err := runFor(t, n, harness.PodfsmHandler, impatient, config)
		require.Error(t, err)
		now := look()
		unfinished := now.nonzero("unfinished_step_age_seconds")
		require.Len(t, unfinished, 1)
		require.Greater(t, unfinished[`podfsm_unfinished_step_age_seconds{operation="do",step="attach_network"}`], .1)
		require.Equal(t, map[string]float64{joined: 1}, now.increase(before, "sandbox_creation_retries_", "unclaimed"))
		require.NoError(t, n.Faults.Release("bridge.ADD"))
		require.Eventually(t, func() bool {
			return look()[`podfsm_unclaimed_sandboxes_total`] == 1
		}, waitFor, tick, "nobody asks for it again")
		require.NoError(t, n.Heal())
		onlyReady := map[string]float64{`podfsm_sandboxes{state="Ready"}`: 2}
		require.Eventually(t, func() bool { return maps.Equal(look().nonzero("sandboxes"), onlyReady) }, waitFor, tick)
	})

	t.Run("restart", func(t *testing.T) {
		require.NoError(t, n.Fault("bridge.ADD", "1*block"))
		killed := make(chan error, 1)
		go func() {
			_, err := n.RunPod(context.WithoutCancel(t.Context()), harness.PodfsmHandler, n.PodConfig("f", harness.HostUsers()))
			killed <- err
		}()
		require.NoError(t, n.Faults.WaitReached(t.Context(), "bridge.ADD", 1))
		require.NoError(t, n.Kill(t.Context()))
		require.Error(t, <-killed)
		require.NoError(t, n.Heal())
		require.NoError(t, n.Start(t.Context()))
		require.Eventually(t, func() bool {
			return look()[`podfsm_recovery_duration_seconds_count{outcome="rolled_back"}`] == 1
		}, waitFor, tick)
		now := look()
		require.Equal(t, map[string]float64{
			`podfsm_recovery_duration_seconds_count{outcome="adopted"}`:     2,
			`podfsm_recovery_duration_seconds_count{outcome="rolled_back"}`: 1,
		}, now.nonzero("recovery_"))
		require.Equal(t, stepsOf("undo", "ok", 1, "allocate_ids", "remap_snapshot", "start_pause", "capture_netns", "attach_network"),
			now.nonzero("step_duration_seconds_count{operation=\"undo\""))
		require.Equal(t, map[string]float64{`podfsm_sandboxes{state="Ready"}`: 2}, now.nonzero("sandboxes"))
		for _, pod := range pods[1:] {
			require.NoError(t, pod.StopAndRemove(t.Context()))
		}
		require.Empty(t, look().nonzero("sandboxes"))
	})

	t.Run("nothing about single pods", func(t *testing.T) {
		for name := range seen {
			for _, pod := range pods {
				require.NotContains(t, name, pod.ID)
			}
			require.NotContains(t, name, "default/")
		}
	})

	t.Run("dashboard, alerts and docs", func(t *testing.T) { requireShown(t, seen) })
}

// targetLabels are the labels that Prometheus adds to everything that it scrapes, and the label of
// a federation.
var targetLabels = []string{"instance", "job", "cluster"}

// requireShown requires that a scrape has every metric and label of the dashboard and the alerts,
// and that Prometheus accepts their expressions.
func requireShown(t *testing.T, seen scraped) {
	t.Helper()
	known := seen.known()
	rules := filepath.Join("..", "deploy", "alerts.yaml")
	used := map[string]bool{}
	grouping := map[string][]string{}
	for _, e := range readPromQL(t, rules, dashboardExpressions(t)) {
		grouping[e.Where] = e.Grouping
		labels := map[string]bool{}
		for _, v := range e.Vectors {
			require.Contains(t, known, v.Metric, "%s: there is no such metric", e.Where)
			used[v.Metric] = true
			for label := range known[v.Metric] {
				labels[label] = true
			}
			for _, m := range v.Matchers {
				if slices.Contains(targetLabels, m.Label) {
					continue
				}
				require.Contains(t, known[v.Metric], m.Label, "%s: %s has no such label", e.Where, v.Metric)
				wanted := regexp.MustCompile("^(?:" + m.Value + ")$")
				if m.Op == "=" || m.Op == "!=" {
					wanted = regexp.MustCompile("^" + regexp.QuoteMeta(m.Value) + "$")
				}
				require.True(t, slices.ContainsFunc(slices.Collect(maps.Keys(known[v.Metric][m.Label])), wanted.MatchString),
					"%s: %s%s%q matches nothing that was seen", e.Where, m.Label, m.Op, m.Value)
			}
		}
		for _, label := range e.Grouping {
			require.True(t, labels[label] || slices.Contains(targetLabels, label), "%s: nothing in it has the label %q", e.Where, label)
		}
	}
	docs, err := os.ReadFile(filepath.Join("..", "docs", "reference", "metrics.md"))
	require.NoError(t, err)
	delete(known, processStart)
	for metric := range known {
		base := regexp.MustCompile(`_(count|sum|bucket)$`).ReplaceAllString(metric, "")
		require.Contains(t, string(docs), "`"+base+"`", "docs/reference/metrics.md says nothing of it")
		used[base] = used[base] || used[metric]
	}
	for metric := range known {
		base := regexp.MustCompile(`_(count|sum|bucket)$`).ReplaceAllString(metric, "")
		require.True(t, used[base], "neither dashboard nor alerts show %s", base)
	}
	requireLabels(t, rules, grouping)
}

// expression is the result of tools/modules/promql for an expression.
type expression struct {
	Where   string
	Vectors []struct {
		Metric   string
		Matchers []struct{ Label, Op, Value string }
	}
	Grouping []string
}

// readPromQL parses rules and expressions with the parser of Prometheus.
func readPromQL(t *testing.T, rules string, expressions map[string]string) (found []expression) {
	t.Helper()
	program, err := harness.BuildPromQL(t.Context())
	require.NoError(t, err)
	input, err := json.Marshal(expressions)
	require.NoError(t, err)
	cmd := osexec.CommandContext(t.Context(), program, rules)
	cmd.Stdin = strings.NewReader(string(input))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, stderr.String())
	require.NoError(t, json.Unmarshal(out, &found))
	require.Greater(t, len(found), len(expressions), "and the rules")
	return found
}

// dashboardExpressions returns the expressions of the dashboard's panels and variables, with
// Grafana's own variables filled in.
func dashboardExpressions(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "deploy", "dashboard.json"))
	require.NoError(t, err)
	var dashboard struct {
		Panels []struct {
			Title   string
			Type    string
			Targets []struct{ Expr, LegendFormat string }
		}
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
		Annotations struct {
			List []struct{ Name, Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(text, &dashboard))
	fill := strings.NewReplacer("$__rate_interval", "5m", "$cluster", ".*", "$instance", ".*", "$step", ".*")
	found := map[string]string{}
	for _, panel := range dashboard.Panels {
		for i, target := range panel.Targets {
			where := fmt.Sprintf("panel %q, %d", panel.Title, i)
			found[where] = fill.Replace(target.Expr)
			// The labels of a legend have to be those of the expression.
			for _, label := range regexp.MustCompile(`\{\{\s*(\w+)\s*\}\}`).FindAllStringSubmatch(target.LegendFormat, -1) {
				found[where+", legend "+label[1]] = fmt.Sprintf("sum by (%s) (%s)", label[1], found[where])
			}
		}
		require.True(t, panel.Type == "row" || len(panel.Targets) > 0, "panel %q shows nothing", panel.Title)
	}
	for _, variable := range dashboard.Templating.List {
		if variable.Type != "query" {
			continue
		}
		query := regexp.MustCompile(`^label_values\((.+),\s*(\w+)\)$`).FindStringSubmatch(variable.Definition)
		require.NotNil(t, query, "variable %q", variable.Name)
		found["variable "+variable.Name] = fmt.Sprintf("sum by (%s) (%s)", query[2], fill.Replace(query[1]))
	}
	for _, annotation := range dashboard.Annotations.List {
		found["annotation "+annotation.Name] = fill.Replace(annotation.Expr)
	}
	require.Greater(t, len(found), 10)
	return found
}

// requireLabels requires that every alert only uses labels that it has. TestRunbooks in docs checks
// its runbook_url.
func requireLabels(t *testing.T, rules string, grouping map[string][]string) {
	t.Helper()
	text, err := os.ReadFile(rules)
	require.NoError(t, err)
	alerts := regexp.MustCompile(`(?m)^ *- alert: (\w+)$`).FindAllStringSubmatch(string(text), -1)
	require.NotEmpty(t, alerts)
	parts := regexp.MustCompile(`(?m)^ *- alert: `).Split(string(text), -1)[1:]
	for i, alert := range alerts {
		for _, label := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(parts[i], -1) {
			require.Contains(t, append(targetLabels, grouping["alert "+alert[1]]...), label[1], "alert %s has no such label", alert[1])
		}
	}
}

// deploy/dashboard.json is the output of tools/modules/dashboard, which uses the types of Grafana.
func TestDashboard(t *testing.T) {
	program, err := harness.BuildDashboard(t.Context())
	require.NoError(t, err)
	want, err := osexec.CommandContext(t.Context(), program).Output()
	require.NoError(t, err)
	file := filepath.Join("..", "deploy", "dashboard.json")
	if *update {
		require.NoError(t, os.WriteFile(file, want, 0o644))
	}
	is, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), string(is), "go test ./integration -run TestDashboard -update writes it")
}
