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

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// idHost implements [userns.Host] by the engine, containerd and the host.
type idHost struct{ *Controller }

// Standing returns whether a holder's sandbox lives, has ended or is gone.
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

// stockStanding looks up a sandbox of another controller in containerd's store.
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

// Uses returns the uses of ids by processes, mounts and snapshots.
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

// snapshots returns the uses of ids by snapshots that containerd mounts with id maps. A label alone
// proves nothing, because containerd copies labels from the annotations of pods and images. So
// image layers count as unused, and if a snapshot has a container, the container's spec decides.
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
				continue // not loaded, so it has no snapshots
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

// useOfSnapshot returns the ids in the spec of a snapshot's container, or in its labels if it has
// no container.
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
		return useOfLabels(info), nil // writing such a container takes root anyway
	}
	given.By = fmt.Sprintf("snapshot %q", info.Name)
	return given, nil
}

// idsOfContainer returns the ids that a container was given by its spec; false if the spec is
// unreadable.
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

// useOfLabels returns the ids in a snapshot's labels. Invalid labels count as no ids: containerd
// can't mount such a snapshot either.
func useOfLabels(info snapshots.Info) userns.Use {
	uids, uidErr := userns.ParseLabel(info.Labels[snapshots.LabelSnapshotUIDMapping])
	gids, gidErr := userns.ParseLabel(info.Labels[snapshots.LabelSnapshotGIDMapping])
	if uidErr != nil || gidErr != nil {
		return userns.Use{}
	}
	return userns.Use{UIDs: uids, GIDs: gids, By: fmt.Sprintf("snapshot %q", info.Name)}
}

// holderID returns the id of a sandbox as a holder of ids.
func holderID(key ledger.Key) string { return key.Namespace + "/" + key.ID }

func keyOfHolder(id string) (ledger.Key, error) {
	namespace, id, ok := strings.Cut(id, "/")
	if !ok {
		return ledger.Key{}, fmt.Errorf("%q is not the id of a holder: %w", id, errdefs.ErrInternal)
	}
	return ledger.Key{Namespace: namespace, ID: id}, nil
}

// passingID is the prefix of holders whose sandbox containerd's service is still making, so that
// its id is unknown.
const passingID = "passing-"

// mappingsOfRecord returns the id mappings of a sandbox by containerd's record: those of pause if
// it was started, else those of the request, nil in the host's user namespace.
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
