package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/userns"
)

// Node describes the examined node, and has the functions that examine it.
type Node struct {
	// Proc and Sys are the mount points of proc(5) and sysfs(5). Tests use other directories than
	// /proc and /sys.
	Proc, Sys string
	// Etc is the directory of subuid(5) and subgid(5). SystemdDir exists while systemd runs.
	Etc, SystemdDir string
	// Daemon is containerd's process id; 0 while it is down.
	Daemon int
	// Path is containerd's PATH; "" if it is this process's own, or unknown.
	Path string
	// Root and State are containerd's directories.
	Root, State string
	// Plugins are the daemon's cgroups for CNI plugins; the zero value while it is down.
	Plugins host.Groups
	// Config is from containerd's configuration; nil while that is unknown.
	Config *Config
	// Strategies tries all strategies in a directory, and leaves nothing there.
	Strategies func(ctx context.Context, dir string) ([]Strategy, error)
	// Tmpfs tries an idmapped mount of a tmpfs. It fails with FailedPrecondition if the kernel has
	// none.
	Tmpfs func() error
	// Refusal returns the reason why podfsm is degraded; nil if it isn't. The function is nil while
	// the daemon is down.
	Refusal func() error
	// Draining returns the start of the drain, if the node is being drained.
	Draining func() (since time.Time, draining bool)
	// Ledger reads the condition of the ledger.
	Ledger func() (Ledger, error)
	// Stock describes the node before podfsm is installed; nil afterwards.
	Stock *Stock
}

// Config is the part of containerd's configuration that the checks need.
type Config struct {
	// Handlers are podfsm's runtime handlers, by name.
	Handlers []Handler
	// CgroupDriver is the driver that containerd reports to the kubelet, "systemd" or "cgroupfs";
	// "" if unknown.
	CgroupDriver string
	// InitPath is the path of podfsm-init, if it is configured. Otherwise podfsm-init is found as
	// shims are.
	InitPath string
	// NetNSDir is the directory of pinned network namespaces.
	NetNSDir string
	// RestrictOOMScoreAdj is containerd's restrict_oom_score_adj.
	RestrictOOMScoreAdj bool
	// PoolUser is the user whose subordinate ids are the pool; "" for none, or for a pool of
	// configured ranges.
	PoolUser string
	// Pool says whether there is a pool of ids.
	Pool bool
}

// Handler is one of podfsm's runtime handlers.
type Handler struct {
	Name          string
	Default       bool   // it runs pods without a handler
	Shim          string // runtime_path, or else runtime_type
	Binary        string // of the OCI runtime; "" if the shim isn't runc's
	SystemdCgroup bool
	Snapshotter   Snapshotter
	Network       cni.Config
	Mode          userns.Mode
	Planned       bool // not configured yet: it has the settings that "podfsm handler" prints
}

// Snapshotter is one of containerd's snapshotters. It is comparable.
type Snapshotter struct {
	Name     string
	Loaded   bool
	Root     string // its directory; "" if unknown
	RemapIDs bool   // it has the capability remap-ids
}

// Ledger is the condition of podfsm's ledger.
type Ledger struct {
	Dirs    []string // its two directories
	Files   []string // the files in use; none before the first start
	Damaged []Damaged
	Pending int // sandboxes with a pending cleanup
}

// Damaged is a damaged file of the ledger, in use or kept aside.
type Damaged struct{ File, Reason string }

// unconfigured returns the finding of a check that needs the configuration, which is unknown.
func (n Node) unconfigured() []Finding {
	if n.Stock != nil {
		return []Finding{unknown("containerd's configuration isn't known", "see the check configuration")}
	}
	return []Finding{{Status: Unknown, Evidence: "containerd's configuration isn't known", Remedy: "start containerd"}}
}

// down returns the finding of a check that needs the daemon, which is down.
func down() []Finding { return []Finding{unknown("containerd is down", "start containerd")} }

// group is a property that several handlers share.
type group[T any] struct {
	of       T
	handlers []string
}

// subject returns the names of the handlers.
func (g group[T]) subject() string { return strings.Join(g.handlers, ", ") }

// grouped returns the distinct properties of all handlers, each with the handlers that share it.
func grouped[T any](all []Handler, of func(Handler) T, same func(a, b T) bool) (groups []group[T]) {
	for _, h := range all {
		thing := of(h)
		i := slices.IndexFunc(groups, func(g group[T]) bool { return same(g.of, thing) })
		if i < 0 {
			groups = append(groups, group[T]{of: thing})
			i = len(groups) - 1
		}
		groups[i].handlers = append(groups[i].handlers, h.Name)
	}
	return groups
}

func equal[T comparable](a, b T) bool { return a == b }

// lookPath finds a program as containerd does, by exec.LookPath.
func (n Node) lookPath(program string) (string, error) {
	if n.Path == "" || filepath.Base(program) != program {
		return exec.LookPath(program)
	}
	for _, dir := range filepath.SplitList(n.Path) {
		if found, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return found, nil
		}
	}
	return "", &exec.Error{Name: program, Err: exec.ErrNotFound}
}

// existing returns dir, or the nearest directory above it that exists.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// proc returns a path below /proc.
func (n Node) proc(path ...string) string { return filepath.Join(append([]string{n.Proc}, path...)...) }

// ok, warn, fail and unknown return a finding with their status.
func ok(evidence string) Finding { return Finding{Status: OK, Evidence: evidence} }

func warn(evidence, remedy string) Finding {
	return Finding{Status: Warn, Evidence: evidence, Remedy: remedy}
}

func fail(stops Pods, evidence, remedy string) Finding {
	return Finding{Status: Fail, Stops: stops, Evidence: evidence, Remedy: remedy}
}

func unknown(evidence, remedy string) Finding {
	return Finding{Status: Unknown, Evidence: evidence, Remedy: remedy}
}
