package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // or the library refuses device rules
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/cgroups/systemd"
	"golang.org/x/sys/unix"
)

// PodCgroup is the cgroup of a process of a pod, which an OCI specification names and runc's own library makes. It is a scope of
// systemd or a directory that podfsm makes itself, as the runtime handler's SystemdCgroup says, and then the same one that runc
// would make.
//
// Its methods are safe for concurrent use on different cgroups.
type PodCgroup struct {
	path    string // as in the OCI specification
	inner   string // below the root of every hierarchy; "" where that differs
	unit    string // the file that systemd keeps while it has a unit for the cgroup; "" without systemd
	manager cgroups.Manager
	places  map[string]string // the directories by controller
	dirs    []string          // one for each hierarchy, those of places
	cpu     string            // that one of dirs which limits the time of its processes on CPUs
}

// PodCgroupOf returns the cgroup by the OCI specification's linux.cgroupsPath. With systemd that is "slice:prefix:name". Else an absolute
// path begins at the root of the hierarchy, and any other, "slice:prefix:name" included, where runc begins it: at the cgroup of this
// process on v1, and above that one on v2. places are from [PodCgroup.Places] of an earlier process, which may have been in another
// cgroup; nil looks for them. It makes nothing.
//
// Errors: InvalidArgument for a path that names no cgroup; FailedPrecondition where systemd doesn't run, with the remedy.
func PodCgroupOf(cgroupsPath string, systemd bool, places map[string]string) (*PodCgroup, error) {
	name := nameByPath
	if systemd {
		name = nameBySlice
	}
	config, inner, err := name(cgroupsPath)
	if err != nil {
		return nil, fmt.Errorf("cgroup %q %w: %w", cgroupsPath, err, errdefs.ErrInvalidArgument)
	}
	// Pause only sleeps, so it has the least weight that the kernel knows: 2 shares of cgroup v1 are 1 of v2. It needs no device.
	config.Resources = &cgroups.Resources{CpuShares: 2, CpuWeight: 1, Devices: []*devices.Rule{
		{Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "rwm"},
	}}
	made, err := manager.NewWithPaths(config, maps.Clone(places)) // the manager forgets those that it has removed
	if err != nil {
		remedy := "mount the cgroup hierarchies below /sys/fs/cgroup"
		if systemd {
			remedy = "set SystemdCgroup = false for the runtime handler where systemd doesn't run"
		}
		return nil, fmt.Errorf("failed to find cgroup %q: %w; %s: %w", cgroupsPath, err, remedy, errdefs.ErrFailedPrecondition)
	}
	c := &PodCgroup{path: cgroupsPath, inner: inner, manager: made, places: maps.Clone(made.GetPaths())}
	c.cpu = cmp.Or(c.places["cpu"], c.places[""]) // v2 has one directory for all
	c.dirs = slices.Compact(slices.Sorted(maps.Values(c.places)))
	if systemd {
		c.unit = filepath.Join(transientUnits, path.Base(inner))
	}
	return c, nil
}

// nameByPath is how runc's library knows a cgroup that it makes itself.
func nameByPath(cgroupsPath string) (_ *cgroups.Cgroup, inner string, _ error) {
	clean := path.Join("/", cgroupsPath)
	if clean == "/" {
		return nil, "", errors.New("is the root of the hierarchy")
	}
	if err := checkParts(clean); err != nil {
		return nil, "", err
	}
	if !path.IsAbs(cgroupsPath) {
		return &cgroups.Cgroup{Path: clean[1:]}, "", nil
	}
	return &cgroups.Cgroup{Path: clean}, clean, nil
}

// nameBySlice is how runc's library knows a cgroup that systemd makes.
func nameBySlice(cgroupsPath string) (_ *cgroups.Cgroup, inner string, _ error) {
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 || parts[2] == "" {
		return nil, "", errors.New("is not of the form slice:prefix:name that systemd takes; set SystemdCgroup = false for the runtime handler, or cgroupDriver: systemd in the kubelet's configuration")
	}
	slice, err := systemd.ExpandSlice(cmp.Or(parts[0], "system.slice"))
	if err != nil {
		return nil, "", fmt.Errorf("is in no slice of systemd's (systemd.slice(5)): %w", err)
	}
	unit := parts[1] + "-" + parts[2] + ".scope"
	if strings.HasSuffix(parts[2], ".slice") {
		unit = parts[2] // runc's library has systemd make a slice then
	}
	inner = path.Join(slice, unit)
	if err := checkParts(inner); err != nil {
		return nil, "", err
	}
	return &cgroups.Cgroup{Systemd: true, Parent: parts[0], ScopePrefix: parts[1], Name: parts[2]}, inner, nil
}

