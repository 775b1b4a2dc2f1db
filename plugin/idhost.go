package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// idHost looks at the host, containerd and the engine for the allocator of ids.
type idHost struct{ *Controller }

// Standing is what has become of a holder's sandbox.
func (h idHost) Standing(ctx context.Context, holder userns.Holder) (userns.Standing, error) {
	key, err := keyOfHolder(holder.ID)
	if err != nil {
		return userns.Lives, err
	}
	if holder.Origin == userns.OriginStock {
		return h.stockStanding(namespaces.WithNamespace(ctx, key.Namespace), key.ID)
	}
	view, err := h.engine.Get(key)
	switch {
	case errdefs.IsNotFound(err):
		return userns.Gone, nil
	case err != nil:
		return userns.Lives, err
	case view.State == states.Stopped || view.State == states.Removing:
		return userns.Ended, nil
	default:
		return userns.Lives, nil
	}
}

// stockStanding asks containerd's store for a sandbox of another controller.
func (h idHost) stockStanding(ctx context.Context, id string) (userns.Standing, error) {
	if strings.HasPrefix(id, passingID) {
		return userns.Lives, nil
	}
	if _, err := h.node.client.SandboxStore().Get(ctx, id); errdefs.IsNotFound(err) {
		return userns.Gone, nil
	} else if err != nil {
		return userns.Lives, fmt.Errorf("failed to look for sandbox %q: %w", id, err)
	}
	response, err := h.node.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	err = errgrpc.ToNative(err)
	switch {
	case errdefs.IsNotFound(err):
		return userns.Ended, nil
	case err != nil:
		return userns.Lives, fmt.Errorf("failed to get the task of sandbox %q: %w", id, err)
	case response.GetProcess().GetStatus() == task.Status_STOPPED:
		return userns.Ended, nil
	default:
		return userns.Lives, nil
	}
}

// Uses are the uses of ids by processes, mounts and snapshots.
func (h idHost) Uses(ctx context.Context) (uses []userns.Use, err error) {
	for _, look := range []func(context.Context) ([]userns.Use, error){h.Processes, userns.Mounts, h.snapshots} {
		found, err := look(ctx)
		if err != nil {
			return nil, err
		}
		uses = append(uses, found...)
	}
	return uses, nil
}

// snapshots are the uses of ids by the snapshots that containerd mounts with id maps. containerd takes labels from the annotations of
// pods, and for image layers from those of images, so a label alone proves nothing: a layer uses no ids, and where there is a container,
// its spec says what its snapshot was made for.
func (h idHost) snapshots(ctx context.Context) (uses []userns.Use, err error) {
	all, err := h.node.client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's namespaces: %w", err)
	}
	for _, namespace := range all {
		ctx := namespaces.WithNamespace(ctx, namespace)
		for _, snapshotter := range h.stock.snapshotters() {
			service := h.node.client.SnapshotService(snapshotter)
			if service == nil {
				continue // it isn't loaded, so it has none
			}
			var claiming []snapshots.Info
			err := service.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
				if info.Kind != snapshots.KindCommitted && !strings.HasPrefix(info.Name, snapshots.UnpackKeyPrefix+"-") {
					claiming = append(claiming, info)
				}
				return nil
			}, fmt.Sprintf("labels.%q", snapshots.LabelSnapshotUIDMapping))
			if err != nil {
				return nil, fmt.Errorf("failed to look at the snapshots of %q: %w", snapshotter, err)
			}
			for _, info := range claiming { // not in Walk, whose transaction is open
				use, err := h.useOfSnapshot(ctx, info)
				if err != nil {
					return nil, err
				}
				uses = append(uses, use)
			}
		}
	}
	return uses, nil
}

// useOfSnapshot is what a snapshot's container was made with; where there is none yet, or none any more, what its labels say.
func (h idHost) useOfSnapshot(ctx context.Context, info snapshots.Info) (userns.Use, error) {
	container, err := h.node.client.ContainerService().Get(ctx, info.Name)
	switch {
	case errdefs.IsNotFound(err):
		return useOfLabels(info), nil
	case err != nil:
		return userns.Use{}, fmt.Errorf("failed to look for the container of snapshot %q: %w", info.Name, err)
	}
	given, ok := idsOfContainer(container)
	if !ok {
		return useOfLabels(info), nil // who can write such a container needs no lies
	}
	given.By = fmt.Sprintf("snapshot %q", info.Name)
	return given, nil
}

// idsOfContainer are the ids that a container was given, by its spec, where that can be read.
func idsOfContainer(container containers.Container) (given userns.Use, ok bool) {
	var spec specs.Spec
	if err := json.Unmarshal(container.Spec.GetValue(), &spec); err != nil || spec.Linux == nil {
		return given, false
	}
	for _, m := range spec.Linux.UIDMappings {
		given.UIDs = append(given.UIDs, mappingOfSpec(m))
	}
	for _, m := range spec.Linux.GIDMappings {
		given.GIDs = append(given.GIDs, mappingOfSpec(m))
	}
	return given, true
}

// useOfLabels are the ids that a snapshot's labels name: none by one that can't be read, which can't be mounted either.
func useOfLabels(info snapshots.Info) userns.Use {
	uids, uidErr := userns.ParseLabel(info.Labels[snapshots.LabelSnapshotUIDMapping])
	gids, gidErr := userns.ParseLabel(info.Labels[snapshots.LabelSnapshotGIDMapping])
	if uidErr != nil || gidErr != nil {
		return userns.Use{}
	}
	return userns.Use{UIDs: uids, GIDs: gids, By: fmt.Sprintf("snapshot %q", info.Name)}
}

// holderID names a sandbox among the holders of ids.
func holderID(key journal.Key) string { return key.Namespace + "/" + key.ID }

func keyOfHolder(id string) (journal.Key, error) {
	namespace, id, ok := strings.Cut(id, "/")
	if !ok {
		return journal.Key{}, fmt.Errorf("%q names no sandbox: %w", id, errdefs.ErrInternal)
	}
	return journal.Key{Namespace: namespace, ID: id}, nil
}

// passingID starts the id of a holder whose sandbox containerd's service is making: it has no id yet that we know.
const passingID = "passing-"

// mappingsOfRecord are the id mappings of a sandbox by containerd's own record of it: those that its pause was started with, else those
// of the request; nil for one in the host's user namespace.
func mappingsOfRecord(record sandbox.Sandbox) (*userns.Mappings, error) {
	if !ran(record) {
		config, _ := requestOf(record)
		return userns.FromCRI(config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	}
	unpacked, err := typeurl.UnmarshalAny(record.Spec)
	if err != nil {
		return nil, fmt.Errorf("failed to read the spec of sandbox %q: %w", record.ID, err)
	}
	spec, ok := unpacked.(*specs.Spec)
	if !ok || spec.Linux == nil {
		return nil, nil
	}
	uids, gids := spec.Linux.UIDMappings, spec.Linux.GIDMappings
	switch {
	case len(uids) == 0 && len(gids) == 0:
		return nil, nil
	case len(uids) != 1 || len(gids) != 1:
		return nil, fmt.Errorf("sandbox %q has %d uid and %d gid mappings: %w", record.ID, len(uids), len(gids), errdefs.ErrInvalidArgument)
	}
	return &userns.Mappings{UIDs: mappingOfSpec(uids[0]), GIDs: mappingOfSpec(gids[0])}, nil
}

func mappingOfSpec(m specs.LinuxIDMapping) userns.Mapping {
	return userns.Mapping{ContainerID: m.ContainerID, HostID: m.HostID, Length: m.Size}
}
