package integration

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestManyPodsInParallel runs many pods at a time on a daemon with the race detector.
func TestManyPodsInParallel(t *testing.T) {
	const parallel = 8
	pods := 40
	if full() {
		pods = 100
	}
	n := harness.StartNode(t, harness.Config{Daemon: harness.PodfsmRace})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	start := time.Now()
	var mu sync.Mutex
	byIP := map[string]*harness.Pod{}
	atOnce(t, pods, parallel, func(ctx context.Context, i int) error {
		pod, ip, err := runReady(ctx, n, fmt.Sprintf("pod-%d", i))
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		byIP[ip] = pod
		return nil
	})
	require.Len(t, byIP, pods, "every pod has an address of its own")
	ready, err := n.Runtime.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{
		State: &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY},
	}})
	require.NoError(t, err)
	require.Len(t, ready.GetItems(), pods)
	t.Logf("%d pods with a container are up after %.1f s", pods, time.Since(start).Seconds())

	start = time.Now()
	running := slices.Collect(maps.Values(byIP))
	atOnce(t, pods, parallel, func(ctx context.Context, i int) error { return running[i].StopAndRemove(ctx) })
	t.Logf("they are gone after %.1f s", time.Since(start).Seconds())
	n.RequireClean(t, before)
}

// runReady runs a pod with a container and returns it with its address. Errors name the pod.
func runReady(ctx context.Context, n *harness.Node, name string) (*harness.Pod, string, error) {
	pod, err := n.RunPod(ctx, harness.PodfsmHandler, n.PodConfig(name))
	if err != nil {
		return nil, "", fmt.Errorf("pod %q: %w", name, err)
	}
	container, err := pod.StartContainer(ctx, "main")
	if err != nil {
		return nil, "", fmt.Errorf("container of pod %q: %w", name, err)
	}
	running, err := container.Status(ctx)
	if err != nil {
		return nil, "", fmt.Errorf("container of pod %q: %w", name, err)
	}
	ready, err := pod.Status(ctx)
	if err != nil {
		return nil, "", fmt.Errorf("pod %q: %w", name, err)
	}
	if running.GetState() != runtime.ContainerState_CONTAINER_RUNNING || ready.GetState() != runtime.PodSandboxState_SANDBOX_READY {
		return nil, "", fmt.Errorf("pod %q is %s, its container %s", name, ready.GetState(), running.GetState())
	}
	return pod, ready.GetNetwork().GetIp(), nil
}
