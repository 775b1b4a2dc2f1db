package leaks

import (
	"context"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// Containers returns the names by which CNI plugins may know a container of this containerd, from
// all containerd namespaces. It includes the names that ctr and nerdctl give to plugins.
func Containers(ctx context.Context, client *containerd.Client) (map[string]bool, error) {
	known := map[string]bool{}
	all, err := client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to list containerd's namespaces: %w", err)
	}
	for _, namespace := range all {
		stored, err := client.ContainerService().List(namespaces.WithNamespace(ctx, namespace))
		if err != nil {
			return nil, fmt.Errorf("failed to list containerd's containers: %w", err)
		}
		for _, container := range stored {
			known[container.ID], known[namespace+"-"+container.ID] = true, true
		}
	}
	return known, nil
}
