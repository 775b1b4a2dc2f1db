package plugin

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/userns"
)

// stockOver is containerd's CRI service as far as it calls a controller.
type stockOver struct {
	runner
	controller *Controller
	made       atomic.Int64
}

func (s *stockOver) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	id := fmt.Sprint("s", s.made.Add(1))
	if err := s.controller.Create(ctx, sandbox.Sandbox{ID: id}, sandbox.WithOptions(r.GetConfig())); err != nil {
		return nil, err
	}
	if _, err := s.controller.Start(ctx, id); err != nil {
		return nil, err
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *stockOver) StopPodSandbox(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	return &runtime.StopPodSandboxResponse{}, ignoreNotFound(s.controller.Stop(ctx, r.GetPodSandboxId()))
}

func (s *stockOver) RemovePodSandbox(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	return &runtime.RemovePodSandboxResponse{}, ignoreNotFound(s.controller.Shutdown(ctx, r.GetPodSandboxId()))
}

func (*stockOver) ListPodSandbox(context.Context, *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	return &runtime.ListPodSandboxResponse{}, nil
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// tenants are the pods whose sandboxes may have processes, by sandbox.
type tenants struct {
	mu   sync.Mutex
	of   map[string]userns.Mappings
	pods map[string]string // their uids
	bad  []string
	most int
}

func (ts *tenants) come(id, pod string, m userns.Mappings) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for other, theirs := range ts.of {
		if ts.pods[other] != pod && theirs.Overlap(m) {
			ts.bad = append(ts.bad, fmt.Sprintf("%s of %s and %s of %s share ids: %v, %v", id, pod, other, ts.pods[other], m, theirs))
		}
	}
	ts.of[id], ts.pods[id] = m, pod
	ts.most = max(ts.most, len(ts.of))
}

func (ts *tenants) leave(id string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	delete(ts.of, id)
}

// idCallers run and end pods whose ids overlap.
type idCallers struct {
	client             *criPlugin
	ran, refused, gone atomic.Int64
}

// call runs one attempt of a pod after the other, each with other ids.
func (c *idCallers) call(t *testing.T, pod int, random *rand.Rand) {
	const ranges, rounds = 3, 40
	var stopped []string
	for round := range rounds {
		first := uint32(1<<20) + uint32(random.IntN(2*ranges))*32768 // so that ranges overlap by halves, too
		config := podConfig(onNode, named(fmt.Sprint("pod", pod)), func(c *runtime.PodSandboxConfig) {
			c.Metadata.Uid, c.Metadata.Attempt = fmt.Sprint("u-", pod), uint32(round)
			options(c).UsernsOptions = userns.Mappings{
				UIDs: userns.Mapping{HostID: first, Length: 65536}, GIDs: userns.Mapping{HostID: first, Length: 65536},
			}.CRI()
		})
		if id := c.runAndStop(t, config, random); id != "" {
			stopped = append(stopped, id)
		}
		if round%4 == 3 { // late: others may have the ids of the stopped by now
			c.remove(t, stopped)
			stopped = nil
		}
	}
	c.remove(t, stopped)
}

// runAndStop returns the sandbox that it stopped, "" if the pod was refused or the caller left.
func (c *idCallers) runAndStop(t *testing.T, config *runtime.PodSandboxConfig, random *rand.Rand) string {
	ctx, cancel := context.WithTimeout(inCRI(t), time.Second+time.Duration(random.IntN(2))*time.Minute)
	defer cancel()
	if random.IntN(2) == 0 {
		time.AfterFunc(time.Duration(random.IntN(4000))*time.Microsecond, cancel)
	}
	resp, err := c.client.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: "podfsm"})
	switch {
	case err == nil:
		c.ran.Add(1)
		_, err := c.client.StopPodSandbox(inCRI(t), &runtime.StopPodSandboxRequest{PodSandboxId: resp.GetPodSandboxId()})
		require.NoError(t, err)
	case ctx.Err() != nil:
		c.gone.Add(1)
	default:
		c.refused.Add(1)
		require.Contains(t, []codes.Code{codes.InvalidArgument, codes.AlreadyExists, codes.Aborted}, grpcstatus.Code(errgrpc.ToGRPC(err)), "%v", err)
	}
	return resp.GetPodSandboxId()
}

func (c *idCallers) remove(t *testing.T, ids []string) {
	for _, id := range ids {
		_, err := c.client.RemovePodSandbox(inCRI(t), &runtime.RemovePodSandboxRequest{PodSandboxId: id})
		require.NoError(t, err)
	}
}

// Pods ask for each other's ids, while callers go away and come back, retries ask for other ids
// than the first try, and sandboxes are ended at any moment. Never do two pods have processes under
// the same ids.
func TestNoTwoPodsRunUnderTheSameIDs(t *testing.T) {
	const pods = 6
	w := newWorld(t)
	there := &tenants{of: map[string]userns.Mappings{}, pods: map[string]string{}}
	w.host.do[StartPause] = func(ctx context.Context, id string) error {
		view, err := w.engine.Get(ledger.Key{Namespace: cri.Namespace, ID: id})
		if err != nil {
			return err
		}
		there.come(id, view.Spec.(*Spec).Config.GetMetadata().GetUid(), *records.MappingsOf(view))
		select { // long enough for others to meet it
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rand.N(3 * time.Millisecond)):
			return nil
		}
	}
	w.host.ended = there.leave
	w.host.undo[StartPause] = func(id string) error {
		there.leave(id)
		return nil
	}
	stock := &stockOver{controller: w.Controller}
	callers := &idCallers{client: &criPlugin{RuntimeServiceServer: stock, ImageServiceServer: stock, Closer: &stockCRI{}}}
	require.NoError(t, cri.Install(callers.client, w.Controller, 5*time.Millisecond, cri.Streaming{}))

	var group sync.WaitGroup
	for pod := range pods {
		for caller := range 2 { // the kubelet has one, but a restarted one may meet what its predecessor began
			random := rand.New(rand.NewPCG(uint64(pod), uint64(caller)))
			group.Go(func() { callers.call(t, pod, random) })
		}
	}
	group.Wait()
	require.NoError(t, callers.client.Close())
	for _, view := range w.engine.List() {
		require.NoError(t, w.RemoveSandbox(namespaces.WithNamespace(t.Context(), cri.Namespace), view.Key.ID))
	}
	there.mu.Lock()
	defer there.mu.Unlock()
	require.Empty(t, there.bad)
	require.Empty(t, there.of)
	require.Greater(t, there.most, 1, "pods were never there together")
	for name, count := range map[string]*atomic.Int64{"ran": &callers.ran, "were refused": &callers.refused, "were left by their caller": &callers.gone} {
		require.Positive(t, count.Load(), "no pods %s", name)
	}
	overview, err := w.node.ids.Overview(t.Context())
	require.NoError(t, err)
	require.Empty(t, overview.Holders)
}
