package host

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // or the library refuses device rules
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/cgroups/manager"
)

// PodCgroup is the cgroup of a process of a pod, which an OCI specification names and runc's own library makes. It is a scope of
// systemd or a directory that podfsm makes itself, as the runtime handler's SystemdCgroup says, and then the same one that runc
// would make.
//
// Its methods are safe for concurrent use on different cgroups.
type PodCgroup struct {
	path    string // as in the OCI specification
	systemd bool
	manager cgroups.Manager
	dirs    []string // one for each hierarchy; the manager forgets those that it has removed
	cpu     string   // that one of dirs which limits the time of its processes on CPUs
}

// PodCgroupOf returns the cgroup by the OCI specification's linux.cgroupsPath. With systemd that is "slice:prefix:name", else it is
// a path below the root of the hierarchy, whatever it looks like. It makes nothing.
//
// Errors: InvalidArgument for a path that names no cgroup; FailedPrecondition where systemd doesn't run, with the remedy.
func PodCgroupOf(cgroupsPath string, systemd bool) (*PodCgroup, error) {
	config := &cgroups.Cgroup{
		Systemd: systemd,
		// Pause only sleeps, so it has the least weight that the kernel knows: 2 shares of cgroup v1 are 1 of v2. It needs no device.
		Resources: &cgroups.Resources{CpuShares: 2, CpuWeight: 1, Devices: []*devices.Rule{
			{Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "rwm"},
		}},
	}
	if systemd {
		parts := strings.Split(cgroupsPath, ":")
		if len(parts) != 3 || parts[2] == "" {
			return nil, fmt.Errorf("cgroup %q is not of the form slice:prefix:name that systemd takes; set SystemdCgroup = false for the runtime handler, or cgroupDriver: systemd in the kubelet's configuration: %w",
				cgroupsPath, errdefs.ErrInvalidArgument)
		}
		config.Parent, config.ScopePrefix, config.Name = parts[0], parts[1], parts[2]
	} else if config.Path = path.Join("/", cgroupsPath); config.Path == "/" {
		return nil, fmt.Errorf("cgroup %q is the root of the hierarchy: %w", cgroupsPath, errdefs.ErrInvalidArgument)
	}
	made, err := manager.New(config)
	if err != nil {
		remedy := "mount the cgroup hierarchies below /sys/fs/cgroup"
		if systemd {
			remedy = "set SystemdCgroup = false for the runtime handler where systemd doesn't run"
		}
		return nil, fmt.Errorf("failed to find cgroup %q: %w; %s: %w", cgroupsPath, err, remedy, errdefs.ErrFailedPrecondition)
	}
	c := &PodCgroup{path: cgroupsPath, systemd: systemd, manager: made}
	paths := made.GetPaths()
	for _, dir := range paths {
		c.dirs = append(c.dirs, dir)
	}
	c.cpu = cmp.Or(paths["cpu"], paths[""]) // v2 has one directory for all
	slices.Sort(c.dirs)
	c.dirs = slices.Compact(c.dirs)
	return c, nil
}

// Start makes the cgroup and has start start a process in it, which is in the cgroup from its birth where podfsm makes the cgroup
// itself. systemd makes a scope around a process that is there, so the process has to wait until Start has returned.
//
// start gets the descriptor for SysProcAttr.CgroupFD, or -1 for none, and returns the pid.
//
// Errors: those of start, FailedPrecondition for a cgroup that is frozen, others when the cgroup can't be made.
func (c *PodCgroup) Start(start func(cgroupFD int) (pid int, err error)) error {
	return c.start(c.dirs, nil, start)
}

// StartThenMove is Start for a start that waits, as vfork(2) does, until the process executes its program: the process is moved into what
// limits its time on CPUs only then, so it has to wait until StartThenMove has returned. Else whoever starts it waits for as long as other
// processes of the pod, or of more important ones, leave no time to it; and all other starts of a Go program wait with that one
// ([syscall.ForkLock]).
func (c *PodCgroup) StartThenMove(start func(cgroupFD int) (pid int, err error)) error {
	if c.cpu == "" {
		return c.Start(start)
	}
	born := slices.DeleteFunc(slices.Clone(c.dirs), func(dir string) bool { return dir == c.cpu })
	return c.start(born, []string{c.cpu}, start)
}

// start has a process born in some of the cgroup's directories, and moves it to others.
func (c *PodCgroup) start(born, later []string, start func(cgroupFD int) (pid int, err error)) error {
	if c.systemd {
		pid, err := start(-1)
		if err != nil {
			return err
		}
		if err := c.manager.Apply(pid); err != nil {
			return fmt.Errorf("failed to have systemd make cgroup %q: %w", c.path, err)
		}
		return c.weigh()
	}
	if err := c.manager.Apply(-1); err != nil {
		return fmt.Errorf("failed to make cgroup %q: %w", c.path, err)
	}
	if err := c.weigh(); err != nil {
		return err
	}
	if c.frozen() {
		return fmt.Errorf("cgroup %q, or one above it, is frozen: thaw it: %w", c.path, errdefs.ErrFailedPrecondition)
	}
	var pid int
	err := Cgroups(born).Start(func(cgroupFD int) (err error) {
		pid, err = start(cgroupFD)
		return err
	})
	if err != nil {
		return err
	}
	for _, dir := range later {
		if err := writeFile(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("failed to move process %d to cgroup %q: %w", pid, dir, err)
		}
	}
	return nil
}

// frozen says whether a process that is born in the cgroup would be frozen. Then whoever starts it waits until it executes its program,
// and all other starts of this daemon with it.
func (c *PodCgroup) frozen() bool {
	for _, dir := range c.dirs {
		for file, text := range map[string]string{"cgroup.events": "frozen 1", "freezer.state": "FR"} { // FREEZING or FROZEN
			data, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && strings.Contains(string(data), text) {
				return true
			}
		}
	}
	return false
}

func (c *PodCgroup) weigh() error {
	config, err := c.manager.GetCgroups()
	if err == nil {
		err = c.manager.Set(config.Resources)
	}
	if err != nil {
		return fmt.Errorf("failed to set the resources of cgroup %q: %w", c.path, err)
	}
	return nil
}

// Dirs are the directories of the cgroup, one for each hierarchy, sorted.
func (c *PodCgroup) Dirs() []string { return slices.Clone(c.dirs) }

// Pids are the processes in the cgroup and below it; none where there is no cgroup.
func (c *PodCgroup) Pids() ([]int, error) {
	var all []int
	for _, dir := range c.dirs {
		pids, err := Group{dir: dir}.Procs()
		if err != nil {
			return nil, err
		}
		all = append(all, pids...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// End kills what runs in the cgroup, and removes it from every hierarchy. It looks whether the cgroup is gone: systemd is asked for the
// removal, and not believed. It succeeds where there is none.
func (c *PodCgroup) End(ctx context.Context) error {
	_ = c.manager.Freeze(cgroups.Thawed) // a frozen process of v1 doesn't die
	for _, dir := range c.dirs {
		if _, err := (Group{dir: dir}).killAll(ctx); err != nil {
			return err
		}
	}
	if c.systemd {
		_ = c.manager.Destroy() // an error counts for what is left
	}
	for _, dir := range c.dirs {
		if err := (Group{dir: dir}).Remove(ctx); err != nil {
			return err
		}
	}
	return nil
}
