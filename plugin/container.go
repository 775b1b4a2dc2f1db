package plugin

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/snapshot"
)

// PrepareContainer prepares the snapshot layers of a container's root filesystem, before
// containerd's service makes the container, and starts the pod's shim in parallel. For an unknown
// sandbox or image it does nothing: containerd's service reports the error.
func (c *Controller) PrepareContainer(ctx context.Context, id, image string) (release func(), err error) {
	nothing := func() {}
	if c.engine == nil {
		return nothing, c.degradedError()
	}
	view, err := c.engine.Get(criKey(id))
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
		if err != nil { // the start of the container retries and returns the error
			log.G(ctx).WithError(err).Debugf("failed to start the shim of sandbox %q before its container", id)
		}
	}()
	return func() { unpinned(); <-started }, nil
}

// prepareRootFS prepares the layers of a container's root filesystem in podfsm's snapshotter.
func (c *Controller) prepareRootFS(ctx context.Context, view lifecycle.View, image string) (release func(), err error) {
	nothing := func() {}
	spec, mapped := view.Spec.(*Spec), records.MappingsOf(view)
	if mapped == nil || spec.Snapshotter != Name {
		return nothing, nil
	}
	found, err := c.node.image(ctx, image)
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

// startShim starts the pod's shim if it doesn't run. The caller holds the pod's lock, see
// [podTasks].
func (c *Controller) startShim(ctx context.Context, key ledger.Key) error {
	if c.node.shims.Running(namespaces.WithNamespace(ctx, key.Namespace), key.ID) {
		return nil
	}
	return c.engine.Demand(ctx, key, StartShim)
}

// sandboxOf returns the id of the sandbox in containerd's record of a container, "" if there is no
// such record or no sandbox in it.
func (n *node) sandboxOf(ctx context.Context, container string) (string, error) {
	record, err := n.client.ContainerService().Get(ctx, container)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", fmt.Errorf("failed to find the pod of container %q: %w", container, err)
	}
	return record.SandboxID, nil
}
