package plugin

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/log"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
	"github.com/podfsm/podfsm/userns"
)

// policies maps runtime handlers to their policies. Other handlers have userns.ModeKubelet.
type policies map[string]userns.Policy

// of returns the policy of a runtime handler; "" is not resolved to the default handler.
func (p policies) of(handlerName string) userns.Policy {
	if policy, ok := p[handlerName]; ok {
		return policy
	}
	return userns.Policy{Mode: userns.ModeKubelet}
}

// holder returns a podfsm sandbox as a holder of the ids that it requests.
func holder(key ledger.Key, spec *Spec) userns.Holder {
	h := userns.Holder{ID: holderID(key), Pod: records.PodName(spec.Config), Origin: userns.OriginRequest, Since: time.Now()}
	switch spec.Choose {
	case userns.ModeAuto:
		h.Origin = userns.OriginAuto
	case userns.ModeNode:
		h.Origin = userns.OriginNode
	}
	if spec.Mapping != nil {
		h.Mappings = *spec.Mapping
	}
	h.Owner = owner(h, spec.Config)
	return h
}

// owner returns the identity that may hold the same ids by several sandboxes: the pod's uid, its
// name without a uid, or else the sandbox alone.
func owner(h userns.Holder, config *runtime.PodSandboxConfig) string {
	switch metadata := config.GetMetadata(); {
	case metadata.GetUid() != "":
		return "pod " + metadata.GetUid()
	case metadata.GetName() != "":
		return "pod named " + h.Pod
	default:
		return "sandbox " + h.ID
	}
}

// ofNode returns h as a holder of a node-wide mapping, which all its holders share.
func ofNode(h userns.Holder, m userns.Mappings) userns.Holder {
	h.Mappings, h.Owner = m, fmt.Sprintf("node %s %s", m.UIDs, m.GIDs)
	return h
}

// restoreIDs restores the holders after a restart: the sandboxes of the engine, and those that
// containerd keeps for other controllers.
func (c *Controller) restoreIDs(ctx context.Context, actions map[ledger.Key]lifecycle.Action, others map[ledger.Key]sandbox.Sandbox) {
	for _, view := range c.engine.List() {
		if m := records.MappingsOf(view); m != nil && mayHold(view, actions[view.Key].AssumeActed) {
			h := holder(view.Key, view.Spec.(*Spec))
			h.Mappings, h.Since = *m, view.Created
			if h.Origin == userns.OriginNode {
				h = ofNode(h, *m)
			}
			c.node.ids.Restore(h)
		}
	}
	for key, record := range others {
		m, err := mappingsOfRecord(record)
		if err != nil {
			log.G(ctx).WithField(tracing.LogSandbox, key.ID).WithError(err).Warn("failed to read the id mapping of a sandbox of another controller, its ids are not guarded")
		}
		if m != nil {
			config, _ := requestOf(record)
			c.node.ids.Restore(stockHolder(holderID(key), config, *m))
		}
	}
}

// mayHold reports whether a restored sandbox may have processes, mounts or snapshots with its ids.
func mayHold(view lifecycle.View, assumeActed bool) bool {
	switch view.Step(AllocateIDs).Status {
	case lifecycle.StepUndone:
		return false
	case lifecycle.StepPending, lifecycle.StepRunning:
		unknown := slices.ContainsFunc(view.Steps, func(s lifecycle.StepView) bool { return s.Unknown }) // steps of another release may use ids
		return unknown || assumeActed || view.State == states.Quarantined
	default:
		return true
	}
}

func stockHolder(id string, config *runtime.PodSandboxConfig, m userns.Mappings) userns.Holder {
	h := userns.Holder{ID: id, Pod: records.PodName(config), Origin: userns.OriginStock, Mappings: m, Since: time.Now()}
	h.Owner = owner(h, config)
	return h
}

// StockRuns makes a pod of another controller a holder while it runs. The pod is never refused; its
// ids only are not given to others.
func (c *Controller) StockRuns(config *runtime.PodSandboxConfig) (ended func(id string)) {
	m, err := userns.FromCRI(config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil || m == nil || c.engine == nil {
		return func(string) {}
	}
	passing := holderID(ledger.Key{Namespace: cri.Namespace, ID: fmt.Sprintf("%s%d", passingID, c.passing.Add(1))})
	c.node.ids.Restore(stockHolder(passing, config, *m))
	return func(id string) {
		if id != "" {
			c.node.ids.Restore(stockHolder(holderID(ledger.Key{Namespace: cri.Namespace, ID: id}), config, *m))
		}
		c.node.releaseIDs(passing)
	}
}

// StockRemoved ends the holding of a pod of another controller.
func (c *Controller) StockRemoved(id string) {
	if c.engine != nil {
		c.node.releaseIDs(holderID(ledger.Key{Namespace: cri.Namespace, ID: id}))
	}
}

// releaseIDs ends a holding. Only the history of the pool can fail to be saved.
func (n *node) releaseIDs(id string) {
	if err := n.ids.Release(id); err != nil {
		log.L.WithError(err).Warn("failed to save when an id range was last used, continuing")
	}
}

// chosenUserNS returns the user namespace that podfsm chose for a sandbox, in CRI form; nil if the
// request has one or the pod stays on the host's.
func chosenUserNS(view lifecycle.View) *runtime.UserNamespace {
	allocated, ok := view.Step(AllocateIDs).Result.(*userns.Mappings)
	if !ok || view.Spec.(*Spec).Mapping != nil {
		return nil
	}
	return allocated.CRI()
}
