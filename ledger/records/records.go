// Package records has the types of the data in the ledger, and replays sandboxes from them. It is
// apart from the plugin so that the CLI reads a ledger without a daemon, and without linking
// containerd.
package records

import (
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	gocni "github.com/containerd/go-cni"
	"github.com/containerd/typeurl/v2"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/tracing"
	"github.com/podfsm/podfsm/userns"
)

// Spec is the specification of a sandbox in the ledger.
type Spec struct {
	// Config is the configuration from the caller's request, unchanged.
	Config *runtime.PodSandboxConfig
	// Handler is the runtime handler from the caller's request; "" for the default.
	Handler string
	// Mapping is the mapping from the caller's request; nil for none. The pod's actual mapping is
	// the result of allocate_ids.
	Mapping *userns.Mappings
	// Choose is the mode of the mapping: podfsm chooses it in modes auto and node, otherwise the
	// request does.
	Choose userns.Mode
	// Kept is the reason why podfsm left the pod on the node's users although it chooses the
	// mapping; "" if it didn't.
	Kept string `json:",omitempty"`
	// NetNSPath is a network namespace of the caller; "" if pause gets a new one.
	NetNSPath string

	RuntimeType    string
	RuntimePath    string
	RuntimeOptions *ledger.Data
	PodAnnotations []string // patterns of the annotations for the runtime
	Snapshotter    string
	Image          string

	// Guessed says that the sandbox's records are lost, and that this is made from containerd's. It
	// is never recorded.
	Guessed bool `json:"-"`
}

// Options returns the runtime options for containerd's client; nil for none.
func (s *Spec) Options() typeurl.Any {
	if s.RuntimeOptions == nil {
		return nil
	}
	return s.RuntimeOptions
}

// SystemdCgroup says whether the runtime handler's options set SystemdCgroup.
func (s *Spec) SystemdCgroup() bool {
	if s.RuntimeOptions == nil {
		return false
	}
	options, err := typeurl.UnmarshalAny(s.RuntimeOptions)
	if err != nil {
		return false // not the options of runc
	}
	runc, ok := options.(*runcoptions.Options)
	return ok && runc.GetSystemdCgroup()
}

// OnNodeNetwork says whether the pod shares the node's network.
func (s *Spec) OnNodeNetwork() bool { return s.NetNSPath == "" && OnNodeNetwork(s.Config) }

// NetworkIsOurs says whether podfsm attaches the pod's network. It doesn't for a pod on the node's
// network, nor in a namespace of the caller.
func (s *Spec) NetworkIsOurs() bool { return !s.OnNodeNetwork() && s.NetNSPath == "" }

// Namespace is the containerd namespace of all sandboxes of CRI.
const Namespace = "k8s.io"

// OnNodeNetwork says whether a pod's configuration puts the pod on the node's network.
func OnNodeNetwork(config *runtime.PodSandboxConfig) bool {
	return config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtime.NamespaceMode_NODE
}

// PodName returns a pod's "namespace/name" for messages.
func PodName(config *runtime.PodSandboxConfig) string {
	return config.GetMetadata().GetNamespace() + "/" + config.GetMetadata().GetName()
}

// Snapshot is the result of the step remap_snapshot.
type Snapshot struct {
	Snapshotter string
	Parent      string
	Strategy    string // how the owners were remapped
	// Inodes and Bytes are what was remapped for this pod, and Took is the duration.
	Inodes int64         `json:",omitempty"`
	Bytes  int64         `json:",omitempty"`
	Took   time.Duration `json:",omitempty"`
}

// Pause is the result of the step start_pause.
type Pause struct {
	Pid          uint32
	StartTime    uint64 // clock ticks since the boot, field 22 of proc_pid_stat(5)
	CgroupPath   string // the OCI spec's linux.cgroupsPath
	ProcessLabel string // SELinux
	Labels       map[string]string
}

// Cgroup is the plan of the step start_pause for a cgroup below the daemon's own. The next daemon
// may be in another cgroup.
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

// PluginTime is the duration of one plugin's ADD.
type PluginTime struct {
	Network, Type string
	Took          time.Duration
}

// Ready is the result of the step declare_ready.
type Ready struct{}

// typePrefix is the prefix of the type URLs of podfsm's records.
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
