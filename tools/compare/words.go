package main

import (
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strings"

	"github.com/podfsm/podfsm/integration/harness"
)

// things are the kinds of leftovers by the names that an operator would use, each with the category
// of the census and a function that names an item. Items with the same name count once. A kind
// leaves out items without a name.
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

// words lists what is only in after, in the order of things.
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

// mountPoint returns the mount point of a mount. The mounted filesystem may be new after a reboot.
func mountPoint(item string) string {
	path, _, _ := strings.Cut(item, " ")
	return path
}

func itself(item string) string { return item }

// address returns the name of an address file of host-local, and nothing for its lock and its last
// reserved address.
func address(item string) string {
	if base := filepath.Base(item); net.ParseIP(base) != nil {
		return base
	}
	return ""
}

// cgroup returns the path of a cgroup below the hierarchies, because a container has one in each.
// The kubelet removes those of pods.
func cgroup(item string) string {
	_, below, _ := strings.Cut(strings.TrimPrefix(item, "/sys/fs/cgroup/"), "/")
	if strings.Count(below, "/") < 2 {
		return ""
	}
	return below
}

// sandboxDir returns the directory of a sandbox, which has several files.
func sandboxDir(item string) string {
	_, below, _ := strings.Cut(item, "/sandboxes/")
	id, _, _ := strings.Cut(below, "/")
	return id
}

// temporary returns a temporary file, such as those of containerd's mounts of remapped snapshots.
func temporary(item string) string {
	if strings.HasPrefix(item, "tmp/") {
		return item
	}
	return ""
}

// bundle returns the id of a container whose shim has bundles: two directories with several files.
func bundle(item string) string {
	if _, below, found := strings.Cut(item, "/io.containerd.runtime.v2.task/k8s.io/"); found {
		id, _, _ := strings.Cut(below, "/")
		return id
	}
	return ""
}

// file omits files of other kinds: the directory of a snapshot, the mount point of a pinned
// namespace. Damaged files that podfsm sets aside are for the operator.
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
