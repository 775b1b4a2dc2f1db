package harness

import (
	"fmt"
	"strconv"
	"strings"
)

// Resident returns the memory in bytes of the daemon, and of all processes of the node: daemon,
// pause, shims, monitors. Processes that share a page have an equal part of it each
// (proc_pid_smaps(5)).
func (n *Node) Resident() (daemon, all float64, err error) {
	processes, err := nodeProcesses(n.dir)
	if err != nil {
		return 0, 0, err
	}
	for _, p := range processes {
		size, err := proportionalSize(p.pid)
		if err != nil {
			return 0, 0, err
		}
		if p.pid == n.Pid() {
			daemon = size
		}
		all += size
	}
	return daemon, all, nil
}

// proportionalSize returns 0 for a process that has ended.
func proportionalSize(pid int) (float64, error) {
	rollup, err := procFile(pid, "smaps_rollup")
	if err != nil {
		return 0, err
	}
	_, after, found := strings.Cut(string(rollup), "\nPss:")
	if !found {
		return 0, nil
	}
	kib, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	if err != nil {
		return 0, fmt.Errorf("failed to read the memory of process %d: %w", pid, err)
	}
	return kib * 1024, nil
}
