package netns

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// The names of the proofs, as errors give them.
const (
	proofParent = "parent"
	proofCgroup = "cgroup"
	proofUserNS = "user namespace"
	proofNetNS  = "network namespace"
)

// violated is the error of a proof that fails.
func violated(proof string, e Expect, format string, args ...any) error {
	return fmt.Errorf("process %d is not pause of sandbox %q: %s: %s: %w", e.Pid, e.ID, proof, fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition)
}

// proveParent proves that the parent is the sandbox's shim: a reused pid has another parent, since only the shim's own children
// and their orphans are below it. It returns the parent's pid, for proveSameParent.
//
// A pod may run a process with a shim's arguments, but not in the host's user namespace when it has one of its own; the cgroup
// and containerd's word answer for the others. The arguments are those of every shim that is built on containerd's pkg/shim.
func proveParent(e Expect) (int, error) {
	parent, err := parentOf(e.Pid)
	if err != nil {
		return 0, err
	}
	return parent, proveShim(e, parent)
}

// mostBetween is how many processes may stand between the shim and what its runtime starts: the runtime, and what wraps it.
const mostBetween = 4

// proveDescent proves that a process is below the sandbox's shim. While a runtime is at work it stands in between.
func proveDescent(e Expect) error {
	pid := e.Pid
	for range mostBetween + 1 {
		parent, err := parentOf(pid)
		if err != nil {
			return err
		}
		if proveShim(e, parent) == nil {
			return nil
		}
		pid = parent
	}
	return violated(proofParent, e, "it is not below the sandbox's shim")
}

// proveShim proves that a process is the sandbox's shim.
func proveShim(e Expect, parent int) error {
	argv, err := os.ReadFile(procPath(parent, "cmdline"))
	if err != nil {
		return violated(proofParent, e, "its parent %d can't be read: %v", parent, err)
	}
	args := strings.Split(strings.TrimSuffix(string(argv), "\x00"), "\x00")
	if !hasFlag(args, "-namespace", e.Namespace) || !hasFlag(args, "-id", e.ID) {
		return violated(proofParent, e, "its parent %d is not the sandbox's shim", parent)
	}
	user, err := statNS(procPath(parent, "ns/user"))
	if err != nil {
		return violated(proofParent, e, "the user namespace of its parent %d can't be read: %v", parent, err)
	}
	if user != host.user {
		return violated(proofParent, e, "its parent %d is not in the host's user namespace", parent)
	}
	return nil
}

// proveSameParent proves that what proveParent has read was the parent's. No pidfd holds the parent, but still being the parent
// means to have lived meanwhile: when a parent ends, its children get an older process as theirs, which can't have the same pid.
func proveSameParent(e Expect, parent int) error {
	again, err := parentOf(e.Pid)
	if err != nil {
		return err
	}
	if again != parent {
		return violated(proofParent, e, "its parent %d has ended", parent)
	}
	return nil
}

// parentOf reads the parent's pid, field 4 of /proc/PID/stat (proc_pid_stat(5)). The name in field 2 may hold anything, so fields
// are counted from its closing parenthesis, the last one in the line.
func parentOf(pid int) (int, error) {
	stat, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return 0, fmt.Errorf("failed to read the parent of process %d: %w", pid, err)
	}
	parent, err := parseParent(stat)
	if err != nil {
		return 0, fmt.Errorf("failed to parse %q: %w", procPath(pid, "stat"), err)
	}
	return parent, nil
}

func parseParent(stat []byte) (int, error) {
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 2 {
		return 0, fmt.Errorf("%d fields after the name: %w", len(fields), errdefs.ErrInternal)
	}
	return strconv.Atoi(fields[1])
}

func hasFlag(args []string, name, value string) bool {
	for i := range len(args) - 1 {
		if args[i] == name && args[i+1] == value {
			return true
		}
	}
	return false
}

// proveCgroup proves that the process is in the sandbox's cgroup, which the runtime alone puts processes into: an unprivileged
// stranger with the reused pid can't get there, whatever its parent and its arguments are.
//
// With cgroup v1, one hierarchy is enough, because runtimes leave out those that aren't mounted or supported.
func proveCgroup(e Expect) error {
	if e.CgroupPath == "" {
		return nil
	}
	matches, err := cgroupMatcher(e.CgroupPath)
	if err != nil {
		return err
	}
	groups, err := os.ReadFile(procPath(e.Pid, "cgroup"))
	if err != nil {
		return fmt.Errorf("failed to read the cgroups of process %d: %w", e.Pid, err)
	}
	if !anyCgroup(string(groups), matches) {
		return violated(proofCgroup, e, "it is not in %q", e.CgroupPath)
	}
	return nil
}

