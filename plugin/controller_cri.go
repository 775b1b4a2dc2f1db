package plugin

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// The methods for both parts of package cri: retries join callers to sandboxes, and the front serves
// what retries pass on. Admission, containers, metrics and the status have files of their own.
var _ cri.Sandboxes = (*Controller)(nil)

// criKey returns the key of a sandbox made for a CRI request.
func criKey(id string) ledger.Key { return ledger.Key{Namespace: cri.Namespace, ID: id} }

// Sandbox returns a sandbox that podfsm made for a CRI request.
func (c *Controller) Sandbox(id string) (cri.Sandbox, bool) {
	if c.engine == nil {
		return cri.Sandbox{}, false
	}
	view, ok := c.find(criKey(id))
	if !ok {
		return cri.Sandbox{}, false
	}
	return criSandbox(view), true
}

// Named returns the sandbox of one attempt of a pod.
func (c *Controller) Named(metadata *runtime.PodSandboxMetadata) (cri.Sandbox, bool) {
	if c.engine == nil {
		return cri.Sandbox{}, false
	}
	view, ok := c.engine.Named(nameOf(cri.Namespace, metadata))
	if !ok {
		return cri.Sandbox{}, false
	}
	return criSandbox(view), true
}

// criSandbox returns a sandbox as package cri sees it.
func criSandbox(view lifecycle.View) cri.Sandbox {
	spec := view.Spec.(*Spec)
	pod := cri.Sandbox{
		ID: view.Key.ID, Config: spec.Config, Handler: spec.Handler, CreatedAt: view.Created, Ready: view.State == states.Ready,
		State: view.State, Claim: view.Claim, TraceParent: view.TraceParent, Mapped: records.MappingsOf(view) != nil,
	}
	if step, ok := view.Current(); ok {
		pod.Step, pod.Since = string(step.Name), step.Started
	}
	captured := view.Step(CaptureNetNS)
	if pinned, ok := captured.Result.(*NetNS); ok && captured.Status == lifecycle.StepDone {
		pod.NetNSPath = pinned.Path
	}
	if attached, ok := records.NetworkOf(view); ok {
		pod.IP, pod.AdditionalIPs = attached.IP, attached.AdditionalIPs
	}
	if attached, ok := view.Step(AttachNetwork).Result.(*Network); ok && attached.IP != "" {
		pod.HadIPs = append([]string{attached.IP}, attached.AdditionalIPs...)
	}
	pod.UserNS = chosenUserNS(view)
	return pod
}

// WaitQueued is [lifecycle.Engine.WaitQueued] for a sandbox that podfsm made for a CRI request.
func (c *Controller) WaitQueued(ctx context.Context, id string) error {
	return c.engine.WaitQueued(ctx, criKey(id))
}

// Claim marks a sandbox as shown or taken.
func (c *Controller) Claim(ctx context.Context, id string, claim lifecycle.Claim) bool {
	return c.engine == nil || c.engine.Claim(ctx, criKey(id), claim)
}

// Discard marks a sandbox as discarded.
func (c *Controller) Discard(id string, limit lifecycle.Claim) bool {
	return c.engine != nil && c.engine.Discard(criKey(id), limit)
}

// Unclaimed returns the ids of created sandboxes that no caller has claimed.
func (c *Controller) Unclaimed() []string {
	if c.engine == nil {
		return nil
	}
	var ids []string
	for _, view := range c.engine.List() {
		if finished(view) && view.Claim == lifecycle.Unclaimed && view.Key.Namespace == cri.Namespace {
			ids = append(ids, view.Key.ID)
		}
	}
	return ids
}

// finished reports whether a sandbox was created and has not been stopped.
func finished(view lifecycle.View) bool {
	return view.State == states.Ready || view.State == states.NotReady
}

// PauseImage is the reference of the pause image, as containerd's configuration pins it.
func (c *Controller) PauseImage() string { return c.stock.pauseImage() }

// CreatedAt returns when the creation of a sandbox began.
func (c *Controller) CreatedAt(id string) time.Time {
	if c.engine == nil {
		return time.Time{}
	}
	return c.engine.Created(criKey(id))
}

// SandboxOfContainer returns the podfsm sandbox of a container, by containerd's record of the
// container.
func (c *Controller) SandboxOfContainer(ctx context.Context, id string) (cri.Sandbox, bool, error) {
	if c.engine == nil {
		return cri.Sandbox{}, false, nil
	}
	sandbox, err := c.node.sandboxOf(ctx, id)
	if err != nil {
		return cri.Sandbox{}, false, err
	}
	pod, ok := c.Sandbox(sandbox)
	return pod, ok, nil
}

// StopSandbox ends pause and detaches a sandbox from its network. An unknown sandbox is success.
func (c *Controller) StopSandbox(ctx context.Context, id string) error {
	err := c.engine.Stop(ctx, criKey(id))
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// RemoveSandbox undoes all steps of a sandbox.
func (c *Controller) RemoveSandbox(ctx context.Context, id string) error {
	return c.engine.Remove(ctx, criKey(id))
}