// checkParts refuses what can't be the name of a directory, or would be two lines of /proc/PID/cgroup.
func checkParts(inner string) error {
	for name := range strings.SplitSeq(inner, "/") {
		if len(name) > unix.NAME_MAX || strings.ContainsAny(name, "\n\x00") {
			return fmt.Errorf("can't be made: its part %.20q has a line break or a NUL, or more than %d bytes", name, unix.NAME_MAX)
		}
	}
	return nil
}

// transientUnits is where systemd keeps the files of units that were made over its bus, until it has forgotten them (systemd.unit(5)).
const transientUnits = "/run/systemd/transient"

// Places are the cgroup's directories by controller where they depend on the cgroup that this process is in; nil where the path says all.
func (c *PodCgroup) Places() map[string]string {
	if c.inner != "" {
		return nil
	}
	return maps.Clone(c.places)
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
	if c.unit != "" {
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

// weigh sets the resources. The filter of devices of cgroup v2 raises the limit of locked memory of this process and leaves it so
// (opencontainers/cgroups, devices/ebpf_linux.go): without the limit's return, all that the daemon starts later would inherit it.
func (c *PodCgroup) weigh() error {
	limit, err := lockedMemory()
	if err != nil {
		return err
	}
	config, err := c.manager.GetCgroups()
	if err == nil {
		err = errors.Join(c.manager.Set(config.Resources), unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit))
	}
	if err != nil {
		return fmt.Errorf("failed to set the resources of cgroup %q: %w", c.path, err)
	}
	return nil
}

// lockedMemory is the limit that this process was started with: one that is read later may have been raised by another pod's start.
var lockedMemory = sync.OnceValues(func() (limit unix.Rlimit, err error) {
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return limit, fmt.Errorf("failed to read the limit of locked memory: %w", err)
	}
	return limit, nil
})

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

// End kills what runs in the cgroup, and removes it. It looks whether the cgroup is gone from every hierarchy, also from those that runc's
// library doesn't know, and whether systemd has forgotten its unit: both are asked for the removal, and not believed. It succeeds where
// there is none.
//
// Errors: what ended ctx, naming what is left; those of removals.
func (c *PodCgroup) End(ctx context.Context) error {
	dirs, err := c.everywhere()
	if err != nil {
		return err
	}
	_ = c.manager.Freeze(cgroups.Thawed) // a frozen process of v1 doesn't die
	for _, dir := range dirs {
		if _, err := (Group{dir: dir}).killAll(ctx); err != nil {
			return err
		}
	}
	var asked error
	if c.unit != "" {
		asked = c.manager.Destroy() // counts for what is left
	}
	for _, dir := range dirs {
		if err := (Group{dir: dir}).Remove(ctx); err != nil {
			return err
		}
	}
	return c.awaitUnit(ctx, asked)
}

// everywhere are the directories that the cgroup has or may have in any hierarchy.
func (c *PodCgroup) everywhere() ([]string, error) {
	dirs := c.Dirs()
	if c.inner != "" {
		mounts, err := hierarchies()
		if err != nil {
			return nil, err
		}
		for _, m := range mounts {
			dirs = append(dirs, filepath.Join(m.Mountpoint, c.inner))
		}
	}
	slices.Sort(dirs)
	return slices.Compact(dirs), nil
}

// forgetting is how long systemd may take to forget a unit whose cgroup is gone. It takes milliseconds, unless systemd is busy.
const forgetting = 10 * time.Second

// awaitUnit returns once systemd has no unit for the cgroup, which is gone. asked is what systemd has answered to the removal.
func (c *PodCgroup) awaitUnit(ctx context.Context, asked error) error {
	if c.unit == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, forgetting, fmt.Errorf("not within %v", forgetting))
	defer cancel()
	for pause := range pauses {
		_, err := os.Lstat(c.unit)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("failed to look for the unit of cgroup %q: %w", c.path, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			unit := filepath.Base(c.unit)
			return fmt.Errorf("failed to have systemd forget %q, whose cgroup is gone: %w; run systemctl stop %s, then systemctl reset-failed %s",
				unit, errors.Join(context.Cause(ctx), asked), unit, unit)
		}
	}
	return nil
}
