package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/snapshot"
)

// PrepareContainer makes what the root filesystem of a container in the sandbox needs, before containerd's service makes that, and has the
// pod's shim started beside it. It is left to the service to say that the sandbox or the image isn't there.
func (c *Controller) PrepareContainer(ctx context.Context, id, image string) (release func(), err error) {
	nothing := func() {}
	if c.engine == nil {
		return nothing, c.well()
	}
	view, err := c.engine.Get(inFront(id))
	if errdefs.IsNotFound(err) {
		return nothing, nil
	}
	if err != nil {
		return nothing, err
	}
	unpinned, err := c.prepareRootFS(ctx, view, image)
	if err != nil {
		return nothing, err
	}
	started := make(chan struct{})
	go func() {
		defer close(started)
		err := lifecycle.Protect(func() error {
			_, leave, err := c.tasks.enter(ctx, view.Key)
			if err != nil {
				return err
			}
			defer leave()
			return c.startShim(ctx, view.Key)
		})
		if err != nil { // the start of the container tries again, and says what is wrong
			log.G(ctx).WithError(err).Debugf("podfsm: the shim of sandbox %q was not started beside its container", id)
		}
	}()
	return func() { unpinned(); <-started }, nil
}

// prepareRootFS has podfsm's snapshotter do its work for a container.
func (c *Controller) prepareRootFS(ctx context.Context, view lifecycle.View, image string) (release func(), err error) {
	nothing := func() {}
	spec, mapped := view.Spec.(*Spec), records.MappingsOf(view)
	if mapped == nil || spec.Snapshotter != Name {
		return nothing, nil
	}
	found, err := c.node.client.GetImage(ctx, image)
	if errdefs.IsNotFound(err) {
		return nothing, nil
	}
	if err != nil {
		return nothing, fmt.Errorf("failed to get image %q: %w", image, err)
	}
	uids, gids := mapped.Linux()
	release, err = c.node.snapshots.Ready(ctx, snapshot.Request{
		Snapshotter:            spec.Snapshotter,
		Image:                  found,
		UIDs:                   uids,
		GIDs:                   gids,
		AppendImageAnnotations: !c.stock.image.DisableSnapshotAnnotations,
	})
	if err != nil {
		return nothing, err
	}
	return release, nil
}

// startShim makes sure that a pod has the shim that runs its containers. It is for who has the pod's turn, see [podTasks].
func (c *Controller) startShim(ctx context.Context, key journal.Key) error {
	if c.node.shims.Running(namespaces.WithNamespace(ctx, key.Namespace), key.ID) {
		return nil
	}
	return c.engine.Demand(ctx, key, StartShim)
}

// sandboxOf is the sandbox that a container is in, by containerd's record of the container; "" where that says none, or isn't there.
func (n *node) sandboxOf(ctx context.Context, container string) (string, error) {
	record, err := n.client.ContainerService().Get(ctx, container)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", fmt.Errorf("failed to find the pod of container %q: %w", container, err)
	}
	return record.SandboxID, nil
}
