package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/podfsm/podfsm/integration/harness"
)

// cgroup measures the CPU time of a node: that of its daemon with all processes that the daemon
// starts, and that of the pods, whose cgroups are beside it.
type cgroup struct {
	parent string // of the daemon's cgroup and the pods', in the hierarchy that counts CPU time
	pid    int    // the daemon's, or 0 without one
}

// newCgroup makes the cgroups of a node.
func newCgroup(n *harness.Node) (cgroup, error) {
	mount, err := cpuHierarchy()
	if err != nil {
		return cgroup{}, err
	}
	g := cgroup{parent: filepath.Join(mount, n.Name())}
	return g, os.MkdirAll(g.path("bench"), 0o755)
}

// addDaemon moves the daemon of a node into its cgroup.
func (g *cgroup) addDaemon(n *harness.Node) error {
	g.pid = n.Pid()
	return os.WriteFile(g.path("bench/cgroup.procs"), []byte(strconv.Itoa(g.pid)), 0)
}

// cpuHierarchy returns the hierarchy that counts CPU time: a separate one with cgroup v1, else the
// only one.
func cpuHierarchy() (string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return "", err
	}
	unified := ""
	for _, m := range mounts {
		if m.FSType == "cgroup" && strings.Contains(","+m.VFSOptions+",", ",cpuacct,") {
			return m.Mountpoint, nil
		}
		if m.FSType == "cgroup2" {
			unified = m.Mountpoint
		}
	}
	if unified == "" {
		return "", errors.New("no cgroup hierarchy counts CPU time here")
	}
	return unified, nil
}

func (g cgroup) path(below string) string { return filepath.Join(g.parent, below) }

// addThread moves the calling thread, and so the processes that it starts, into the daemon's
// cgroup. Only cgroup v1 supports single threads; with cgroup v2 these processes are not counted.
func (g cgroup) addThread() error {
	err := os.WriteFile(g.path("bench/tasks"), []byte("0"), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// cpu is CPU time by process, in seconds.
type cpu struct {
	daemon  float64
	plugins float64 // programs that the daemon has waited for: CNI plugins with their helpers, pinns, starts of shims
	rest    float64 // everything else: shims, the OCI runtime, pause
}

func (c cpu) total() float64 { return c.daemon + c.plugins + c.rest }

func (c cpu) minus(before cpu) cpu {
	return cpu{c.daemon - before.daemon, c.plugins - before.plugins, c.rest - before.rest}
}

// used returns the CPU time so far. That of the daemon has a resolution of a clock tick, 10 ms.
func (g cgroup) used() (c cpu, err error) {
	if c.rest, err = g.usage(); err != nil || g.pid == 0 {
		return c, err
	}
	c.daemon, c.plugins, err = ticks(g.pid)
	c.rest -= c.daemon + c.plugins
	return c, err
}

func (g cgroup) usage() (float64, error) {
	if text, err := os.ReadFile(g.path("cpuacct.usage")); err == nil {
		n, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		return n / 1e9, err
	}
	text, err := os.ReadFile(g.path("cpu.stat"))
	if err != nil {
		return 0, err
	}
	var µs float64
	_, err = fmt.Sscanf(string(text), "usage_usec %g", &µs)
	return µs / 1e6, err
}

// ticks returns the CPU times of a process and of its reaped children (proc_pid_stat(5)).
func ticks(pid int) (own, children float64, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	const hz = 100 // USER_HZ
	var n [4]float64
	for i := range n {
		if n[i], err = strconv.ParseFloat(fields[11+i], 64); err != nil {
			return 0, 0, err
		}
	}
	return (n[0] + n[1]) / hz, (n[2] + n[3]) / hz, nil
}

// spent measures and records the CPU time of each side's pods while f runs.
func (b *bench) spent(ctx context.Context, k kind, pods int, f func() error) error {
	before := map[string]cpu{}
	groups := map[string]cgroup{floorSide: b.floor.group}
	for _, s := range b.sides {
		groups[s.name] = s.group
	}
	for name, g := range groups {
		var err error
		if before[name], err = g.used(); err != nil {
			return err
		}
	}
	if err := f(); err != nil {
		return err
	}
	for name, g := range groups {
		after, err := g.used()
		if err != nil {
			return err
		}
		used := after.minus(before[name])
		each := func(seconds float64) float64 { return seconds / float64(pods) }
		b.results.add(metric(cpuTotal, k), name, 0, each(used.total()))
		if name == floorSide {
			continue
		}
		b.results.add(metric(cpuDaemon, k), name, 0, each(used.daemon))
		b.results.add(metric(cpuPlugins, k), name, 0, each(used.plugins))
		b.results.add(metric(cpuRest, k), name, 0, each(used.rest))
	}
	return nil
}
