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

// fewNamespaces is a limit of user namespaces below which a node with many pods comes to its end: each pod has one.
const fewNamespaces = 1000

// kernel tells the version only: what the kernel can do is tried by the checks below.
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
		return []Finding{warn("Linux "+release+" is older than 5.19, which idmapped overlay mounts came with",
			"upgrade to Linux 6.3 or later (the checks tmpfs, pidfd and statmount tell what 6.3, 6.11 and 6.15 bring)")}
	}
	return []Finding{ok("Linux " + release)}
}

// userNamespaces reads the limit and makes one. The limit holds for root, too. What keeps unprivileged users from making user namespaces,
// such as apparmor_restrict_unprivileged_userns, doesn't concern a runtime that runs as root.
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
		return []Finding{fail(UserNSPods, fmt.Sprintf("%s, and making one fails: %v", evidence, err), remedy)}
	}
	made.Close()
	if limit < fewNamespaces {
		return []Finding{warn(evidence+", and each pod with a user namespace has one", remedy)}
	}
	return []Finding{ok(evidence + ", and one could be made")}
}

// pidfd tries what the capture of a pod's network namespace needs.
func pidfd(context.Context, Node) []Finding {
	switch byIoctl, err := netns.ByPidfd(); {
	case err != nil:
		return []Finding{fail(NetworkPods, err.Error(), "upgrade to Linux 5.3 or later")}
	case !byIoctl:
		return []Finding{warn("no PIDFD_GET_NET_NAMESPACE, which came with Linux 6.11: namespaces are opened by /proc/PID/ns, between two looks whether the process lives",
			"upgrade to Linux 6.11 or later; pods run without")}
	default:
		return []Finding{ok("PIDFD_GET_NET_NAMESPACE works")}
	}
}

// statMount matters to the quarantine of the pool only.
func statMount(_ context.Context, n Node) []Finding {
	switch {
	case userns.MapsAreTold():
		return []Finding{ok("statmount(2) tells the id maps of mounts")}
	case n.Config != nil && n.Config.Pool:
		return []Finding{warn("statmount(2) tells no id maps, which came with Linux 6.15: one idmapped mount of anybody keeps the whole pool in quarantine",
			"upgrade to Linux 6.15 or later; pods run without, until the pool is used up")}
	default:
		return []Finding{ok("statmount(2) tells no id maps; only a pool of ids needs them")}
	}
}

// read is the text of a file below /proc, without white space around it.
func (n Node) read(path string) (string, error) {
	text, err := os.ReadFile(n.proc(path))
	return strings.TrimSpace(string(text)), err
}
