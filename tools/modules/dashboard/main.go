// Command dashboard writes podfsm's dashboard for Grafana, deploy/dashboard.json, to stdout. It
// uses Grafana's own builders, so that Grafana can read the result. It is a separate module,
// because podfsm doesn't need Grafana.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

const (
	docs = "https://github.com/podfsm/podfsm/blob/main/docs/"
	// nodes are the labels by which the variables choose.
	nodes = `cluster=~"$cluster", instance=~"$instance"`
)

var source = common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr("${datasource}")}

func main() {
	built, err := overview().Build()
	if err != nil {
		fmt.Fprintln(os.Stderr, "dashboard:", err)
		os.Exit(1)
	}
	number(built.Panels)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	out.SetIndent("", "  ")
	if err := out.Encode(built); err != nil {
		fmt.Fprintln(os.Stderr, "dashboard:", err)
		os.Exit(1)
	}
}

// number sets the id of each panel, which links and alerts use.
func number(panels []dashboard.PanelOrRowPanel) {
	for i, p := range panels {
		id := uint32(i + 1)
		if p.Panel != nil {
			p.Panel.Id = &id
		} else {
			p.RowPanel.Id = id
		}
	}
}

// query is an expression with the legend of its series. The expression is a format string of Go for
// the labels of the chosen nodes.
type query struct{ expr, legend string }

func overview() *dashboard.DashboardBuilder {
	d := dashboard.NewDashboardBuilder("podfsm").
		Uid("podfsm").
		Description("Pod sandboxes of podfsm: steps, failures, pending cleanups, networks, ids, ledger.").
		Tags([]string{"kubernetes", "containerd"}).
		Refresh("30s").
		Time("now-6h", "now").
		Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Link(link("Metrics", "reference/metrics.md")).
		Link(link("A pod doesn't start", "howto/debug-a-pod.md")).
		WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Data source").Type("prometheus")).
		WithVariable(variable("cluster", "Cluster", "label_values(podfsm_build_info, cluster)")).
		WithVariable(variable("instance", "Node", `label_values(podfsm_build_info{cluster=~"$cluster"}, instance)`)).
		WithVariable(variable("step", "Step", `label_values(podfsm_step_duration_seconds_count{`+nodes+`}, step)`)).
		Annotation(restarts())

	addState(d)
	addPods(d)
	addSteps(d)
	addNetworks(d)
	addCleanups(d)
	addIDs(d)
	addLedger(d)
	return d
}

func addState(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("State")).
		WithPanel(count("Degraded nodes", "degraded", "red", "sum(podfsm_degraded{%s})")).
		WithPanel(count("Draining nodes", "draining", "blue", "sum(podfsm_draining{%s})")).
		WithPanel(count("Failing pods", "step-fails", "orange", "sum(podfsm_failing_pods{%s})")).
		WithPanel(count("Failed checks", "doctor-check-fails", "orange", "sum(podfsm_doctor_check_failed{%s})")).
		WithPanel(count("Pending cleanups", "pending-cleanup", "orange", "sum(podfsm_pending_cleanups{%s})")).
		WithPanel(count("Quarantined", "quarantined", "red", `sum(podfsm_sandboxes{%s, state="Quarantined"})`)).
		WithPanel(count("Not recovered", "recovery-fails", "orange", "sum(podfsm_recovery_pending{%s})")).
		WithPanel(count("Leaks", "leaks", "orange", "sum(podfsm_leaks{%s})"))
}

