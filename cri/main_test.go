package cri

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stock stands for containerd's CRI service: what a test doesn't set is not implemented.
type stock struct {
	runtime.UnimplementedRuntimeServiceServer
	runtime.UnimplementedImageServiceServer

	run     func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error)
	stop    func(context.Context, *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error)
	remove  func(context.Context, *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error)
	status  func(context.Context, *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error)
	events  func(*runtime.GetEventsRequest, runtime.RuntimeService_GetContainerEventsServer) error
	forward func(context.Context, *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error)
	pull    func(context.Context, *runtime.PullImageRequest) (*runtime.PullImageResponse, error)
	create  func(context.Context, *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error)
	start   func(context.Context, *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error)

	runtimeStatus   *runtime.StatusResponse
	containerStatus *runtime.ContainerStatusResponse

	stats   []*runtime.PodSandboxStats
	metrics []*runtime.PodSandboxMetrics
	statErr error

	noPause bool // the pause image isn't there

	listed        []string // ids of sandboxes, made at the second 1
	uninitialized bool
	closed        int
}

func (s *stock) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	return s.run(ctx, r)
}

func (s *stock) StopPodSandbox(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	return s.stop(ctx, r)
}

func (s *stock) RemovePodSandbox(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	return s.remove(ctx, r)
}

func (s *stock) PodSandboxStatus(ctx context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	return s.status(ctx, r)
}

func (s *stock) GetContainerEvents(r *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
	return s.events(r, stream)
}

func (s *stock) PortForward(ctx context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	return s.forward(ctx, r)
}

func (s *stock) CreateContainer(ctx context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	return s.create(ctx, r)
}

func (s *stock) StartContainer(ctx context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	return s.start(ctx, r)
}

func (s *stock) Status(context.Context, *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	return s.runtimeStatus, nil
}

func (s *stock) ContainerStatus(context.Context, *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	return s.containerStatus, nil
}

// PodSandboxStats has those of the first sandbox for a request without an id that it knows.
func (s *stock) PodSandboxStats(_ context.Context, r *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	if s.statErr != nil {
		return nil, s.statErr
	}
	named := slices.IndexFunc(s.stats, func(one *runtime.PodSandboxStats) bool { return statsID(one) == r.GetPodSandboxId() })
	return &runtime.PodSandboxStatsResponse{Stats: s.stats[max(named, 0)]}, nil
}

// ListPodSandboxStats gives what it has along with its error, as containerd's does.
func (s *stock) ListPodSandboxStats(context.Context, *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	return &runtime.ListPodSandboxStatsResponse{Stats: s.stats}, s.statErr
}

func (s *stock) ListPodSandboxMetrics(context.Context, *runtime.ListPodSandboxMetricsRequest) (*runtime.ListPodSandboxMetricsResponse, error) {
	return &runtime.ListPodSandboxMetricsResponse{PodMetrics: s.metrics}, s.statErr
}

func (s *stock) StreamPodSandboxMetrics(_ *runtime.StreamPodSandboxMetricsRequest, stream runtime.RuntimeService_StreamPodSandboxMetricsServer) error {
	return stream.Send(&runtime.StreamPodSandboxMetricsResponse{PodSandboxMetrics: s.metrics})
}

// ImageStatus knows every image, unless a test takes the pause image away.
func (s *stock) ImageStatus(_ context.Context, r *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	if s.noPause && r.GetImage().GetImage() == pauseImage {
		return &runtime.ImageStatusResponse{}, nil
	}
	return &runtime.ImageStatusResponse{Image: &runtime.Image{Id: r.GetImage().GetImage()}}, nil
}

func (s *stock) PullImage(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	return s.pull(ctx, r)
}

// ListPodSandbox finds a sandbox by the start of its id when that is unambiguous, as containerd's does.
func (s *stock) ListPodSandbox(_ context.Context, r *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	wanted := r.GetFilter().GetId()
	var found []*runtime.PodSandbox
	for _, id := range s.listed {
		if len(id) >= len(wanted) && id[:len(wanted)] == wanted {
			found = append(found, &runtime.PodSandbox{Id: id, CreatedAt: time.Second.Nanoseconds()})
		}
	}
	if wanted != "" && len(found) != 1 {
		found = nil
	}
	return &runtime.ListPodSandboxResponse{Items: found}, nil
}

func (s *stock) StreamPodSandboxes(_ *runtime.StreamPodSandboxesRequest, stream runtime.RuntimeService_StreamPodSandboxesServer) error {
	for _, id := range s.listed {
		item := &runtime.PodSandbox{Id: id, CreatedAt: time.Second.Nanoseconds()}
		if err := stream.Send(&runtime.StreamPodSandboxesResponse{PodSandboxes: []*runtime.PodSandbox{item}}); err != nil {
			return err
		}
	}
	return nil
}

func (s *stock) Close() error {
	s.closed++
	return nil
}

func (s *stock) IsInitialized() bool { return !s.uninitialized }

// controller stands for podfsm's: pods of the handler "podfsm" are its own.
type controller struct {
	pods       map[string]Sandbox
	containers map[string]string // the sandbox's id by the container's
	lookErr    error             // of a look for the pod of a container
	admitErr   error
	stop       func(ctx context.Context, id string) error
	remove     func(ctx context.Context, id string) error
	settle     func(ctx context.Context, id string) error
	calls      []string
	heard      []string // of pods of other handlers
	admitted   *runtime.ContainerConfig

	unclaimed []string
	released  atomic.Int32 // what PrepareContainer has returned

	mu     sync.Mutex
	named  map[attempt]Sandbox
	claims map[string]lifecycle.Claim
	// The events of retries, and "created" or "failed" for each creation.
	counted []RetryEvent
}

