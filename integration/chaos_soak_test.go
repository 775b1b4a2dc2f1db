package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestSoak kills containerd at random moments while pods are created, stopped and removed in
// parallel, and during recovery. A seed repeats the decisions, but not the timing of the machine.
func TestSoak(t *testing.T) {
	rounds := 8
	if full() {
		rounds = 200
	}
	from := takeSeed(t)
	s := &soak{n: harness.StartNode(t, harness.Config{}), interrupted: map[string]int{}}
	before, err := s.n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for round := range rounds {
		random := rand.New(rand.NewPCG(from, uint64(round)))
		s.killChurn(t, random, round)
		if random.IntN(4) == 0 {
			s.killRecovery(t, random)
		}
		requireSound(t, s.n)
		if last := round == rounds-1; last || random.IntN(3) > 0 {
			removePods(t, s.n)
			settled(t, s.n)
			s.requireClean(t, before)
		} // the next round starts with the remaining pods
	}
	t.Logf("under way at the kills: %v", s.interrupted)
	if full() {
		for _, call := range []string{"create", "container", "stop", "remove"} {
			require.NotZero(t, s.interrupted[call], "no kill has hit a %s: %v", call, s.interrupted)
		}
	}
}

type soak struct {
	n *harness.Node

	mu          sync.Mutex
	interrupted map[string]int // how often a kill came while this was under way
}

// killChurn kills containerd while workers run and remove pods, first those of the round before.
func (s *soak) killChurn(t *testing.T, random *rand.Rand, round int) {
	const workers = 4
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	takenOver := make([][]*harness.Pod, workers)
	for i, item := range listed(t, s.n) {
		takenOver[i%workers] = append(takenOver[i%workers], s.n.FindPod(item.GetId(), nil))
	}
	var churning sync.WaitGroup
	for i := range workers {
		own := rand.New(rand.NewPCG(random.Uint64(), uint64(i)))
		churning.Go(func() {
			for _, pod := range takenOver[i] {
				if !s.end(ctx, pod, own) {
					return
				}
			}
			for pod := 0; s.churn(ctx, own, fmt.Sprintf("pod-%d-%d-%d", round, i, pod)); pod++ {
			}
		})
	}
	<-time.After(time.Duration(random.IntN(1200)) * time.Millisecond)
	require.NoError(t, s.n.Kill(t.Context()))
	cancel()
	churning.Wait()
	require.NoError(t, s.n.Start(t.Context()))
}

// killRecovery kills containerd during the recovery from the kill before.
func (s *soak) killRecovery(t *testing.T, random *rand.Rand) {
	<-time.After(time.Duration(random.IntN(100)) * time.Millisecond)
	require.NoError(t, s.n.Kill(t.Context()))
	require.NoError(t, s.n.Start(t.Context()))
}

// churn runs and removes a pod of a random kind with some containers. It is false if containerd was
// killed.
func (s *soak) churn(ctx context.Context, random *rand.Rand, name string) bool {
	kinds := []harness.PodOption{func(*runtime.PodSandboxConfig) {}, harness.HostUsers(), harness.HostNetwork()}
	config := s.n.PodConfig(name, kinds[random.IntN(len(kinds))])
	containers := random.IntN(3)
	var pod *harness.Pod
	ok := s.call("create", func() (err error) {
		pod, err = s.n.RunPod(ctx, harness.PodfsmHandler, config)
		return err
	})
	for i := 0; ok && i < containers; i++ {
		ok = s.call("container", func() error {
			_, err := pod.StartContainer(ctx, fmt.Sprint("c", i))
			return err
		})
	}
	return ok && s.end(ctx, pod, random)
}

// end stops and removes a pod, or removes it as it is.
func (s *soak) end(ctx context.Context, pod *harness.Pod, random *rand.Rand) bool {
	if random.IntN(4) > 0 && !s.call("stop", func() error { return pod.Stop(ctx) }) {
		return false
	}
	return s.call("remove", func() error { return pod.Remove(ctx) })
}

// call counts the calls that fail: by a kill, because nothing else makes them.
func (s *soak) call(what string, f func() error) bool {
	if err := f(); err == nil {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.interrupted[what]++
	return false
}

// requireSound requires that ready pods have an address if they need one.
func requireSound(t *testing.T, n *harness.Node) {
	t.Helper()
	for _, item := range listed(t, n) {
		if item.GetState() != runtime.PodSandboxState_SANDBOX_READY {
			continue
		}
		status, err := n.FindPod(item.GetId(), nil).Status(t.Context())
		require.NoError(t, err)
		onNode := status.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtime.NamespaceMode_NODE
		require.Equal(t, onNode, status.GetNetwork().GetIp() == "", "%v", status)
	}
}

// requireClean requires that podfsm leaves nothing, and removes at each look what containerd leaves.
func (s *soak) requireClean(t *testing.T, before harness.Census) {
	t.Helper()
	var err error
	eventually(func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		removed := removeContainers(t.Context(), s.n)
		err = errors.Join(s.n.WaitClean(ctx, before), removed)
		return err == nil
	})
	require.NoError(t, err)
}

// removeContainers removes what containerd's own service leaves of a container when it is killed
// during the start or end of the container: its cgroup, which the kubelet would remove with that of
// the pod, its bundle, the lease on its snapshot, which expires after a day, and what runc has of
// it, which containerd gives up after five seconds. podfsm removes those of pause.
func removeContainers(ctx context.Context, n *harness.Node) error {
	ctx = namespaces.WithNamespace(ctx, "k8s.io")
	log := n.Log()
	var errs []error
	// ofContainers calls remove for the files of a pattern that are named after a container.
	ofContainers := func(pattern string, remove func(file, id string) error) {
		files, err := filepath.Glob(pattern)
		errs = append(errs, err)
		for _, file := range files {
			id := strings.TrimPrefix(filepath.Base(file), ".")
			if strings.Contains(log, fmt.Sprintf(`Generated id \"%s\" for container`, id)) {
				errs = append(errs, remove(file, id))
			}
		}
	}
	runc := filepath.Join(n.Dir(), "state/runc/k8s.io")
	ofContainers(filepath.Join(runc, "*"), func(_, id string) error {
		if _, err := n.Containerd.ContainerService().Get(ctx, id); !errdefs.IsNotFound(err) {
			return err
		}
		_, err := n.Command(ctx, n.Program("runc"), "--root", runc, "delete", "--force", id)
		return err
	})
	ofContainers(filepath.Join("/sys/fs/cgroup/*", filepath.Base(n.Dir()), "pod*", "*"), func(dir, _ string) error { return os.Remove(dir) })
	ofContainers(filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io/.*"), func(bundle, _ string) error { return os.RemoveAll(bundle) })
	held, err := n.Containerd.LeasesService().List(ctx)
	errs = append(errs, err)
	for _, lease := range held {
		if _, expires := lease.Labels["containerd.io/gc.expire"]; expires {
			errs = append(errs, n.Containerd.LeasesService().Delete(ctx, lease))
		}
	}
	return errors.Join(errs...)
}
