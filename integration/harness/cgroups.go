package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// cgroupsEnv is "systemd" where systemd makes the cgroups of pods, as for a
// kubelet with that driver, and "slices" where only the kubelet has it and the
// runtime handlers don't, which is a mistake.
const cgroupsEnv = "PODFSM_CGROUPS"

var (
	systemdCgroups = os.Getenv(cgroupsEnv) == "systemd"
	podSlices      = systemdCgroups || os.Getenv(cgroupsEnv) == "slices"
)

// nodeCgroup is the name of the cgroup that all pods of a node are below. A dash
// in the name of a slice is a level of the hierarchy (systemd.slice(5)).
func nodeCgroup(node string) string {
	if podSlices {
		return sliceName(node) + ".slice"
	}
	return node
}

// sliceName begins the names of a node's slices, whoever makes them.
func sliceName(node string) string { return strings.ReplaceAll(node, "-", "_") }

// SliceParent is a cgroup parent as a kubelet with the systemd driver sends it.
func (n *Node) SliceParent(pod string) string {
	name := sliceName(n.name)
	return "/" + name + ".slice/" + name + "-" + sliceName(pod) + ".slice"
}

// podCgroup is a pod's cgroup, as the kubelet would send it.
func (n *Node) podCgroup(uid string) string {
	if podSlices {
		return n.SliceParent("pod" + uid)
	}
	return filepath.Join("/", nodeCgroup(n.name), "pod"+uid)
}

// stopSlice has systemd forget the node's slices.
func stopSlice(node string) error {
	if !systemdCgroups {
		return nil
	}
	return run(exec.Command("systemctl", "stop", nodeCgroup(node)))
}