func addPods(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("Pods")).
		WithPanel(graph("Sandboxes by state", units.Short, query{"sum by (state) (podfsm_sandboxes{%s})", "{{state}}"}).Stacking(stacked())).
		WithPanel(quantiles("Creation of a sandbox", "steps-are-slow", "podfsm_sandbox_creation_duration_seconds", `, outcome="ok"`)).
		WithPanel(runbook(graph("Creations", units.OpsPerSecond,
			query{"sum by (outcome) (rate(podfsm_sandbox_creation_duration_seconds_count{%s}[$__rate_interval]))", "{{outcome}}"},
			query{"sum by (outcome) (rate(podfsm_sandbox_creation_retries_total{%s}[$__rate_interval]))", "retry: {{outcome}}"},
			query{"sum(rate(podfsm_unclaimed_sandboxes_total{%s}[$__rate_interval]))", "unclaimed"}), "step-fails")).
		WithPanel(runbook(graph("Share of creations that fail", units.PercentUnit, query{
			`sum(rate(podfsm_sandbox_creation_duration_seconds_count{%[1]s, outcome="error"}[$__rate_interval]))` +
				` / sum(rate(podfsm_sandbox_creation_duration_seconds_count{%[1]s}[$__rate_interval]))`, "failed"}).Max(1), "step-fails")).
		WithPanel(runbook(graph("Failing pods by step", units.Short, query{"sum by (step) (podfsm_failing_pods{%s})", "{{step}}"}), "step-fails")).
		WithPanel(graph("Releases", units.Short,
			query{"count by (version, revision, containerd_version, go_version) (podfsm_build_info{%s})",
				"podfsm {{version}} ({{revision}}), containerd {{containerd_version}}, {{go_version}}"}))
}

func addSteps(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("Steps")).
		WithPanel(heatmapOfSteps()).
		WithPanel(quantiles("Steps: $step", "steps-are-slow", "podfsm_step_duration_seconds", `, operation="do", outcome="ok", step=~"$step"`)).
		WithPanel(runbook(graph("p95 by step", units.Seconds, query{
			`histogram_quantile(0.95, sum by (step, le) (rate(podfsm_step_duration_seconds_bucket{%s, operation="do", outcome="ok"}[$__rate_interval])))`,
			"{{step}}"}), "steps-are-slow")).
		WithPanel(runbook(graph("p95 of undos by step", units.Seconds, query{
			`histogram_quantile(0.95, sum by (step, le) (rate(podfsm_step_duration_seconds_bucket{%s, operation=~"undo|stop"}[$__rate_interval])))`,
			"{{step}}"}), "steps-are-slow")).
		WithPanel(runbook(graph("Failed tries", units.OpsPerSecond, query{
			"sum by (step, operation, error_type) (rate(podfsm_step_errors_total{%s}[$__rate_interval]))", "{{operation}} {{step}}: {{error_type}}"}), "step-fails")).
		WithPanel(runbook(graph("Oldest unfinished step", units.Seconds, query{
			"max by (step, operation) (podfsm_unfinished_step_age_seconds{%s})", "{{operation}} {{step}}"}), "step-hangs"))
}

func addNetworks(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("Networks")).
		WithPanel(quantiles("CNI plugins, ADD", "plugin-fails", "podfsm_cni_command_duration_seconds", `, command="ADD"`)).
		WithPanel(runbook(graph("CNI plugins, p95", units.Seconds, query{
			"histogram_quantile(0.95, sum by (command, plugin, le) (rate(podfsm_cni_command_duration_seconds_bucket{%s}[$__rate_interval])))",
			"{{command}} {{plugin}}"}), "plugin-fails")).
		WithPanel(runbook(graph("CNI plugins, failures", units.OpsPerSecond, query{
			`sum by (command, plugin, network) (rate(podfsm_cni_command_duration_seconds_count{%s, outcome="error"}[$__rate_interval]))`,
			"{{command}} {{plugin}} ({{network}})"}), "plugin-fails"))
}

