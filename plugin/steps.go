package plugin

import (
	"os"
	"path/filepath"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/snapshot"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// Types of the records of a sandbox.
type (
	Spec     = records.Spec
	Snapshot = records.Snapshot
	Cgroup   = records.Cgroup
	Pause    = records.Pause
	NetNS    = records.NetNS
	Network  = records.Network
	Ready    = records.Ready
)

// node holds the dependencies of the steps, shared by all sandboxes.
type node struct {
	limits     timeouts
	stock      *stockConfig
	policies   policies
	pinPrefix  string // of the names of network namespaces
	ids        *userns.Allocator
	client     *containerd.Client
	settings   pause.Settings
	containers pause.Containers
	pauses     *pause.Processes
	seccomp    *os.File // the filter of every pause
	shims      *pause.Shims
	shimDirs   pause.ShimDirs
	tasks      taskEvents
	snapshots  *snapshot.Preparer
	groups     host.Groups // of CNI plugins
	driver     *cni.Driver
	doctor     *doctor.Doctor // nil: nodes are not examined
}

func newNode(stock *stockConfig, client *containerd.Client, groups host.Groups, limits timeouts, ran func(cni.Command)) *node {
	return &node{
		limits: limits,
		stock:  stock,
		client: client,
		settings: pause.Settings{
			Files:                   pause.Files{RootDir: stock.RootDir, StateDir: stock.StateDir},
			EnableUnprivilegedPorts: stock.EnableUnprivilegedPorts,
			EnableUnprivilegedICMP:  stock.EnableUnprivilegedICMP,
			RestrictOOMScoreAdj:     stock.RestrictOOMScoreAdj,
			UnsetSeccompProfile:     stock.UnsetSeccompProfile,
		},
		containers: pause.NewContainers(client),
		snapshots:  snapshot.NewPreparer(client),
		groups:     groups,
		driver:     cni.NewDriver(cni.Options{AddTimeout: limits.cniAdd, DelTimeout: limits.cniDel, Ran: ran, Groups: groups}),
	}
}

// change is the argument of [ChangeSteps].
var change = func(steps []lifecycle.Step) []lifecycle.Step { return steps }

// ChangeSteps replaces the list of steps, for test builds: with fault points around the steps, or
// with the steps of another release. It must be called before containerd runs.
func ChangeSteps(to func([]lifecycle.Step) []lifecycle.Step) { change = to }

// list returns all steps: those of the creation path, in order, then those on demand.
func (n *node) list() []lifecycle.Step {
	return []lifecycle.Step{
		&allocateIDs{n},
		&remapSnapshot{n},
		&startPause{n},
		&captureNetNS{n},
		&attachNetwork{n},
		&declareReady{n},
		&startShim{n},
	}
}

// Steps returns the declarations of all steps for the table of states, in order.
func Steps() []states.Step {
	var declared []states.Step
	for _, step := range (&node{}).list() {
		declared = append(declared, step.Declaration().Step)
	}
	return declared
}

// bounded returns the declaration with the deadlines of steps that call the container runtime or
// containerd.
func (n *node) bounded(d lifecycle.Declaration) lifecycle.Declaration {
	d.Deadline, d.UndoDeadline = n.limits.runtime, n.limits.runtime
	return d
}

// mapping returns the pod's user namespace in OCI form, nil for a pod on the host's.
func mapping(r *lifecycle.Run) (uids, gids []specs.LinuxIDMapping) {
	if allocated, ok := r.Result(AllocateIDs).(*userns.Mappings); ok {
		return allocated.Linux()
	}
	return nil, nil
}

// netNSPath returns where a sandbox's network namespace is pinned, with any prefix. If no pin
// exists, it returns the path for a new one.
func (n *node) netNSPath(id string) string {
	names := leaks.Pins(id)
	for _, name := range names {
		path := filepath.Join(n.stock.netNSDir(), name)
		if _, err := os.Lstat(path); err == nil {
			return path
		}
	}
	name := n.pinPrefix + id
	if !slices.Contains(names, name) {
		name = names[0]
	}
	return filepath.Join(n.stock.netNSDir(), name)
}
