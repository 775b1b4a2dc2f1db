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

// Node is what is examined, and where things are.
type Node struct {
	// Proc is where proc(5) is mounted, and Sys where sysfs(5) is: below "/" but in tests.
	Proc, Sys string
	// Etc has subuid(5) and subgid(5), and SystemdDir is there while systemd runs.
	Etc, SystemdDir string
	// Daemon is containerd's process id; 0 while it is down.
	Daemon int
	// Path is containerd's PATH; "" where that is this process's own, or unknown.
	Path string
	// Root and State are containerd's directories.
	Root, State string
	// Plugins are the daemon's cgroups for CNI plugins; the zero value while it is down.
	Plugins host.Groups
	// Config is what containerd's configuration says; nil while that is unknown.
	Config *Config
	// Strategies tries which ones work in a directory, and leaves nothing there.
	Strategies func(ctx context.Context, dir string) ([]Strategy, error)
	// Tmpfs tries whether the kernel maps the ids of tmpfs. A kernel that can't is a FailedPrecondition error.
	Tmpfs func() error
	// Refusal says why podfsm runs no pods at all; nil when all is well. Nil while the daemon is down.
	Refusal func() error
	// Draining says whether new pods are refused because the node is being drained, and since when.
	Draining func() (since time.Time, draining bool)
	// Ledger reads how the ledger is.
	Ledger func() (Ledger, error)
	// Stock is what the node has while podfsm isn't in place yet; nil once it is.
	Stock *Stock
}

// Config is what matters here of containerd's configuration.
type Config struct {
	// Handlers are the runtime handlers that are podfsm's, by name.
	Handlers []Handler
	// CgroupDriver is what containerd tells the kubelet to use, "systemd" or "cgroupfs"; "" where that isn't known.
	CgroupDriver string
	// InitPath is the program that becomes pause, where the configuration names one; else it is found as shims are.
	InitPath string
	// NetNSDir is where network namespaces are pinned.
	NetNSDir string
	// RestrictOOMScoreAdj is containerd's restrict_oom_score_adj.
	RestrictOOMScoreAdj bool
	// PoolUser is the user whose subordinate ids are the pool; "" where there is none, or it comes from elsewhere.
	PoolUser string
	// Pool says whether there is a pool of ids.
	Pool bool
}

// Handler is a runtime handler of podfsm's.
type Handler struct {
	Name          string
	Default       bool   // it runs pods that name none
	Shim          string // runtime_type, or runtime_path where that is set
	Binary        string // of the OCI runtime; "" where the shim isn't that of runc
	SystemdCgroup bool
	Snapshotter   Snapshotter
	Network       cni.Config
	Mode          userns.Mode
	Planned       bool // not configured yet: the settings are those that podfsm handler prints
}

// Snapshotter is one of containerd's, comparable.
type Snapshotter struct {
	Name     string
	Loaded   bool
	Root     string // its directory; "" where it doesn't tell
	RemapIDs bool   // it says that it mounts with id maps
}

// Ledger is how podfsm's ledger is.
type Ledger struct {
	Dirs    []string // its two directories
	Files   []string // the files in use; none where no ledger was made yet
	Damaged []Damaged
	Owed    int // sandboxes whose cleanup is owed
}

// Damaged is a file of the ledger that is damaged, or that was and is kept aside.
type Damaged struct{ File, Reason string }

// unconfigured is the finding of a check that needs a configuration which nobody knows.
func (n Node) unconfigured() []Finding {
	if n.Stock != nil {
		return []Finding{unknown("containerd's configuration isn't known", "see the check configuration")}
	}
	return []Finding{{Verdict: Unknown, Evidence: "containerd's configuration isn't known", Remedy: "start containerd"}}
}

// down is the finding of a check that looks at the daemon, which is down.
func down() []Finding { return []Finding{unknown("containerd is down", "start containerd")} }

// group is a thing that several handlers share.
type group[T any] struct {
	of       T
	handlers []string
}

// subject names the handlers.
func (g group[T]) subject() string { return strings.Join(g.handlers, ", ") }

// grouped are the different things of all handlers, each with the handlers that share it.
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

// lookPath finds a program as containerd does (exec.LookPath).
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

// existing is dir, or the directory above it that is there.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// proc is a path below /proc.
func (n Node) proc(path ...string) string { return filepath.Join(append([]string{n.Proc}, path...)...) }

// ok, warn and fail are the findings that most checks have one of.
func ok(evidence string) Finding { return Finding{Verdict: OK, Evidence: evidence} }

func warn(evidence, remedy string) Finding {
	return Finding{Verdict: Warn, Evidence: evidence, Remedy: remedy}
}

func fail(stops Pods, evidence, remedy string) Finding {
	return Finding{Verdict: Fail, Stops: stops, Evidence: evidence, Remedy: remedy}
}

func unknown(evidence, remedy string) Finding {
	return Finding{Verdict: Unknown, Evidence: evidence, Remedy: remedy}
}
