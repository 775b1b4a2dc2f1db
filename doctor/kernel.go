package doctor

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/userns"
)

// fewNamespaces is the limit of user namespaces below which the check warns: each pod has one.
const fewNamespaces = 1000

// kernel checks only the version. Other checks try what the kernel can do.
func kernel(_ context.Context, n Node) []Finding {
	release, err := n.read("sys/kernel/osrelease")
	if err != nil {
		return []Finding{unknown(err.Error(), "mount proc on /proc")}
	}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return []Finding{unknown("Linux "+release, "compare it with 5.19 yourself")}
	}
	if major < 5 || major == 5 && minor < 19 {
		return []Finding{warn("Linux "+release+" is older than 5.19, the first with idmapped overlay mounts",
			"upgrade to Linux 6.3 or later (see the checks tmpfs, pidfd and statmount for 6.3, 6.11 and 6.15)")}
	}
	return []Finding{ok("Linux " + release)}
}

// userNamespaces checks the limit, which applies to root, too, and makes a user namespace.
// Restrictions for unprivileged users, such as apparmor_restrict_unprivileged_userns, don't apply
// to a runtime that runs as root.
func userNamespaces(_ context.Context, n Node) []Finding {
	const setting = "sys/user/max_user_namespaces"
	const remedy = "sysctl -w user.max_user_namespaces=15000, and put it into /etc/sysctl.d"
	text, err := n.read(setting)
	if err != nil {
		return []Finding{fail(UserNSPods, err.Error(), "boot a kernel with CONFIG_USER_NS=y")}
	}
	limit, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return []Finding{unknown(fmt.Sprintf("user.max_user_namespaces = %q", text), remedy)}
	}
	evidence := fmt.Sprintf("user.max_user_namespaces = %d", limit)
	if limit == 0 {
		return []Finding{fail(UserNSPods, evidence, remedy)}
	}
	made, err := userns.Try()
	if err != nil {
		return []Finding{fail(UserNSPods, fmt.Sprintf("%s, but failed to make one: %v", evidence, err), remedy)}
	}
	made.Close()
	if limit < fewNamespaces {
		return []Finding{warn(evidence+", and each pod with a user namespace has one", remedy)}
	}
	return []Finding{ok(evidence + ", and one could be made")}
}

// pidfd tries the system calls that capture a pod's network namespace.
func pidfd(context.Context, Node) []Finding {
	switch byIoctl, err := netns.ByPidfd(); {
	case err != nil:
		return []Finding{fail(NetworkPods, err.Error(), "upgrade to Linux 5.3 or later")}
	case !byIoctl:
		return []Finding{warn("no PIDFD_GET_NET_NAMESPACE before Linux 6.11: podfsm opens namespaces by /proc/PID/ns and asks the pidfd whether the process still runs",
			"upgrade to Linux 6.11 or later; pods run without")}
	default:
		return []Finding{ok("PIDFD_GET_NET_NAMESPACE works")}
	}
}

// statMount checks for the id maps of mounts, which only the pool's quarantine needs.
func statMount(_ context.Context, n Node) []Finding {
	switch {
	case userns.ReportsMountMaps():
		return []Finding{ok("statmount(2) shows the id maps of mounts")}
	case n.Config != nil && n.Config.Pool:
		return []Finding{warn("statmount(2) shows no id maps before Linux 6.15: any idmapped mount on the node keeps the whole pool in quarantine",
			"upgrade to Linux 6.15 or later; pods run without, until the pool is used up")}
	default:
		return []Finding{ok("statmount(2) shows no id maps; only a pool of ids needs them")}
	}
}

// read returns the text of a file below /proc, without surrounding white space.
func (n Node) read(path string) (string, error) {
	text, err := os.ReadFile(n.proc(path))
	return strings.TrimSpace(string(text)), err
}
