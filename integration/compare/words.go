package main

import (
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strings"

	"github.com/podfsm/podfsm/integration/harness"
)

// things are the kinds of what can be left, as an operator would name them, with the category of the census and the name of an item in
// it: items of one name are one thing. A kind without a name for an item leaves it out.
var things = []struct {
	one, many string
	category  string
	name      func(item string) string
}{
	{"address", "addresses", harness.IPAM, address},
	{"network namespace", "network namespaces", harness.NetNSMounts, mountPoint},
	{"network link", "network links", harness.Links, itself},
	{"iptables rule", "iptables rules", harness.IPTables, itself},
	{"process", "processes", harness.Processes, itself},
	{"shim", "shims", harness.Shims, itself},
	{"task", "tasks", harness.Tasks, itself},
	{"cgroup", "cgroups", harness.Cgroups, cgroup},
	{"mount", "mounts", harness.Mounts, mountPoint},
	{"container record", "container records", harness.Containers, itself},
	{"sandbox record", "sandbox records", harness.Sandboxes, itself},
	{"ledger entry", "ledger entries", harness.Ledger, itself},
	{"lease", "leases", harness.Leases, itself},
	{"snapshot", "snapshots", harness.Snapshots, itself},
	{"sandbox directory", "sandbox directories", harness.SandboxDirs, sandboxDir},
	{"CNI cache entry", "CNI cache entries", harness.CNICache, itself},
	{"shim socket", "shim sockets", harness.ShimSockets, itself},
	{"namespace held open", "namespaces held open", harness.Descriptors, itself},
	{"bundle directory", "bundle directories", harness.Files, bundle},
	{"temporary directory", "temporary directories", harness.Files, temporary},
	{"other file", "other files", harness.Files, file},
}

// words says what is only in after. The order is that of the things.
func words(before, after harness.Census) string {
	var left []string
	for _, thing := range things {
		old := names(before[thing.category], thing.name)
		now := names(after[thing.category], thing.name)
		maps.DeleteFunc(now, func(name string, _ bool) bool { return old[name] })
		switch len(now) {
		case 0:
		case 1:
			left = append(left, "1 "+thing.one)
		default:
			left = append(left, fmt.Sprint(len(now), " ", thing.many))
		}
	}
	if len(left) == 0 {
		return "nothing"
	}
	return strings.Join(left, ", ")
}

func names(items []string, name func(string) string) map[string]bool {
	all := map[string]bool{}
	for _, item := range items {
		if n := name(item); n != "" {
			all[n] = true
		}
	}
	return all
}

// mountPoint is where something is mounted; what it is may be new after a reboot.
func mountPoint(item string) string {
	path, _, _ := strings.Cut(item, " ")
	return path
}

func itself(item string) string { return item }

// address is that of a file of host-local, and none of its lock and its note of the last one.
func address(item string) string {
	if base := filepath.Base(item); net.ParseIP(base) != nil {
		return base
	}
	return ""
}

// cgroup is a cgroup's path below the hierarchies, of which a container has one in each. The kubelet removes a pod's own.
func cgroup(item string) string {
	_, below, _ := strings.Cut(strings.TrimPrefix(item, "/sys/fs/cgroup/"), "/")
	if strings.Count(below, "/") < 2 {
		return ""
	}
	return below
}

// sandboxDir is the directory of one sandbox, which has several files.
func sandboxDir(item string) string {
	_, below, _ := strings.Cut(item, "/sandboxes/")
	id, _, _ := strings.Cut(below, "/")
	return id
}

// temporary is a file in the directory for such ones, of which containerd's mounts of remapped snapshots make some.
func temporary(item string) string {
	if strings.HasPrefix(item, "tmp/") {
		return item
	}
	return ""
}

// bundle is the shim's directory of one container, of which there are two, with several files.
func bundle(item string) string {
	if _, below, found := strings.Cut(item, "/io.containerd.runtime.v2.task/k8s.io/"); found {
		id, _, _ := strings.Cut(below, "/")
		return id
	}
	return ""
}

// file leaves out what belongs to another thing on the list: a snapshot's directory, a pinned namespace's mount point.
// Damaged files that podfsm sets aside are for the operator.
func file(item string) string {
	if temporary(item)+bundle(item) != "" {
		return ""
	}
	for _, part := range []string{"/snapshots/", "/netns/", ".damaged-"} {
		if strings.Contains(item, part) {
			return ""
		}
	}
	return item
}
