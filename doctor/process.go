package doctor

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pauseScore is the oom_score_adj that containerd's CRI gives to pause.
const pauseScore = -998

// oomScore checks that pause can have pauseScore. To set a score below the daemon's own, the daemon
// needs CAP_SYS_RESOURCE (proc_pid_oom_score_adj(5)).
func oomScore(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	if n.Daemon == 0 {
		return down()
	}
	if n.Config.RestrictOOMScoreAdj {
		return []Finding{ok("restrict_oom_score_adj = true: no capability is needed")}
	}
	capabilities, err := strconv.ParseUint(n.status("CapEff"), 16, 64)
	score, scoreErr := n.read(filepath.Join(strconv.Itoa(n.Daemon), "oom_score_adj"))
	if err != nil || scoreErr != nil {
		return []Finding{unknown(fmt.Sprintf("the capabilities of process %d, containerd, can't be read", n.Daemon), "mount proc on /proc")}
	}
	if capabilities&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return []Finding{ok("containerd has CAP_SYS_RESOURCE")}
	}
	if adj, err := strconv.Atoi(score); err == nil && adj <= pauseScore {
		return []Finding{ok(fmt.Sprintf("containerd's own oom_score_adj is %d", adj))}
	}
	return []Finding{fail(NoPods, fmt.Sprintf("containerd has no CAP_SYS_RESOURCE and an oom_score_adj of %s, so pause can't have %d", score, pauseScore),
		"set restrict_oom_score_adj = true in [plugins.'io.containerd.cri.v1.runtime'], or let containerd's unit have the capability")}
}

// supplementaryGroups checks that containerd has the supplementary group 0, unless all runtimes are
// runc. A runtime that opens volumes inside the user namespace needs that group to traverse the
// kubelet's directories of mode 0750. runc opens them outside since 1.2.
func supplementaryGroups(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	if n.Daemon == 0 {
		return down()
	}
	groups := strings.Fields(n.status("Groups"))
	evidence := fmt.Sprintf("groups of process %d: %s", n.Daemon, strings.Join(groups, " "))
	if len(groups) == 0 {
		evidence = fmt.Sprintf("process %d has no supplementary groups", n.Daemon)
	}
	var others []string
	for _, h := range n.Config.Handlers {
		if h.Binary != "" && filepath.Base(h.Binary) != "runc" {
			others = append(others, h.Binary)
		}
	}
	if slices.Contains(groups, "0") || len(others) == 0 {
		return []Finding{ok(evidence)}
	}
	return []Finding{warn(fmt.Sprintf("%s; %s may need group 0 to traverse the kubelet's directories of mode 0750", evidence, strings.Join(others, ", ")),
		"set SupplementaryGroups=0 in a drop-in of containerd's systemd unit")}
}

// status returns a value from containerd's /proc/PID/status; "" for none.
func (n Node) status(key string) string {
	text, _ := n.read(filepath.Join(strconv.Itoa(n.Daemon), "status"))
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(line, key+":"); found {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
