// Package records holds the types of what podfsm records of a sandbox, and shows a sandbox as the API does. It is apart from the
// plugin so that the command line tool can read a ledger while no daemon runs, without containerd in it.
package records

import (
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	gocni "github.com/containerd/go-cni"
	"github.com/containerd/typeurl/v2"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/tracing"
	"github.com/podfsm/podfsm/userns"
)

// Spec is what a sandbox is created with, as it stands in the ledger.
type Spec struct {
	// Config is the caller's true configuration.
	Config *runtime.PodSandboxConfig
	// Handler is the runtime handler as the caller named it; "" is the default one.
	Handler string
	// Mapping is the user namespace that the request gives; nil when it gives none. What the pod has is the result of allocate_ids.
	Mapping *userns.Mappings
	// Choose is who chooses the mapping: podfsm in modes auto and node, the request in any other.
	Choose userns.Mode
	// Kept is why podfsm has left the pod on the node's users where it would choose; "" where it hasn't.
	Kept string `json:",omitempty"`
	// NetNSPath is a network namespace that the caller made itself; "" when pause is to get a new one.
	NetNSPath string

	RuntimeType    string
	RuntimePath    string
	RuntimeOptions *journal.Data
	PodAnnotations []string // patterns of annotations that are passed on to the runtime
	Snapshotter    string
	Image          string

	// Guessed says that the sandbox's own records are lost and this is made from containerd's. It is never on record.
	Guessed bool `json:"-"`
}

// Options are the runtime options as containerd's client wants them.
func (s *Spec) Options() typeurl.Any {
	if s.RuntimeOptions == nil {
		return nil
	}
	return s.RuntimeOptions
}

// SystemdCgroup says whether the runtime handler has systemd make cgroups, by the runtime's options.
func (s *Spec) SystemdCgroup() bool {
	if s.RuntimeOptions == nil {
		return false
	}
	options, err := typeurl.UnmarshalAny(s.RuntimeOptions)
	if err != nil {
		return false // of another runtime than runc
	}
	runc, ok := options.(*runcoptions.Options)
	return ok && runc.GetSystemdCgroup()
}

// OnNodeNetwork says whether the pod shares the node's network.
func (s *Spec) OnNodeNetwork() bool { return s.NetNSPath == "" && OnNodeNetwork(s.Config) }

// NetworkIsOurs says whether the pod's network is for podfsm to attach: not where the pod is on the node's, nor where the
// caller made the namespace, and so the network in it.
func (s *Spec) NetworkIsOurs() bool { return !s.OnNodeNetwork() && s.NetNSPath == "" }

// Namespace is the containerd namespace of every sandbox that comes by CRI.
const Namespace = "k8s.io"

// OnNodeNetwork says whether a pod's configuration puts the pod on the node's network.
func OnNodeNetwork(config *runtime.PodSandboxConfig) bool {
	return config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtime.NamespaceMode_NODE
}

// PodName is a pod's "namespace/name", for messages.
func PodName(config *runtime.PodSandboxConfig) string {
	return config.GetMetadata().GetNamespace() + "/" + config.GetMetadata().GetName()
}

// Snapshot is the result of the step remap_snapshot.
type Snapshot struct {
	Snapshotter string
	Parent      string
	Strategy    string // how the files got the pod's owners
	// What of the image has got other owners for this pod, and how long that took.
	Inodes int64         `json:",omitempty"`
	Bytes  int64         `json:",omitempty"`
	Took   time.Duration `json:",omitempty"`
}

// Pause is the result of the step start_pause.
type Pause struct {
	Pid          uint32
	StartTime    uint64 // in clock ticks since the boot, field 22 of proc_pid_stat(5)
	CgroupPath   string // the OCI spec's linux.cgroupsPath
	ProcessLabel string // SELinux
	Labels       map[string]string
}

// Cgroup is the plan of the step start_pause for a cgroup whose place depends on the daemon's own: the next daemon may be elsewhere.
type Cgroup struct {
	Places map[string]string // directories by controller
}

// NetNS is the result of the step capture_netns.
type NetNS struct {
	Path  string
	Inode uint64
}

// Network is the result of the step attach_network.
type Network struct {
	IP            string
	AdditionalIPs []string
	Result        *gocni.Result
	Plugins       []PluginTime `json:",omitempty"`
}

// PluginTime is how long one plugin's ADD took.
type PluginTime struct {
	Network, Type string
	Took          time.Duration
}

// Ready is the result of the step declare_ready.
type Ready struct{}

// typePrefix starts the type URL of everything that podfsm records.
const typePrefix = tracing.Name

func init() {
	typeurl.Register(&Spec{}, typePrefix, "Spec")
	typeurl.Register(&userns.Mappings{}, typePrefix, "userns.Mappings")
	typeurl.Register(&Snapshot{}, typePrefix, "Snapshot")
	typeurl.Register(&Cgroup{}, typePrefix, "Cgroup")
	typeurl.Register(&Pause{}, typePrefix, "Pause")
	typeurl.Register(&NetNS{}, typePrefix, "NetNS")
	typeurl.Register(&Ready{}, typePrefix, "Ready")
	typeurl.Register(&Network{}, typePrefix, "Network")
	typeurl.Register(&cni.Attachment{}, typePrefix, "cni.Attachment")
	typeurl.Register(&cni.Progress{}, typePrefix, "cni.Progress")
}
