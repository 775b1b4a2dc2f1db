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

// cgroups tells the version and who makes them. The systemd driver needs a systemd.
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
		if finding.Verdict == OK {
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

// systemdDriver is the finding for handlers with SystemdCgroup = true. sd_booted(3) has the test.
func (n Node) systemdDriver(version string) Finding {
	evidence := fmt.Sprintf("cgroup %s, driver systemd", version)
	if info, err := os.Stat(n.SystemdDir); err != nil || !info.IsDir() {
		return fail(NoPods, fmt.Sprintf("%s, but systemd doesn't run here: there is no %s", evidence, n.SystemdDir), "set SystemdCgroup = false in the handler's options, and cgroupDriver: cgroupfs in the kubelet's configuration")
	}
	return ok(evidence)
}

// compareDrivers compares a handler's driver with the kubelet's, as far as that is known. It stops no pods: those whose cgroup parent
// isn't for the handler are refused by that, and a kubelet that is another than it seems has its pods run.
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

// cgroupsOfPods are the names of the cgroup of all pods that a kubelet makes, by its driver: at the top, or below /kubelet, as in a node of
// kind. Elsewhere they may be those of another node's kubelet.
var cgroupsOfPods = map[string][]string{
	"systemd":  {"kubepods.slice", "kubelet.slice/kubelet-kubepods.slice"},
	"cgroupfs": {"kubepods", "kubelet/kubepods"},
}

// kubeletDriver is the cgroup driver of the kubelet, "" where it is unknown, and the evidence: the cgroup that the kubelet has made for all
// pods. A kubelet that has made none yet takes the driver that containerd tells.
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
				return "", "" // it was changed, and one is from before
			default:
				driver, evidence = ofDriver, "there is "+found[0]
			}
		}
	}
	if driver == "" {
		return n.Config.CgroupDriver, "containerd tells it so, by its default handler"
	}
	return driver, evidence
}

// ToldDriver is the cgroup driver that containerd tells the kubelet to use: by its default handler, where that has options for runc's shim,
// else what it finds on the node, which is "" here.
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

// v2 is the version where all controllers are in one hierarchy.
const v2 = "v2"

// cgroupVersion is "v2", "v1", or "v1 with v2 beside it".
func (n Node) cgroupVersion() (string, error) {
	root := filepath.Join(n.Sys, "fs/cgroup")
	var stat unix.Statfs_t
	if err := unix.Statfs(root, &stat); err != nil {
		return "", fmt.Errorf("failed to look at %s: %w", root, err)
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