// PrepareContainer refuses the image "unmapped".
func (c *controller) PrepareContainer(_ context.Context, _, image string) (func(), error) {
	if image == "unmapped" {
		return func() {}, fmt.Errorf("uid 70000 isn't mapped: %w", errdefs.ErrFailedPrecondition)
	}
	return func() { c.released.Add(1) }, nil
}

// AdmitContainer refuses those that are privileged.
func (c *controller) AdmitContainer(_ context.Context, id string, config *runtime.ContainerConfig) error {
	c.calls = append(c.calls, "admit "+id)
	c.admitted = config
	if config.GetLinux().GetSecurityContext().GetPrivileged() {
		return fmt.Errorf("container %q is privileged: %w", config.GetMetadata().GetName(), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (c *controller) Created(_ time.Duration, err error) {
	what := RetryEvent("created")
	if err != nil {
		what = "failed"
	}
	c.CountRetry(what)
}

func (c *controller) CountRetry(event RetryEvent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counted = append(c.counted, event)
}

// events are what it has counted, in order.
func (c *controller) events() []RetryEvent {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.counted)
}

func (c *controller) StatusInfo() (map[string]string, error) {
	return map[string]string{"podfsm": "of podfsm"}, nil
}

const pauseImage = "example/pause:1"

func (c *controller) PauseImage() string { return pauseImage }

func (c *controller) Ours(handler string) (bool, error) {
	switch handler {
	case "podfsm":
		return true, nil
	case "", "runc":
		return false, nil
	default:
		return false, errUnknownHandler
	}
}

func (c *controller) Admit(context.Context, string, *runtime.PodSandboxConfig) error {
	return c.admitErr
}

func (c *controller) CreatedAt(id string) time.Time {
	pod, _ := c.Sandbox(id)
	return pod.CreatedAt
}

func (c *controller) Sandbox(id string) (Sandbox, bool) {
	pod, ok := c.pods[id]
	return pod, ok
}

func (c *controller) SandboxOfContainer(_ context.Context, id string) (Sandbox, bool, error) {
	c.note("pod of container " + id)
	pod, ok := c.Sandbox(c.containers[id])
	return pod, ok, c.lookErr
}

// note keeps what was called.
func (c *controller) note(call string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, call)
}

func (c *controller) Named(m *runtime.PodSandboxMetadata) (Sandbox, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pod, ok := c.named[attemptOf(&runtime.PodSandboxConfig{Metadata: m})]
	return pod, ok
}

func (c *controller) WaitQueued(ctx context.Context, id string) error {
	if c.settle == nil {
		return nil
	}
	return c.settle(ctx, id)
}

func (c *controller) Claim(_ context.Context, id string, claim lifecycle.Claim) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.claims[id] == lifecycle.Discarded {
		return false
	}
	if c.claims == nil {
		c.claims = map[string]lifecycle.Claim{}
	}
	c.claims[id] = max(c.claims[id], claim)
	return true
}

func (c *controller) Discard(id string, most lifecycle.Claim) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.claims[id] <= most {
		if c.claims == nil {
			c.claims = map[string]lifecycle.Claim{}
		}
		c.claims[id] = lifecycle.Discarded
	}
	return c.claims[id] == lifecycle.Discarded
}

func (c *controller) Unclaimed() []string { return c.unclaimed }

func (c *controller) StopSandbox(ctx context.Context, id string) error {
	c.note("stop " + id)
	if c.stop == nil {
		return nil
	}
	return c.stop(ctx, id)
}

func (c *controller) RemoveSandbox(ctx context.Context, id string) error {
	c.note("remove " + id)
	if c.remove == nil {
		return nil
	}
	return c.remove(ctx, id)
}

func (c *controller) StockRuns(*runtime.PodSandboxConfig) func(string) {
	c.heard = append(c.heard, "stock runs")
	return func(id string) { c.heard = append(c.heard, "stock ran "+id) }
}

func (c *controller) StockRemoved(id string) { c.heard = append(c.heard, "stock removed "+id) }

// newFront is a front alone, without retries before it. It ends with the test.
func newFront(t *testing.T, s *stock, c *controller) *service {
	front := newService(inner{s, s}, c, Streaming{Address: "127.0.0.1"})
	t.Cleanup(func() { require.NoError(t, front.Close()) })
	return front
}

// newCRI is the service that callers meet: retries before a front. It ends with the test.
func newCRI(t *testing.T, s *stock, c *controller) *retries {
	return retriesBefore(t, newFront(t, s, c), c)
}

// retriesBefore are retries before any CRI service. They end with the test.
func retriesBefore(t *testing.T, front runtime.RuntimeServiceServer, c *controller) *retries {
	r := newRetries(front, c, func() bool { return true }, time.Hour)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// recordSpans makes the global tracer provider one that keeps what has ended.
func recordSpans(t *testing.T) *tracetest.SpanRecorder {
	recorder := tracetest.NewSpanRecorder()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)))
	t.Cleanup(func() { otel.SetTracerProvider(before) })
	return recorder
}
