package plugin

import (
	"os"
	"path/filepath"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/snapshot"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// What is on record of a sandbox.
type (
	Spec     = records.Spec
	Snapshot = records.Snapshot
	Cgroup   = records.Cgroup
	Pause    = records.Pause
	NetNS    = records.NetNS
	Network  = records.Network
	Ready    = records.Ready
)

// node is what the steps work with; it is the same for all sandboxes.
type node struct {
	stock      *stockConfig
	policies   policies
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
	doctor     *doctor.Doctor // nil: nobody examines the node
}

func newNode(stock *stockConfig, client *containerd.Client, groups host.Groups, limits timeouts, ran func(cni.Command)) *node {
	return &node{
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

// decorate is what [DecorateSteps] was given.
var decorate = func(step lifecycle.Step) lifecycle.Step { return step }

// DecorateSteps puts something around every step: fault points, in a build for tests. It must be called before containerd runs.
func DecorateSteps(around func(lifecycle.Step) lifecycle.Step) { decorate = around }

// shimTimeout bounds the start of a shim, which takes some 20 ms.
const shimTimeout = 30 * time.Second

// steps are those of the creation path, in its order, and then those on demand.
func (n *node) steps(limits timeouts) []lifecycle.Step {
	bounds := func(f lifecycle.Facts) lifecycle.Facts {
		f.Deadline, f.UndoDeadline = limits.runtime, limits.runtime
		return f
	}
	steps := []lifecycle.Step{
		&allocateIDs{n, bounds(lifecycle.Facts{Name: states.AllocateIDs, Lasting: true})},
		&remapSnapshot{n, bounds(lifecycle.Facts{
			Name:  states.RemapSnapshot,
			Holds: []states.Event{states.AllocateIDs},
		})},
		&startPause{n, bounds(lifecycle.Facts{
			Name:  states.StartPause,
			Holds: []states.Event{states.AllocateIDs, states.RemapSnapshot},
		})},
		&captureNetNS{n, bounds(lifecycle.Facts{
			Name:   states.CaptureNetNS,
			AtStop: true,
		})},
		&attachNetwork{n, lifecycle.Facts{
			Name: states.AttachNetwork,
			// A DEL without the namespace would miss what is only found inside: the bridge plugin takes the addresses whose
			// masquerade rules it removes from there.
			Holds:        []states.Event{states.CaptureNetNS},
			AtStop:       true,
			Lasting:      true,
			Deadline:     2 * limits.cniAdd, // the driver ends each plugin in time; this ends a chain of many slow ones
			UndoDeadline: 2 * limits.cniDel,
		}},
		&declareReady{n, bounds(lifecycle.Facts{Name: states.DeclareReady})},
		&startShim{n, lifecycle.Facts{
			Name: states.StartShim,
			// It runs containers in the pod's namespaces, and under its ids.
			Holds:    []states.Event{states.AllocateIDs, states.StartPause, states.CaptureNetNS},
			AtStop:   true,
			OnDemand: true,
			// All other requests for the pod wait for it.
			Deadline:     min(shimTimeout, limits.runtime),
			UndoDeadline: limits.runtime,
		}},
	}
	for i, step := range steps {
		steps[i] = decorate(step)
	}
	return steps
}

// mapping is the pod's user namespace as the OCI runtime wants it; nil for a pod on the host's.
func mapping(r *lifecycle.Run) (uids, gids []specs.LinuxIDMapping) {
	if allocated, ok := r.Result(states.AllocateIDs).(*userns.Mappings); ok {
		return allocated.Linux()
	}
	return nil, nil
}

// netNSPath is where a sandbox's network namespace is pinned.
func (n *node) netNSPath(id string) string {
	return filepath.Join(n.stock.netNSDir(), leaks.Pin(id))
}
