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

// cgroupVersion is "v2", "v1", or "v1 with v2 beside it".
func (n Node) cgroupVersion() (string, error) {
	root := filepath.Join(n.Sys, "fs/cgroup")
	var stat unix.Statfs_t
	if err := unix.Statfs(root, &stat); err != nil {
		return "", fmt.Errorf("failed to look at %s: %w", root, err)
	}
	if stat.Type == unix.CGROUP2_SUPER_MAGIC {
		return "v2", nil
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
