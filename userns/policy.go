package userns

import (
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Mode is how pods that ask for no id mapping get one.
type Mode string

const (
	// ModeKubelet: podfsm maps only pods that ask for a mapping. Others stay in the node's user
	// namespace.
	ModeKubelet Mode = "kubelet"
	// ModeAuto: each pod gets a private range of a [Pool].
	ModeAuto Mode = "auto"
	// ModeNode: all pods share one mapping.
	ModeNode Mode = "node"
)

// Unmappable is what happens to pods that can't have a user namespace of their own.
type Unmappable string

const (
	// UnmappableRefuse: they are refused.
	UnmappableRefuse Unmappable = "refuse"
	// UnmappableHost: they stay in the node's user namespace.
	UnmappableHost Unmappable = "host"
)

// Policy applies to the pods of one runtime handler.
type Policy struct {
	Mode       Mode
	Unmappable Unmappable
	// NodeWide is the mapping of all pods in mode node, nil in other modes.
	NodeWide *Mappings
}

// Choose returns how a pod is mapped: ModeAuto or ModeNode if podfsm chooses, ModeKubelet if the
// request decides. If podfsm leaves a pod on the node's users because it can't be mapped, kept is
// the reason.
//
// A pod that can't be mapped and must not stay on the node's users is an InvalidArgument error.
func (p Policy) Choose(config *runtime.PodSandboxConfig) (mode Mode, kept string, err error) {
	asked := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if p.Mode == ModeKubelet || asked != nil && asked.GetMode() == runtime.NamespaceMode_POD {
		return ModeKubelet, "", nil
	}
	reasons := strings.Join(unmappable(config, p.length()), " and ")
	switch {
	case reasons == "":
		return p.Mode, "", nil
	case p.Unmappable == UnmappableHost:
		return ModeKubelet, "it " + reasons, nil
	default:
		return "", "", invalid("it %s, which a pod in a user namespace can't, and its runtime handler maps every pod (mode %q): "+
			"give the pod a handler of mode %q, or set unmappable = %q for this one",
			reasons, p.Mode, ModeKubelet, UnmappableHost)
	}
}

// length returns the number of ids per pod.
func (p Policy) length() uint32 {
	if p.NodeWide != nil {
		return p.NodeWide.UIDs.Length
	}
	return RangeSize
}
