package pause

import (
	"context"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// Containers keeps the records of pause containers in containerd's store, through which cAdvisor, ctr and other clients
// see a container. A container's id is its sandbox's. No runtime runs it.
//
// Its methods take a context with a containerd namespace, and are safe for concurrent use on different sandboxes. Their errors keep
// containerd's classes.
type Containers struct{ client *containerd.Client }

// NewContainers returns the pause containers of a containerd client.
func NewContainers(client *containerd.Client) Containers { return Containers{client} }

// CreateRequest says how to make the record of a pause container.
type CreateRequest struct {
	ID string

	// Spec is from Settings.Spec. Its Opts are applied to its OCI.
	Spec *Spec

	// Labels are from the function Labels.
	Labels map[string]string

	// ImageName is the name of the pause image in containerd's image store.
	ImageName string

	// Snapshotter and SnapshotKey name the rootfs, which exists.
	Snapshotter string
	SnapshotKey string

	// Runtime is the runtime's type, as "io.containerd.runc.v2".
	Runtime string

	// RuntimeOptions are the runtime's, nil for its defaults.
	RuntimeOptions typeurl.Any
}

// Create makes the record of a pause container and returns it as stored. It
// starts no process. A record with that id is an AlreadyExists error.
func (c Containers) Create(ctx context.Context, r CreateRequest) (containers.Container, error) {
	record, err := c.build(ctx, r)
	if err != nil {
		return containers.Container{}, fmt.Errorf("failed to create the pause container of sandbox %q: %w", r.ID, err)
	}
	// The client's NewContainer also takes and deletes a lease, which costs two transactions of the metadata store. The
	// lease protects new objects from the garbage collector, but Create makes none.
	stored, err := c.client.ContainerService().Create(ctx, record)
	if err != nil {
		return containers.Container{}, fmt.Errorf("failed to create the pause container of sandbox %q: %w", r.ID, err)
	}
	return stored, nil
}

// build completes a record. The specification's options read the image's /etc/passwd and /etc/group. An image may
// have pipes in their place, which block the reader forever. When ctx ends, build leaves a blocked reader behind.
func (c Containers) build(ctx context.Context, r CreateRequest) (containers.Container, error) {
	type built struct {
		record containers.Container
		err    error
	}
	done := make(chan built, 1)
	go func() {
		record := containers.Container{ID: r.ID}
		var err error
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
			}
			done <- built{record, err}
		}()
		err = c.apply(ctx, r, &record)
	}()
	select {
	case b := <-done:
		return b.record, b.err
	case <-ctx.Done():
		return containers.Container{}, context.Cause(ctx)
	}
}

func (c Containers) apply(ctx context.Context, r CreateRequest, record *containers.Container) error {
	for _, apply := range []containerd.NewContainerOpts{
		containerd.WithSnapshotter(r.Snapshotter),
		containerd.WithSnapshot(r.SnapshotKey),
		containerd.WithImageName(r.ImageName),
		containerd.WithContainerLabels(r.Labels),
		containerd.WithRuntime(r.Runtime, r.RuntimeOptions),
		// After the snapshot, where the spec's options look up the user.
		containerd.WithSpec(r.Spec.OCI, r.Spec.Opts...),
	} {
		if err := apply(ctx, c.client, record); err != nil {
			return err
		}
	}
	return nil
}

// Get returns the record of a pause container, or a NotFound error.
func (c Containers) Get(ctx context.Context, id string) (containers.Container, error) {
	record, err := c.client.ContainerService().Get(ctx, id)
	if err != nil {
		return containers.Container{}, fmt.Errorf("failed to get the pause container of sandbox %q: %w", id, err)
	}
	return record, nil
}

// Delete deletes the record of a pause container. The snapshot stays. It succeeds when there is none.
func (c Containers) Delete(ctx context.Context, id string) error {
	err := c.client.ContainerService().Delete(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("failed to delete the pause container of sandbox %q: %w", id, err)
	}
	return nil
}
