package harness

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// proc is a process of the machine.
type proc struct {
	pid           int
	name, cmdline string
}

func (p proc) String() string { return fmt.Sprintf("%d (%s) %s", p.pid, p.name, p.cmdline) }

// nodeProcesses returns the processes of a node: their command line or environment names the node's
// directory, or they are in its network namespace or cgroups. This process is not among them.
func nodeProcesses(dir string) ([]proc, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var netns unix.Stat_t
	// Without a namespace, no process can be in it.
	_ = unix.Stat(filepath.Join(dir, "netns"), &netns)

	var of []proc
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if isOrphanedZombie(pid) {
			continue
		}
		is, err := isOf(pid, dir, netns)
		if err != nil {
			return nil, err
		}
		if is {
			of = append(of, describe(pid))
		}
	}
	return of, nil
}

func isOf(pid int, dir string, netns unix.Stat_t) (bool, error) {
	for _, file := range []string{"cmdline", "environ", "cgroup"} {
		content, err := procFile(pid, file)
		if err != nil {
			return false, err
		}
		names := []string{dir + "/"}
		if file == "cgroup" {
			names = []string{"/" + nodeCgroup(filepath.Base(dir)) + "/", "/" + sliceName(filepath.Base(dir)) + "-"}
		}
		for _, name := range names {
			if bytes.Contains(content, []byte(name)) {
				return true, nil
			}
		}
	}
	var in unix.Stat_t
	err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &in)
	return err == nil && in.Dev == netns.Dev && in.Ino == netns.Ino, nil
}

// isOrphanedZombie reports whether a process has ended and waits until the machine's first process
// reaps it.
func isOrphanedZombie(pid int) bool {
	stat, _ := procFile(pid, "stat")
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]) // state and ppid come first, proc_pid_stat(5)
	return len(fields) > 1 && string(fields[0]) == "Z" && string(fields[1]) == "1"
}

// procFile reads a file of a process. It is empty for a process that has ended, and for a file that
// root can not read, which no process of a node has.
func procFile(pid int, file string) ([]byte, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrPermission) {
		return nil, nil
	}
	return content, err
}

func describe(pid int) proc {
	name, _ := procFile(pid, "comm")
	cmdline, _ := procFile(pid, "cmdline")
	return proc{
		pid:     pid,
		name:    strings.TrimSpace(string(name)),
		cmdline: strings.TrimSpace(string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))),
	}
}
