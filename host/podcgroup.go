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
	_ "github.com/opencontainers/cgroups/devices" // without it, the library refuses device rules
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/cgroups/systemd"
	"golang.org/x/sys/unix"
)

// PodCgroup is the cgroup of a process of a pod. The OCI specification names it, and runc's own
// library makes it, so that it is the same cgroup as with runc. By the runtime handler's
// SystemdCgroup, it is a scope of systemd, or a directory that podfsm makes itself.
//
// Its methods are safe for concurrent use on different cgroups.
type PodCgroup struct {
	path    string // as in the OCI specification
	inner   string // the path below the root of every hierarchy; "" if hierarchies differ
	unit    string // the file of systemd's unit for the cgroup; "" without systemd
	manager cgroups.Manager
	places  map[string]string // the directories by controller
	dirs    []string          // the directories, one per hierarchy
	cpu     string            // the one of dirs that limits CPU time
}

// PodCgroupOf returns the cgroup for the OCI specification's linux.cgroupsPath. It makes nothing.
//
// With systemd, the path is "slice:prefix:name". Otherwise an absolute path begins at the root of
// the hierarchy. Any other path, even "slice:prefix:name", begins where it does for runc: at the
// cgroup of this process on v1, and at its parent on v2. places is from [PodCgroup.Places] of an
// earlier process, which may have been in another cgroup; nil for a new cgroup.
//
// Errors: InvalidArgument for an invalid path; FailedPrecondition with the remedy if systemd
// doesn't run.
func PodCgroupOf(cgroupsPath string, systemd bool, places map[string]string) (*PodCgroup, error) {
	name := nameByPath
	if systemd {
		name = nameBySlice
	}
	config, inner, err := name(cgroupsPath)
	if err != nil {
		return nil, fmt.Errorf("cgroup %q %w: %w", cgroupsPath, err, errdefs.ErrInvalidArgument)
	}
	// Pause only sleeps, so it has the least CPU weight: 2 shares of v1 are weight 1 of v2. It
	// needs no device.
	config.Resources = &cgroups.Resources{CpuShares: 2, CpuWeight: 1, Devices: []*devices.Rule{
		{Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "rwm"},
	}}
	made, err := manager.NewWithPaths(config, maps.Clone(places)) // a clone, because the manager deletes removed places
	if err != nil {
		remedy := "mount the cgroup hierarchies below /sys/fs/cgroup"
		if systemd {
			remedy = "set SystemdCgroup = false for the runtime handler where systemd doesn't run"
		}
		return nil, fmt.Errorf("failed to find cgroup %q: %w; %s: %w", cgroupsPath, err, remedy, errdefs.ErrFailedPrecondition)
	}
	c := &PodCgroup{path: cgroupsPath, inner: inner, manager: made, places: maps.Clone(made.GetPaths())}
	c.cpu = cmp.Or(c.places["cpu"], c.places[""]) // v2 has one directory for all controllers
	c.dirs = slices.Compact(slices.Sorted(maps.Values(c.places)))
	if systemd {
		c.unit = filepath.Join(transientUnits, path.Base(inner))
	}
	return c, nil
}

// nameByPath returns the configuration of runc's library for a cgroup that the library makes
// itself.
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

// nameBySlice returns the configuration of runc's library for a cgroup that systemd makes.
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
		unit = parts[2] // as runc's library does
	}
	inner = path.Join(slice, unit)
	if err := checkParts(inner); err != nil {
		return nil, "", err
	}
	return &cgroups.Cgroup{Systemd: true, Parent: parts[0], ScopePrefix: parts[1], Name: parts[2]}, inner, nil
}

// checkParts refuses a part that can't be the name of a directory, or whose line break would forge
// a line of /proc/PID/cgroup.
func checkParts(inner string) error {
	for name := range strings.SplitSeq(inner, "/") {
		if len(name) > unix.NAME_MAX || strings.ContainsAny(name, "\n\x00") {
			return fmt.Errorf("can't be made: its part %.20q has a line break or a NUL, or more than %d bytes", name, unix.NAME_MAX)
		}
	}
	return nil
}

// transientUnits is the directory of the files of transient units, which systemd removes with the
// unit (systemd.unit(5)).
const transientUnits = "/run/systemd/transient"

// Places returns the cgroup's directories by controller if they depend on the cgroup of this
// process; nil if the path determines them.
func (c *PodCgroup) Places() map[string]string {
	if c.inner != "" {
		return nil
	}
	return maps.Clone(c.places)
}

