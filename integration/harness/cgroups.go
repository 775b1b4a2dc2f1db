package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
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

// CgroupDriver is the driver that the kubelet needs for the node's pods.
func CgroupDriver() string {
	if podSlices {
		return "systemd"
	}
	return "cgroupfs"
}

// Cgroup is a cgroup below that of the node's pods as the kubelet names it, in
// each hierarchy.
func (n *Node) Cgroup(below ...string) string {
	if podSlices {
		return n.SliceParent(below...)
	}
	return filepath.Join("/", n.name, filepath.Join(below...))
}

// SliceParent is a cgroup as a kubelet with the systemd driver names it.
func (n *Node) SliceParent(below ...string) string {
	name := sliceName(n.name)
	path := "/" + name + ".slice"
	for _, part := range below {
		name += "-" + sliceName(part)
		path += "/" + name + ".slice"
	}
	return path
}

// MakeCgroup makes the cgroup that all pods of the node are below, with every
// controller, as a kubelet demands of its cgroupRoot.
func (n *Node) MakeCgroup() error {
	c := &cgroups.Cgroup{Path: n.Cgroup(), Resources: &cgroups.Resources{SkipDevices: true}}
	if systemdCgroups {
		c = &cgroups.Cgroup{Systemd: true, Parent: "-.slice", Name: nodeCgroup(n.name), Resources: c.Resources}
	}
	m, err := manager.New(c)
	if err != nil {
		return err
	}
	return m.Apply(-1) // no process
}

// podCgroup is a pod's cgroup, as the kubelet would send it.
func (n *Node) podCgroup(uid string) string { return n.Cgroup("pod" + uid) }

// stopSlice has systemd forget the node's slices.
func stopSlice(node string) error {
	if !systemdCgroups {
		return nil
	}
	return run(exec.Command("systemctl", "stop", nodeCgroup(node)))
}
