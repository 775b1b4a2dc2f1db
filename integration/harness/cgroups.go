package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
)

// cgroupsEnv is "systemd" if systemd makes the cgroups of pods, as for a kubelet with that driver.
// It is "slices" if only the kubelet has that driver and the runtime handlers don't, which is a
// misconfiguration.
const cgroupsEnv = "PODFSM_CGROUPS"

var (
	systemdCgroups = os.Getenv(cgroupsEnv) == "systemd"
	podSlices      = systemdCgroups || os.Getenv(cgroupsEnv) == "slices"
)

// nodeCgroup is the name of the cgroup above all pods of a node. A dash in the name of a slice is a
// level of the hierarchy (systemd.slice(5)).
func nodeCgroup(node string) string {
	if podSlices {
		return sliceName(node) + ".slice"
	}
	return node
}

// sliceName is the prefix of the slices of a node, whether of systemd or the harness.
func sliceName(node string) string { return strings.ReplaceAll(node, "-", "_") }

// CgroupDriver is the driver that the kubelet needs for the node's pods.
func CgroupDriver() string {
	if podSlices {
		return "systemd"
	}
	return "cgroupfs"
}

// Cgroup returns a cgroup below that of the node's pods by the name that the kubelet uses, in each
// hierarchy.
func (n *Node) Cgroup(below ...string) string {
	if podSlices {
		return n.SliceParent(below...)
	}
	return filepath.Join("/", n.name, filepath.Join(below...))
}

// SliceParent returns a cgroup by the name that a kubelet with the systemd driver uses.
func (n *Node) SliceParent(below ...string) string {
	name := sliceName(n.name)
	path := "/" + name + ".slice"
	for _, part := range below {
		name += "-" + sliceName(part)
		path += "/" + name + ".slice"
	}
	return path
}

// MakeCgroup makes the cgroup above all pods of the node with every controller, as a kubelet
// requires of its cgroupRoot.
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

// podCgroup returns the cgroup of a pod as the kubelet would send it.
func (n *Node) podCgroup(uid string) string { return n.Cgroup("pod" + uid) }

// stopSlice stops the slices of the node in systemd.
func stopSlice(node string) error {
	if !systemdCgroups {
		return nil
	}
	return run(exec.Command("systemctl", "stop", nodeCgroup(node)))
}