// Start makes the cgroup and calls start, which starts a process. If podfsm makes the cgroup
// itself, the process is born in it. systemd makes a scope only for an existing process, so the
// process has to wait until Start has returned.
//
// start gets the descriptor for SysProcAttr.CgroupFD, or -1 for none, and returns the pid.
//
// Errors: those of start; FailedPrecondition for a frozen cgroup; others if the cgroup can't be
// made.
func (c *PodCgroup) Start(start func(cgroupFD int) (pid int, err error)) error {
	return c.start(c.dirs, nil, start)
}

// StartThenMove is Start for a start function that waits, as vfork(2) does, until the process
// executes its program. The process is born outside the hierarchy that limits CPU time, and moved
// there afterwards, so it has to wait until StartThenMove has returned. Otherwise busy processes of
// the pod could delay the process, and start with it. All other starts of a Go program wait for
// that one ([syscall.ForkLock]).
func (c *PodCgroup) StartThenMove(start func(cgroupFD int) (pid int, err error)) error {
	if c.cpu == "" {
		return c.Start(start)
	}
	born := slices.DeleteFunc(slices.Clone(c.dirs), func(dir string) bool { return dir == c.cpu })
	return c.start(born, []string{c.cpu}, start)
}

// start starts a process in the directories born, and then moves it to the directories later.
func (c *PodCgroup) start(born, later []string, start func(cgroupFD int) (pid int, err error)) error {
	if c.unit != "" {
		pid, err := start(-1)
		if err != nil {
			return err
		}
		if err := c.manager.Apply(pid); err != nil {
			return fmt.Errorf("failed to have systemd make cgroup %q: %w", c.path, err)
		}
		return c.setResources()
	}
	if err := c.manager.Apply(-1); err != nil {
		return fmt.Errorf("failed to make cgroup %q: %w", c.path, err)
	}
	if err := c.setResources(); err != nil {
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

// frozen says whether the cgroup is frozen. A process born in it would never execute its program,
// and all other starts of this daemon would wait for it.
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

// setResources sets the resources. On cgroup v2, the device filter raises RLIMIT_MEMLOCK of this
// process for good (opencontainers/cgroups, devices/ebpf_linux.go). setResources resets the limit,
// because all processes that the daemon starts inherit it.
func (c *PodCgroup) setResources() error {
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

// lockedMemory returns the RLIMIT_MEMLOCK of this process before any pod's start has raised it.
var lockedMemory = sync.OnceValues(func() (limit unix.Rlimit, err error) {
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return limit, fmt.Errorf("failed to read the limit of locked memory: %w", err)
	}
	return limit, nil
})

// Dirs returns the directories of the cgroup, one per hierarchy, sorted.
func (c *PodCgroup) Dirs() []string { return slices.Clone(c.dirs) }

// Pids returns the processes in the cgroup and below it; none if there is no cgroup.
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

// End kills the processes in the cgroup and removes it. It succeeds if there is no cgroup. It
// checks that the cgroup is gone from every hierarchy, also from those that runc's library doesn't
// know, and that systemd has removed its unit.
//
// Errors: the cause of ctx's end, with what is left; those of removals.
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
		asked = c.manager.Destroy() // its error matters only if the unit stays
	}
	for _, dir := range dirs {
		if err := (Group{dir: dir}).Remove(ctx); err != nil {
			return err
		}
	}
	return c.awaitUnit(ctx, asked)
}

// Exists says whether the cgroup exists in any hierarchy, or systemd has a unit for it.
func (c *PodCgroup) Exists() (bool, error) {
	paths, err := c.everywhere()
	if err != nil {
		return false, err
	}
	if c.unit != "" {
		paths = append(paths, c.unit)
	}
	for _, path := range paths {
		_, err := os.Lstat(path)
		if err == nil {
			return true, nil
		}
		if !gone(err) {
			return false, fmt.Errorf("failed to find cgroup %q: %w", c.path, err)
		}
	}
	return false, nil
}

// everywhere returns the directories that the cgroup may have in any hierarchy.
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

// unitTimeout bounds the wait until systemd removes a unit whose cgroup is gone. That takes
// milliseconds, unless systemd is busy.
const unitTimeout = 10 * time.Second

// awaitUnit waits until systemd has removed the unit of the cgroup, which is gone. asked is the
// error of the request to systemd.
func (c *PodCgroup) awaitUnit(ctx context.Context, asked error) error {
	if c.unit == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, unitTimeout, fmt.Errorf("not within %v", unitTimeout))
	defer cancel()
	for pause := range pollIntervals {
		_, err := os.Lstat(c.unit)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("failed to find the unit of cgroup %q: %w", c.path, err)
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
