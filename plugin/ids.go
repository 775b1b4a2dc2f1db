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
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
	"github.com/podfsm/podfsm/userns"
)

// policies are those of the runtime handlers; one without has userns.ModeKubelet.
type policies map[string]userns.Policy

// of is what holds for the pods of a runtime handler, by its own name.
func (p policies) of(handlerName string) userns.Policy {
	if policy, ok := p[handlerName]; ok {
		return policy
	}
	return userns.Policy{Mode: userns.ModeKubelet}
}

// holder is a sandbox of ours as a holder of ids, its mappings those of the request.
func holder(key journal.Key, spec *Spec) userns.Holder {
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

// owner is who may hold the same ids by several sandboxes: a pod, which is its name where it was made without a uid. A sandbox without
// either owns its ids alone.
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

// ofNode makes h one of the holders of a node-wide mapping, who share it by design.
func ofNode(h userns.Holder, m userns.Mappings) userns.Holder {
	h.Mappings, h.Owner = m, fmt.Sprintf("node %s %s", m.UIDs, m.GIDs)
	return h
}

// restoreIDs makes holders of the sandboxes that hold ids already: those in the engine, and those that containerd keeps for other
// controllers.
func (c *Controller) restoreIDs(ctx context.Context, actions map[journal.Key]lifecycle.Action, others map[journal.Key]sandbox.Sandbox) {
	for _, view := range c.engine.List() {
		if m := records.MappingsOf(view); m != nil && mayHold(view, actions[view.Key].Lost) {
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
			log.G(ctx).WithField(tracing.LogSandbox, key.ID).WithError(err).Warn("podfsm: the id mapping of a sandbox of another controller can't be read; nothing keeps other pods off its ids")
		}
		if m != nil {
			config, _ := requestOf(record)
			c.node.ids.Restore(stockHolder(holderID(key), config, *m))
		}
	}
}

// mayHold says whether anything of a restored sandbox may have been made under its ids.
func mayHold(view lifecycle.View, lost bool) bool {
	switch view.Step(AllocateIDs).Status {
	case lifecycle.StepUndone:
		return false
	case lifecycle.StepPending, lifecycle.StepRunning:
		unknown := slices.ContainsFunc(view.Steps, func(s lifecycle.StepView) bool { return s.Unknown }) // another release's may use them
		return unknown || lost || view.State == states.Quarantined
	default:
		return true
	}
}

func stockHolder(id string, config *runtime.PodSandboxConfig, m userns.Mappings) userns.Holder {
	h := userns.Holder{ID: id, Pod: records.PodName(config), Origin: userns.OriginStock, Mappings: m, Since: time.Now()}
	h.Owner = owner(h, config)
	return h
}

// StockRuns makes a holder of a pod that another controller runs, for as long as it runs. It is refused nothing: its ids only keep
// others off them.
func (c *Controller) StockRuns(config *runtime.PodSandboxConfig) (ended func(id string)) {
	m, err := userns.FromCRI(config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil || m == nil || c.engine == nil {
		return func(string) {}
	}
	passing := holderID(journal.Key{Namespace: cri.Namespace, ID: fmt.Sprintf("%s%d", passingID, c.passing.Add(1))})
	c.node.ids.Restore(stockHolder(passing, config, *m))
	return func(id string) {
		if id != "" {
			c.node.ids.Restore(stockHolder(holderID(journal.Key{Namespace: cri.Namespace, ID: id}), config, *m))
		}
		c.node.releaseIDs(passing)
	}
}

// StockRemoved ends that.
func (c *Controller) StockRemoved(id string) {
	if c.engine != nil {
		c.node.releaseIDs(holderID(journal.Key{Namespace: cri.Namespace, ID: id}))
	}
}

// releaseIDs ends a holding. What can fail is only the note of when a range was used last.
func (n *node) releaseIDs(id string) {
	if err := n.ids.Release(id); err != nil {
		log.L.WithError(err).Warn("podfsm: the pool of id ranges goes on without a note")
	}
}

// chosenUserNS is the user namespace that podfsm has chosen for a sandbox, as the CRI writes it; nil where the request has.
func chosenUserNS(view lifecycle.View) *runtime.UserNamespace {
	allocated, ok := view.Step(AllocateIDs).Result.(*userns.Mappings)
	if !ok || view.Spec.(*Spec).Mapping != nil {
		return nil
	}
	return allocated.CRI()
}
