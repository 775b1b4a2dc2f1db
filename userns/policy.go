package userns

import (
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Mode says who chooses the id mappings of pods that ask for none.
type Mode string

const (
	// ModeKubelet: nobody does. They stay in the node's user namespace.
	ModeKubelet Mode = "kubelet"
	// ModeAuto: each pod gets a private range of a [Pool].
	ModeAuto Mode = "auto"
	// ModeNode: all pods share one mapping.
	ModeNode Mode = "node"
)

// Unmappable says what becomes of pods that can't have a user namespace of their own.
type Unmappable string

const (
	// UnmappableRefuse: they don't run.
	UnmappableRefuse Unmappable = "refuse"
	// UnmappableHost: they stay in the node's user namespace.
	UnmappableHost Unmappable = "host"
)

// Policy is what holds for the pods of one runtime handler.
type Policy struct {
	Mode       Mode
	Unmappable Unmappable
	// NodeWide is the mapping of all pods in mode node, nil in the others.
	NodeWide *Mappings
}

// Choose says who chooses a pod's mapping: ModeAuto or ModeNode where podfsm does, ModeKubelet where the request's own answer stands. Of a
// pod that podfsm leaves on the node's users, because it can't be mapped, kept says why.
//
// A pod that can't be mapped and may not stay on the node's users is an InvalidArgument error.
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

// length is how many ids a pod gets.
func (p Policy) length() uint32 {
	if p.NodeWide != nil {
		return p.NodeWide.UIDs.Length
	}
	return RangeSize
}
