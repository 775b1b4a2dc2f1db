package plugin

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
)

var _ cri.Sandboxes = (*Controller)(nil)

// PauseImage is the reference of the pause image, as containerd's configuration pins it.
func (c *Controller) PauseImage() string { return c.stock.pauseImage() }

// Pod is a sandbox of ours that came by CRI, for the front.
func (c *Controller) Pod(id string) (cri.Pod, bool) {
	if c.engine == nil {
		return cri.Pod{}, false
	}
	view, ok := c.find(inFront(id))
	if !ok {
		return cri.Pod{}, false
	}
	return podOf(view), true
}

// PodOfContainer is the sandbox of ours that a container is in, by containerd's record of the container, for the front.
func (c *Controller) PodOfContainer(ctx context.Context, id string) (cri.Pod, bool, error) {
	if c.engine == nil {
		return cri.Pod{}, false, nil
	}
	sandbox, err := c.node.sandboxOf(ctx, id)
	if err != nil {
		return cri.Pod{}, false, err
	}
	pod, ok := c.Pod(sandbox)
	return pod, ok, nil
}

// CreatedAt is when a sandbox was begun, for the front.
func (c *Controller) CreatedAt(id string) time.Time {
	if c.engine == nil {
		return time.Time{}
	}
	return c.engine.Created(inFront(id))
}

// Named is the sandbox of a pod's attempt, for the front.
func (c *Controller) Named(metadata *runtime.PodSandboxMetadata) (cri.Pod, bool) {
	if c.engine == nil {
		return cri.Pod{}, false
	}
	view, ok := c.engine.Named(nameOf(cri.Namespace, metadata))
	if !ok {
		return cri.Pod{}, false
	}
	return podOf(view), true
}

// podOf is a sandbox as the front knows it.
func podOf(view lifecycle.View) cri.Pod {
	spec := view.Spec.(*Spec)
	pod := cri.Pod{
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

// inFront is the key of a sandbox that came by CRI.
func inFront(id string) journal.Key { return journal.Key{Namespace: cri.Namespace, ID: id} }

// Settle waits for what is under way for a sandbox, for the front.
func (c *Controller) Settle(ctx context.Context, id string) error {
	return c.engine.Settle(ctx, inFront(id))
}

// Claim marks a sandbox as shown or taken, for the front.
func (c *Controller) Claim(ctx context.Context, id string, claim lifecycle.Claim) bool {
	return c.engine == nil || c.engine.Claim(ctx, inFront(id), claim)
}

// Discard marks a sandbox as discarded, for the front.
func (c *Controller) Discard(id string, most lifecycle.Claim) bool {
	return c.engine != nil && c.engine.Discard(inFront(id), most)
}

// Unclaimed are the finished sandboxes that nobody has claimed, for the front.
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

// finished says that a sandbox's creation has come to its end, and nobody has ended the sandbox yet.
func finished(view lifecycle.View) bool {
	return view.State == states.Ready || view.State == states.NotReady
}

// StopPod takes a sandbox off its network, for the front.
func (c *Controller) StopPod(ctx context.Context, id string) error {
	err := c.engine.Stop(ctx, inFront(id))
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// RemovePod undoes whatever there is of a sandbox, for the front.
func (c *Controller) RemovePod(ctx context.Context, id string) error {
	return c.engine.Remove(ctx, inFront(id))
}
