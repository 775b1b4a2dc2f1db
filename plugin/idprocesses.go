package plugin

import (
	"cmp"
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/userns"
)

// Processes returns the uses of ids by processes. A process in a container counts only for the ids
// that the container was given. Otherwise a pod on the node's users could exhaust the pool: with
// CAP_SETUID its processes run as any user, and map any ids.
//
// The container of a process is found by its cgroup, which a pod can't leave. A process outside of
// all known containers counts for all its ids, because the record of a living pod may be lost.
func (h idHost) Processes(ctx context.Context) ([]userns.Use, error) {
	processes, err := userns.Processes(ctx)
	if err != nil || len(processes) == 0 {
		return nil, err
	}
	known, err := h.containersByID(ctx)
	if err != nil {
		return nil, err
	}
	var uses []userns.Use
	for _, p := range processes {
		cgroup, err := host.Read(ctx, p.Pid, "cgroup")
		if errdefs.IsNotFound(err) {
			continue // the process has ended
		}
		if err != nil {
			return nil, err
		}
		if use := useOf(p, containersOf(host.ParseCgroups(cgroup), known)); len(use.UIDs) > 0 || len(use.GIDs) > 0 {
			uses = append(uses, use)
		}
	}
	return uses, nil
}

// containersByID returns the containers of all containerd namespaces by id. Several namespaces may
// have the same id.
func (h idHost) containersByID(ctx context.Context) (map[string][]containers.Container, error) {
	all, err := h.node.client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's namespaces: %w", err)
	}
	byID := map[string][]containers.Container{}
	for _, namespace := range all {
		stored, err := h.node.client.ContainerService().List(namespaces.WithNamespace(ctx, namespace))
		if err != nil {
			return nil, fmt.Errorf("failed to list containerd's containers: %w", err)
		}
		for _, container := range stored {
			byID[container.ID] = append(byID[container.ID], container)
		}
	}
	return byID, nil
}

// containersOf returns the containers that a process is in, by its cgroups.
func containersOf(cgroups map[string]string, known map[string][]containers.Container) []containers.Container {
	id, _ := host.ContainerOf(cgroups, func(id string) bool { return known[id] != nil })
	return known[id]
}

// useOf returns the ids that a process uses and its containers have. For a process in no container,
// or in a container with unknown ids, it returns all ids that the process uses.
func useOf(p userns.Process, in []containers.Container) userns.Use {
	use := p.Use
	for i, container := range in {
		given, ok := idsOfContainer(container)
		if !ok {
			return p.Use
		}
		part := p.Within(given.UIDs, given.GIDs)
		if i == 0 {
			use = userns.Use{By: p.By + " of " + podOfContainer(container)}
		}
		use.UIDs, use.GIDs = append(use.UIDs, part.UIDs...), append(use.GIDs, part.GIDs...)
	}
	return use
}

// podOfContainer names the pod of a container in messages, or the container if it is in no pod.
func podOfContainer(container containers.Container) string {
	namespace, name := container.Labels["io.kubernetes.pod.namespace"], container.Labels["io.kubernetes.pod.name"]
	if name == "" {
		return fmt.Sprintf("container %q", container.ID)
	}
	return fmt.Sprintf("pod %s/%s", cmp.Or(namespace, "default"), name)
}