func addCleanups(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("Cleanups and recovery")).
		WithPanel(runbook(graph("Pending cleanups", units.Short, query{"sum by (step) (podfsm_pending_cleanups{%s})", "{{step}}"}), "pending-cleanup")).
		WithPanel(runbook(graph("Oldest pending cleanup", units.Seconds, query{
			"max by (step) (podfsm_pending_cleanup_age_seconds{%s})", "{{step}}"}), "pending-cleanup")).
		WithPanel(runbook(graph("Written off", units.Short, query{
			"sum by (step, by) (increase(podfsm_cleanups_written_off_total{%s}[$__rate_interval]))", "{{step}}, by {{by}}"}), "cleanup-written-off")).
		WithPanel(runbook(graph("Recovered sandboxes", units.Short, query{
			"sum by (outcome) (increase(podfsm_recovery_duration_seconds_count{%s}[$__rate_interval]))", "{{outcome}}"}), "recovery-fails")).
		WithPanel(runbook(graph("Sandboxes not recovered", units.Short, query{
			"sum by (outcome) (podfsm_recovery_pending{%s})", "{{outcome}}"}), "recovery-fails")).
		WithPanel(quantiles("Recovery of a sandbox", "recovery-fails", "podfsm_recovery_duration_seconds", ""))
}

func addIDs(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("Ids and root filesystems")).
		WithPanel(runbook(graph("Pool of host ids", units.Short, query{"sum by (state) (podfsm_id_ranges{%s})", "{{state}}"}).Stacking(stacked()), "pool-runs-out")).
		WithPanel(graph("Root filesystems by strategy", units.OpsPerSecond, query{
			"sum by (strategy) (rate(podfsm_remaps_total{%s}[$__rate_interval]))", "{{strategy}}"})).
		WithPanel(graph("Layers with remapped owners", units.OpsPerSecond, query{
			"sum by (strategy) (rate(podfsm_remap_layers_total{%s}[$__rate_interval]))", "{{strategy}}"})).
		WithPanel(graph("Remapped inodes", units.OpsPerSecond, query{
			"sum by (strategy) (rate(podfsm_remap_inodes_total{%s}[$__rate_interval]))", "{{strategy}}"})).
		WithPanel(graph("Remapped files", units.BytesPerSecondIEC, query{
			"sum by (strategy) (rate(podfsm_remap_bytes_total{%s}[$__rate_interval]))", "{{strategy}}"})).
		WithPanel(graph("Time spent on remaps", units.PercentUnit, query{
			"sum by (strategy) (rate(podfsm_remap_seconds_total{%s}[$__rate_interval]))", "{{strategy}}"}))
}

func addLedger(d *dashboard.DashboardBuilder) {
	d.WithRow(dashboard.NewRowBuilder("Ledger and node")).
		WithPanel(quantiles("Durable writes", "ledger-is-slow", "podfsm_ledger_write_duration_seconds", `, file="durable"`)).
		WithPanel(quantiles("Writes to the log", "ledger-is-slow", "podfsm_ledger_write_duration_seconds", `, file="log"`)).
		WithPanel(runbook(graph("Failed writes", units.OpsPerSecond, query{
			`sum by (file) (rate(podfsm_ledger_write_duration_seconds_count{%s, outcome="error"}[$__rate_interval]))`, "{{file}}"}), "ledger-fails")).
		WithPanel(graph("Size of the ledger", units.BytesIEC, query{"sum by (file) (podfsm_ledger_size_bytes{%s})", "{{file}}"})).
		WithPanel(runbook(graph("Failed checks of podfsm doctor", units.Short, query{
			"sum by (check) (podfsm_doctor_check_failed{%s}) > 0", "{{check}}"}), "doctor-check-fails"))
}

func link(title, page string) *dashboard.DashboardLinkBuilder {
	return dashboard.NewDashboardLinkBuilder(title).Type(dashboard.DashboardLinkTypeLink).Icon("doc").Url(docs + page).TargetBlank(true)
}

// variable returns a variable that chooses among the values of a label, at first all of them. If
// the cluster lacks the label, its value is "", which .* matches.
func variable(name, label, values string) *dashboard.QueryVariableBuilder {
	return dashboard.NewQueryVariableBuilder(name).Label(label).Datasource(source).
		Query(dashboard.StringOrMap{String: &values}).Definition(values).
		Refresh(dashboard.VariableRefreshOnTimeRangeChanged).Sort(dashboard.VariableSortNaturalAsc).
		Multi(true).IncludeAll(true).AllValue(".*").
		Current(dashboard.VariableOption{
			Text: dashboard.StringOrArrayOfString{ArrayOfString: []string{"All"}}, Value: dashboard.StringOrArrayOfString{ArrayOfString: []string{"$__all"}},
		})
}