// anyCgroup says whether a path in /proc/PID/cgroup matches.
func anyCgroup(groups string, matches func(string) bool) bool {
	for line := range strings.Lines(groups) {
		// hierarchy-id:controllers:path (cgroups(7)); the path itself may contain colons.
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) == 3 && matches(fields[2]) {
			return true
		}
	}
	return false
}

// cgroupMatcher returns what tells whether a path of /proc/PID/cgroup is that of the OCI cgroupsPath.
func cgroupMatcher(cgroupsPath string) (func(string) bool, error) {
	switch parts := strings.Split(cgroupsPath, ":"); {
	case len(parts) == 3 && parts[2] != "":
		// systemd spreads the slice's name over several directories; the unit's own name is the pod's.
		unit := parts[2]
		if !strings.HasSuffix(unit, ".slice") {
			unit = parts[1] + "-" + unit + ".scope"
		}
		return func(p string) bool { return path.Base(p) == unit }, nil
	case path.Clean("/"+cgroupsPath) == "/":
		return nil, fmt.Errorf("cgroup path %q is the root cgroup, in which any process may be: %w", cgroupsPath, errdefs.ErrInvalidArgument)
	case path.IsAbs(cgroupsPath):
		return func(p string) bool { return p == path.Clean(cgroupsPath) }, nil
	default:
		return func(p string) bool { return strings.HasSuffix(p, path.Clean("/"+cgroupsPath)) }, nil
	}
}

// proveUserNS proves that the process is in a user namespace with the pod's mapping, or in the host's for a pod without one,
// and returns which it is. Ranges are disjoint from pod to pod, so the mapping tells pods apart; and a process that has left the
// pod's namespace for one it made itself would get that one's network namespace captured.
func proveUserNS(pidfd *os.File, e Expect) (nsID, error) {
	file, err := openNS(pidfd, e.Pid, userNS)
	if err != nil {
		return nsID{}, err
	}
	defer file.Close()
	user, err := identify(file)
	if err != nil {
		return nsID{}, err
	}
	inHost := user == host.user
	if e.UIDs == nil {
		if !inHost {
			return nsID{}, violated(proofUserNS, e, "it is not in the host's")
		}
		return user, nil
	}
	if inHost {
		return nsID{}, violated(proofUserNS, e, "it is in the host's")
	}
	for _, mapping := range []struct {
		file string
		want []IDMap
	}{{"uid_map", e.UIDs}, {"gid_map", e.GIDs}} {
		got, err := readIDMap(procPath(e.Pid, mapping.file))
		if err != nil {
			return nsID{}, err
		}
		if !slices.Equal(got, sorted(mapping.want)) {
			return nsID{}, violated(proofUserNS, e, "its %s is %v, not %v", mapping.file, got, mapping.want)
		}
	}
	return user, nil
}

// readIDMap reads a uid_map or gid_map, sorted by the id in the container.
func readIDMap(file string) ([]IDMap, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("failed to read an id mapping: %w", err)
	}
	maps, err := parseIDMap(string(data))
	if err != nil {
		return nil, fmt.Errorf("failed to parse %q: %w", file, err)
	}
	return sorted(maps), nil
}

func parseIDMap(text string) (maps []IDMap, err error) {
	for line := range strings.Lines(text) {
		var m IDMap
		if _, err := fmt.Sscan(line, &m.ContainerID, &m.HostID, &m.Size); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		maps = append(maps, m)
	}
	return maps, nil
}

// sorted orders extents as the kernel may do on its own.
func sorted(maps []IDMap) []IDMap {
	return slices.SortedFunc(slices.Values(maps), func(a, b IDMap) int { return cmp.Compare(a.ContainerID, b.ContainerID) })
}

// proveNetNS proves that the captured namespace was made in the pod's user namespace and is not the host's. A process may enter
// another network namespace by setns(2) and keep its pid, parent, cgroup and user namespace; the owner tells.
func proveNetNS(netns *os.File, owner nsID, e Expect) (nsID, error) {
	id, err := identify(netns)
	if err != nil {
		return nsID{}, err
	}
	if id == host.net {
		return nsID{}, violated(proofNetNS, e, "it is the host's")
	}
	got, err := ownerOf(netns)
	if err != nil {
		return nsID{}, err
	}
	if got != owner {
		return nsID{}, violated(proofNetNS, e, "it is owned by user namespace %d, not by the pod's, %d", got.ino, owner.ino)
	}
	return id, nil
}

func procPath(pid int, name string) string {
	return fmt.Sprintf("/proc/%d/%s", pid, name)
}
