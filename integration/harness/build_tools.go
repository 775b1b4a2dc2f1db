package harness

import (
	"context"
	"path/filepath"
)

// This file has the programs that only some tests need. A test that needs one builds it.

// kubelet is not a part: few tests need it, and its first build takes minutes.
var kubelet = install{module: "tools/modules/kubelet", bin: ".build/bin", args: []string{"tool"}, produces: "kubelet (minutes the first time)", kubernetes: true}

// cluster is a control plane, with the kubelet of its version.
var cluster = []install{
	{module: "tools/modules/etcd", bin: ".build/kubernetes", args: []string{"."}, produces: "etcd"},
	{
		module: "tools/modules/kubernetes", bin: ".build/kubernetes", args: []string{"tool"},
		produces: "Kubernetes (many minutes the first time)", kubernetes: true,
	},
}

// otherPlugins are CNI plugins of other projects, which few tests need.
var otherPlugins = map[string]install{
	"flannel":    {module: "tools/modules/flannel", bin: ".build/bin", args: []string{"tool"}, produces: "flannel's CNI plugin"},
	"multus":     {module: "tools/modules/multus", bin: ".build/bin", args: []string{"tool"}, produces: "Multus (minutes the first time)"},
	"calico":     {module: "tools/modules/calico", bin: ".build/bin", args: []string{"tool"}, produces: "Calico's CNI plugin (minutes the first time)"},
	"cilium-cni": {module: "tools/modules/cilium", bin: ".build/bin", args: []string{"tool"}, produces: "Cilium's CNI plugin"},
	// Its program has the name of the folder that its source is in.
	"whereabouts": {module: "tools/modules/whereabouts", bin: ".build/whereabouts", args: []string{"tool"}, produces: "whereabouts (minutes the first time)"},
}

// promql parses PromQL with the code of Prometheus.
var promql = install{module: "tools/modules/promql", bin: ".build/bin", args: []string{"."}, produces: "promql"}

// prometheus are Prometheus and promtool, without cloud discovery and web pages.
var prometheus = install{
	module: "tools/modules/promql", bin: ".build/bin", args: []string{"-tags=remove_all_sd", "tool"},
	produces: "prometheus, promtool (minutes the first time)",
}

// dashboard generates the dashboard for Grafana.
var dashboard = install{module: "tools/modules/dashboard", bin: ".build/bin", args: []string{"."}, produces: "dashboard"}

// packing are the programs that make packages.
var packing = []install{
	{module: "tools/modules/nfpm", bin: ".build/bin", args: []string{"tool"}, produces: "nfpm"},
	{module: ".", bin: ".build/bin", args: []string{"./tools/image"}, produces: "image"},
}

var helm = install{module: "tools/modules/helm", bin: ".build/bin", args: []string{"tool"}, produces: "helm"}

// BuildKubelet builds the kubelet and returns its path. Progress goes to stderr.
func BuildKubelet(ctx context.Context) (string, error) { return builds.tool(ctx, kubelet, "kubelet") }

// BuildCluster builds etcd, the control plane of Kubernetes, kubectl and the kubelet of that
// version, and returns their folder. Progress goes to stderr.
func BuildCluster(ctx context.Context) (dir string, err error) {
	for _, i := range cluster {
		if dir, err = builds.tool(ctx, i, ""); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// BuildPlugin builds a CNI plugin of another project and returns its path. Progress goes to stderr.
func BuildPlugin(ctx context.Context, name string) (string, error) {
	program := name
	if name == "whereabouts" {
		program = "cmd"
	}
	return builds.tool(ctx, otherPlugins[name], program)
}

// BuildPromQL builds the PromQL parser and returns its path. Progress goes to stderr.
func BuildPromQL(ctx context.Context) (string, error) { return builds.tool(ctx, promql, "promql") }

// BuildPrometheus builds Prometheus and promtool and returns their paths. Progress goes to stderr.
func BuildPrometheus(ctx context.Context) (server, promtool string, _ error) {
	server, err := builds.tool(ctx, prometheus, "prometheus")
	return server, filepath.Join(filepath.Dir(server), "promtool"), err
}

// BuildDashboard builds the dashboard generator and returns its path. Progress goes to stderr.
func BuildDashboard(ctx context.Context) (string, error) {
	return builds.tool(ctx, dashboard, "dashboard")
}

// BuildPacking builds the programs that deploy/package/pack runs, and returns their folder. Progress
// goes to stderr.
func BuildPacking(ctx context.Context) (dir string, err error) {
	for _, i := range packing {
		if dir, err = builds.tool(ctx, i, ""); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// BuildHelm builds helm and returns its path. Progress goes to stderr.
func BuildHelm(ctx context.Context) (string, error) { return builds.tool(ctx, helm, "helm") }
