package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroups checks the cgroup version and the drivers of the handlers. The systemd driver needs a
// running systemd.
func cgroups(_ context.Context, n Node) []Finding {
	version, err := n.cgroupVersion()
	if err != nil {
		return []Finding{fail(NoPods, err.Error(), "mount the cgroup hierarchies below /sys/fs/cgroup")}
	}
	if n.Config == nil {
		return []Finding{ok("cgroup " + version)}
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) bool { return h.SystemdCgroup }, equal) {
		finding := ok(fmt.Sprintf("cgroup %s, driver cgroupfs", version))
		if g.of {
			finding = n.systemdDriver(version)
		}
		if finding.Status == OK {
			finding = n.compareDrivers(version, finding, g.of)
		}
		finding.Subject = g.subject()
		found = append(found, finding)
	}
	if len(found) == 0 {
		found = []Finding{ok("cgroup " + version)}
	}
	return found
}

// systemdDriver returns the finding for handlers with SystemdCgroup = true. It tests for systemd
// like sd_booted(3).
func (n Node) systemdDriver(version string) Finding {
	evidence := fmt.Sprintf("cgroup %s, driver systemd", version)
	if info, err := os.Stat(n.SystemdDir); err != nil || !info.IsDir() {
		return fail(NoPods, fmt.Sprintf("%s, but systemd doesn't run here: there is no %s", evidence, n.SystemdDir), "set SystemdCgroup = false in the handler's options, and cgroupDriver: cgroupfs in the kubelet's configuration")
	}
	return ok(evidence)
}

// compareDrivers compares a handler's driver with the kubelet's, if that is known. It stops no
// pods, because the kubelet's driver may be detected wrongly. The handler itself refuses a pod
// whose cgroup parent doesn't fit its driver.
func (n Node) compareDrivers(version string, finding Finding, systemd bool) Finding {
	kubelet, evidence := n.kubeletDriver(version)
	switch {
	case kubelet == "systemd" && !systemd:
		return warn(fmt.Sprintf("%s, but the kubelet's is systemd: %s; pods run outside of their slices, so the slices' limits don't hold for them", finding.Evidence, evidence),
			"set SystemdCgroup = true in the handler's options, and restart containerd")
	case kubelet == "cgroupfs" && systemd:
		return fail(NoPods, fmt.Sprintf("%s, but the kubelet's is cgroupfs: %s; the handler refuses its pods", finding.Evidence, evidence),
			"set SystemdCgroup = false in the handler's options and restart containerd, or set cgroupDriver: systemd in the kubelet's configuration")
	default:
		return finding
	}
}

// cgroupsOfPods are the kubelet's cgroups for all pods by driver: at the top, or below /kubelet, as
// in a node of kind. Elsewhere, they may be from the kubelet of another node.
var cgroupsOfPods = map[string][]string{
	"systemd":  {"kubepods.slice", "kubelet.slice/kubelet-kubepods.slice"},
	"cgroupfs": {"kubepods", "kubelet/kubepods"},
}

// kubeletDriver returns the cgroup driver of the kubelet, "" if unknown, and the evidence: the
// kubelet's cgroup for all pods. Before the kubelet has made that cgroup, kubeletDriver returns the
// driver that containerd reports to the kubelet.
func (n Node) kubeletDriver(version string) (driver, evidence string) {
	tops := filepath.Join(n.Sys, "fs/cgroup")
	if version != v2 {
		tops = filepath.Join(tops, "*") // the hierarchies
	}
	for ofDriver, names := range cgroupsOfPods {
		for _, name := range names {
			found, _ := filepath.Glob(filepath.Join(tops, name))
			switch {
			case len(found) == 0:
			case driver != "" && driver != ofDriver:
				return "", "" // the driver was changed, and the old cgroup is still there
			default:
				driver, evidence = ofDriver, "there is "+found[0]
			}
		}
	}
	if driver == "" {
		return n.Config.CgroupDriver, "containerd reports the driver of its default handler"
	}
	return driver, evidence
}

// ToldDriver returns the cgroup driver that containerd reports to the kubelet: that of its default
// handler, if the handler has options for runc's shim. Otherwise containerd detects the driver on
// the node, and ToldDriver returns "".
func ToldDriver(options, systemdCgroup bool) string {
	switch {
	case !options:
		return ""
	case systemdCgroup:
		return "systemd"
	default:
		return "cgroupfs"
	}
}

// v2 is the version with all controllers in one hierarchy.
const v2 = "v2"

// cgroupVersion returns "v2", "v1 (CONTROLLERS)", or "v1 with v2 beside it".
func (n Node) cgroupVersion() (string, error) {
	root := filepath.Join(n.Sys, "fs/cgroup")
	var stat unix.Statfs_t
	if err := unix.Statfs(root, &stat); err != nil {
		return "", fmt.Errorf("failed to stat %s: %w", root, err)
	}
	if stat.Type == unix.CGROUP2_SUPER_MAGIC {
		return v2, nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", err
	}
	var controllers []string
	for _, e := range entries {
		controllers = append(controllers, e.Name())
	}
	if len(controllers) == 0 {
		return "", fmt.Errorf("%s is empty", root)
	}
	if _, err := os.Stat(filepath.Join(root, "unified")); !errors.Is(err, fs.ErrNotExist) {
		return "v1 with v2 beside it", nil
	}
	return "v1 (" + strings.Join(controllers, " ") + ")", nil
}
