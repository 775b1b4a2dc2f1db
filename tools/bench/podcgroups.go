package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

// podCgroups makes the cgroups of the floor's pods: one in every hierarchy of cgroup v1, or one with cgroup v2 alone.
type podCgroups struct {
	parents []string
	unified bool
}

func newPodCgroups(n *harness.Node) (p podCgroups, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup"))
	if err != nil {
		return p, err
	}
	if p.unified = len(mounts) == 0; p.unified {
		if mounts, err = mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2")); err != nil {
			return p, err
		}
	}
	for _, m := range mounts {
		parent := filepath.Join(m.Mountpoint, n.Name())
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return p, err
		}
		if strings.Contains(","+m.VFSOptions+",", ",cpuset,") {
			if err := inheritCPUs(m.Mountpoint, parent); err != nil {
				return p, err
			}
		}
		p.parents = append(p.parents, filepath.Join(parent, "podfloor"))
	}
	for _, parent := range p.parents {
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return p, err
		}
	}
	return p, nil
}

// inheritCPUs copies the CPUs and memory nodes of another cgroup of v1 to a cgroup and everything
// below it: without them it accepts no process.
func inheritCPUs(from, to string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(from, file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, file), value, 0); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(to, "cgroup.clone_children"), []byte("1"), 0)
}

// make makes the cgroups of a pod.
func (p podCgroups) make(id string) ([]string, error) {
	dirs := make([]string, len(p.parents))
	for i, parent := range p.parents {
		dirs[i] = filepath.Join(parent, id)
		if err := os.Mkdir(dirs[i], 0o755); err != nil {
			return nil, err
		}
	}
	return dirs, nil
}

// start starts a process in these cgroups. With cgroup v1 the calling thread stays in them, so it
// must end afterwards. It moves itself before the fork, because moving the process later would wait
// for an RCU grace period of the kernel.
func (p podCgroups) start(cmd *exec.Cmd, dirs []string) error {
	if p.unified {
		dir, err := os.Open(dirs[0])
		if err != nil {
			return err
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
		return cmd.Start()
	}
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "tasks"), []byte("0"), 0); err != nil {
			return err
		}
	}
	return cmd.Start()
}

func removeCgroups(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, unix.Rmdir(dir))
	}
	return errors.Join(errs...)
}