// restarts annotates the starts of containerd: gauges and counters restart there, and sandboxes are
// recovered.
func restarts() *dashboard.AnnotationQueryBuilder {
	return dashboard.NewAnnotationQueryBuilder().Name("Restarts of containerd").Datasource(source).Enable(true).IconColor("purple").
		Expr("process_start_time_seconds{" + nodes + "} * 1000 and on (job, instance) podfsm_build_info").
		UseValueForTime(true).TitleFormat("containerd started on {{instance}}").TagKeys("instance")
}

func target(q query) *prometheus.DataqueryBuilder {
	expr := fmt.Sprintf(q.expr, nodes)
	return prometheus.NewDataqueryBuilder().Datasource(source).Expr(expr).LegendFormat(q.legend).Range().
		EditorMode(prometheus.QueryEditorModeCode).Format(prometheus.PromQueryFormatTimeSeries)
}

// graph returns a panel of lines in one unit. Colors show states and outcomes, never values.
func graph(title, unit string, queries ...query) *timeseries.PanelBuilder {
	p := timeseries.NewPanelBuilder().Title(title).Datasource(source).Span(8).Height(8).Unit(unit).Min(0).FillOpacity(10).
		Legend(common.NewVizLegendOptionsBuilder().DisplayMode(common.LegendDisplayModeList).Placement(common.LegendPlacementBottom).ShowLegend(true)).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending))
	for i, q := range queries {
		p.WithTarget(target(q).RefId(string(rune('A' + i))))
	}
	return p
}

func stacked() *common.StackingConfigBuilder {
	return common.NewStackingConfigBuilder().Mode(common.StackingModeNormal)
}

func runbook(p *timeseries.PanelBuilder, name string) *timeseries.PanelBuilder {
	return p.Links([]cog.Builder[dashboard.DashboardLink]{link("Runbook", "runbooks/"+name+".md")})
}

// quantiles returns p50, p95 and p99 of a histogram of seconds.
func quantiles(title, name, metric, matchers string) *timeseries.PanelBuilder {
	var queries []query
	for _, q := range []struct{ quantile, legend string }{{"0.5", "p50"}, {"0.95", "p95"}, {"0.99", "p99"}} {
		queries = append(queries, query{
			"histogram_quantile(" + q.quantile + ", sum by (le) (rate(" + metric + "_bucket{%s" + matchers + "}[$__rate_interval])))", q.legend,
		})
	}
	return runbook(graph(title, units.Seconds, queries...), name)
}

// count returns a number that should be 0.
func count(title, name, color, expr string) *stat.PanelBuilder {
	return stat.NewPanelBuilder().Title(title).Datasource(source).Span(3).Height(4).Unit(units.Short).
		Links([]cog.Builder[dashboard.DashboardLink]{link("Runbook", "runbooks/"+name+".md")}).
		WithTarget(target(query{expr: expr}).RefId("A")).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"})).
		ColorMode(common.BigValueColorModeBackground).GraphMode(common.BigValueGraphModeNone).
		NoValue("-").
		Thresholds(dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps([]dashboard.Threshold{
			{Color: "green"}, {Color: color, Value: cog.ToPtr(1.0)},
		}))
}

func heatmapOfSteps() *heatmap.PanelBuilder {
	return heatmap.NewPanelBuilder().Title("Distribution: $step").Datasource(source).Span(8).Height(8).
		Calculate(false).YAxis(heatmap.NewYAxisConfigBuilder().Unit(units.Seconds)).
		WithTarget(target(query{
			`sum by (le) (increase(podfsm_step_duration_seconds_bucket{%s, operation="do", step=~"$step"}[$__rate_interval]))`, "{{le}}",
		}).RefId("A").Format(prometheus.PromQueryFormatHeatmap))
}
