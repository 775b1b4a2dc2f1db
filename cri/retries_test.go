package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// soon bounds everything that a test waits for, on a busy machine too.
const soon = 20 * time.Second

func asks(change ...func(*runtime.PodSandboxConfig)) *runtime.RunPodSandboxRequest {
	config := podConfig()
	for _, c := range change {
		c(config)
	}
	return &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: "podfsm"}
}

func renamed(config *runtime.PodSandboxConfig) { config.Hostname = "other" }

// runs stands for the front's way to run pods: the first run ends once release is closed, or with its context.
type runs struct {
	on      *controller // knows what was run
	count   atomic.Int32
	reached chan struct{} // closed by the first
	release chan struct{}
}

func newRuns(on *controller) *runs {
	return &runs{on: on, reached: make(chan struct{}), release: make(chan struct{})}
}

func (r *runs) run(ctx context.Context, request *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	n := r.count.Add(1)
	id := fmt.Sprintf("s%d", n)
	if n == 1 {
		close(r.reached)
		select {
		case <-r.release:
		case <-ctx.Done():
			return nil, fmt.Errorf("step start_pause of sandbox %s failed: %w", id, context.Canceled)
		}
	}
	r.on.mu.Lock()
	defer r.on.mu.Unlock()
	r.on.named = map[attempt]Sandbox{attemptOf(request.GetConfig()): {ID: id, Config: request.GetConfig(), Handler: "podfsm", State: states.Ready}}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// outcome is what RunPodSandbox has returned.
type outcome struct {
	id  string
	err error
}

func runPod(s runtime.RuntimeServiceServer, ctx context.Context, r *runtime.RunPodSandboxRequest) <-chan outcome {
	answers := make(chan outcome, 1)
	go func() {
		response, err := s.RunPodSandbox(ctx, r)
		answers <- outcome{response.GetPodSandboxId(), err}
	}()
	return answers
}

func TestCallerThatGoesLeavesTheCreationAlone(t *testing.T) {
	c := &controller{}
	r := newRuns(c)
	service := retriesBefore(t, &stock{run: r.run}, c)
	ctx, cancel := context.WithCancel(t.Context())
	first := runPod(service, ctx, asks())
	<-r.reached
	cancel()
	got := <-first
	require.ErrorIs(t, got.err, context.Canceled)
	require.ErrorContains(t, got.err, `pod "default/web"`)

	var joined []<-chan outcome
	for range 20 {
		joined = append(joined, runPod(service, t.Context(), asks(func(config *runtime.PodSandboxConfig) {
			config.Labels, config.Annotations = nil, map[string]string{"changed": "meanwhile"}
		})))
	}
	close(r.release)
	for _, answers := range joined {
		require.Equal(t, outcome{id: "s1"}, <-answers)
	}
	require.EqualValues(t, 1, r.count.Load())
	require.Equal(t, lifecycle.Taken, c.claims["s1"])
	counted := c.events()
	require.Len(t, counted, 20)
	for _, what := range counted { // a retry may come so late that the creation has ended
		require.Contains(t, []RetryEvent{RetryJoined, RetryTook}, what)
	}
}

// A sandbox that is returned to a caller whose deadline passes now may not have reached it.
func TestClaimOfACaller(t *testing.T) {
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithTimeout(t.Context(), deliveryTime/2)
	defer cancel()
	early, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	for want, contexts := range map[lifecycle.Claim][]context.Context{
		lifecycle.Unclaimed: {gone},
		lifecycle.Shown:     {late},
		lifecycle.Taken:     {early, t.Context()},
	} {
		for _, ctx := range contexts {
			require.Equal(t, want, claimOf(ctx))
		}
	}
}

func TestRequestOfAnotherShapeSupersedes(t *testing.T) {
	c := &controller{}
	r := newRuns(c)
	service := retriesBefore(t, &stock{run: r.run}, c)
	first := runPod(service, t.Context(), asks())
	<-r.reached
	require.Equal(t, outcome{id: "s2"}, <-runPod(service, t.Context(), asks(renamed)))
	got := <-first
	require.True(t, errdefs.IsAborted(got.err), "%v", got.err)
	require.ErrorContains(t, got.err, "superseded")
	require.Equal(t, []RetryEvent{RetrySuperseded}, c.events())
}

func TestSameShape(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*runtime.RunPodSandboxRequest)
		same   bool
	}{
		"nothing":     {func(*runtime.RunPodSandboxRequest) {}, true},
		"labels":      {func(r *runtime.RunPodSandboxRequest) { r.Config.Labels = nil }, true},
		"annotations": {func(r *runtime.RunPodSandboxRequest) { r.Config.Annotations["more"] = "x" }, true},
		"handler":     {func(r *runtime.RunPodSandboxRequest) { r.RuntimeHandler = "" }, false},
		"hostname":    {func(r *runtime.RunPodSandboxRequest) { r.Config.Hostname = "other" }, false},
		"DNS": {func(r *runtime.RunPodSandboxRequest) {
			r.Config.DnsConfig = &runtime.DNSConfig{Servers: []string{"10.0.0.1"}}
		}, false},
		"ids": {func(r *runtime.RunPodSandboxRequest) {
			r.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions.Uids[0].HostId++
		}, false},
		"no config": {func(r *runtime.RunPodSandboxRequest) { r.Config = nil }, false},
	} {
		other := asks()
		tc.change(other)
		require.Equal(t, tc.same, sameShape(asks(), other), name)
	}
	request := asks()
	sameShape(request, request)
	requireEqual(t, asks(), request, "it changes nothing")
}

// A sandbox that expires at the moment when a retry is given it, is not what the retry gets.
func TestDiscardedBeforeItIsTaken(t *testing.T) {
	c := &controller{pods: map[string]Sandbox{"s1": {Config: podConfig()}}}
	r := newRuns(c)
	close(r.release)
	c.claims = map[string]lifecycle.Claim{"s1": lifecycle.Discarded}
	c.remove = func(context.Context, string) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		clear(c.named)
		return nil
	}
	service := retriesBefore(t, endable(&stock{run: func(ctx context.Context, request *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		response, err := r.run(ctx, request)
		c.mu.Lock()
		defer c.mu.Unlock()
		pod := c.named[attemptOf(podConfig())]
		pod.Claim = c.claims[pod.ID]
		c.named[attemptOf(podConfig())] = pod
		return response, err
	}}, c), c)
	require.Equal(t, outcome{id: "s2"}, <-runPod(service, t.Context(), asks()))
	require.Equal(t, []string{"stop s1", "remove s1"}, c.calls)
}

// Attempts and pods don't stand in each other's way.
func TestOtherAttemptsDoNotJoin(t *testing.T) {
	c := &controller{}
	r := newRuns(c)
	service := retriesBefore(t, &stock{run: r.run}, c)
	first := runPod(service, t.Context(), asks())
	<-r.reached
	for i, change := range []func(*runtime.PodSandboxMetadata){
		func(m *runtime.PodSandboxMetadata) { m.Attempt++ },
		func(m *runtime.PodSandboxMetadata) { m.Uid = "u-2" },
		func(m *runtime.PodSandboxMetadata) { m.Name = "db" },
		func(m *runtime.PodSandboxMetadata) { m.Namespace = "other" },
	} {
		other := asks(func(config *runtime.PodSandboxConfig) { change(config.Metadata) })
		require.Equal(t, outcome{id: fmt.Sprintf("s%d", i+2)}, <-runPod(service, t.Context(), other))
	}
	close(r.release)
	require.Equal(t, outcome{id: "s1"}, <-first)
}

// What there is of the attempt already, after a restart or because it was finished without its caller.
func TestWhatIsThereAlready(t *testing.T) {
	failed := errors.New("undo of attach_network of s0 failed")
	for name, tc := range map[string]struct {
		state   states.State
		claim   lifecycle.Claim
		request *runtime.RunPodSandboxRequest
		removal error
		want    string // the id; "" for an error
		err     func(error) bool
		calls   []string
	}{
		"ready, unclaimed":              {state: states.Ready, want: "s0"},
		"ready, shown":                  {state: states.Ready, claim: lifecycle.Shown, want: "s0"},
		"ready, taken":                  {state: states.Ready, claim: lifecycle.Taken, err: errdefs.IsAlreadyExists},
		"ready, of another shape":       {state: states.Ready, claim: lifecycle.Shown, request: asks(renamed), want: "new", calls: []string{"stop s0", "remove s0"}},
		"taken, of another shape":       {state: states.Ready, claim: lifecycle.Taken, request: asks(renamed), err: errdefs.IsAlreadyExists},
		"pause exited":                  {state: states.NotReady, want: "new", calls: []string{"stop s0", "remove s0"}},
		"discarded":                     {state: states.Stopping, claim: lifecycle.Discarded, want: "new", calls: []string{"stop s0", "remove s0"}},
		"discarded, its end is pending": {state: states.Ready, claim: lifecycle.Discarded, removal: failed, err: func(err error) bool { return errors.Is(err, failed) }, calls: []string{"stop s0", "remove s0"}},
		"rolling back":                  {state: states.RollingBack, want: "new", calls: []string{"settle s0"}},
		"stopped by a caller":           {state: states.Stopped, claim: lifecycle.Shown, err: errdefs.IsAlreadyExists, calls: []string{"settle s0"}},
		"made by another caller's API":  {state: "PauseStarted", err: errdefs.IsAlreadyExists, calls: []string{"settle s0"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := &controller{
				named:  map[attempt]Sandbox{attemptOf(podConfig()): {ID: "s0", Config: podConfig(), Handler: "podfsm", State: tc.state, Claim: tc.claim}},
				pods:   map[string]Sandbox{"s0": {Config: podConfig()}},
				claims: map[string]lifecycle.Claim{"s0": tc.claim},
			}
			forget := func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				clear(c.named)
			}
			c.remove = func(context.Context, string) error {
				if tc.removal == nil {
					forget()
				}
				return tc.removal
			}
			c.settle = func(_ context.Context, id string) error {
				c.note("settle " + id)
				if tc.state == states.RollingBack {
					forget()
				}
				return nil
			}
			request := tc.request
			if request == nil {
				request = asks()
			}
			s := endable(&stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
				return &runtime.RunPodSandboxResponse{PodSandboxId: "new"}, nil
			}}, c)
			got := <-runPod(retriesBefore(t, s, c), t.Context(), request)
			require.Equal(t, tc.want, got.id)
			require.Equal(t, tc.calls, c.calls)
			if tc.want == "" {
				require.True(t, tc.err(got.err), "%v", got.err)
				require.Equal(t, tc.removal == nil, strings.Contains(got.err.Error(), `"s0"`), "the error names the sandbox in the way: %v", got.err)
				return
			}
			require.NoError(t, got.err)
			require.Equal(t, lifecycle.Taken, c.claims[tc.want])
		})
	}
}

// endable is s with pods that the controller stops and removes.
func endable(s *stock, c *controller) *stock {
	s.stop = func(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
		return &runtime.StopPodSandboxResponse{}, c.StopSandbox(ctx, r.GetPodSandboxId())
	}
	s.remove = func(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
		return &runtime.RemovePodSandboxResponse{}, c.RemoveSandbox(ctx, r.GetPodSandboxId())
	}
	return s
}

func TestCloseEndsCreations(t *testing.T) {
	r := newRuns(&controller{})
	s := &stock{run: func(ctx context.Context, request *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		return r.run(FromContext(ctx).Caller, request)
	}}
	in := &instance{s, s, s, s}
	require.NoError(t, Install(in, &controller{}, time.Hour, Streaming{}))
	service := in.RuntimeServiceServer.(*retries)
	first := runPod(service, t.Context(), asks())
	<-r.reached
	require.NoError(t, in.Close())
	require.Equal(t, 1, s.closed)
	got := <-first
	require.True(t, errdefs.IsUnavailable(got.err), "%v", got.err)
	require.ErrorContains(t, got.err, "containerd is stopping")
	got = <-runPod(service, t.Context(), asks())
	require.True(t, errdefs.IsUnavailable(got.err), "%v", got.err)
}

func TestCreationThatPanics(t *testing.T) {
	service := retriesBefore(t, &stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		panic("a bug")
	}}, &controller{})
	got := <-runPod(service, t.Context(), asks())
	require.True(t, errdefs.IsInternal(got.err), "%v", got.err)
}

// A creation that ends for another configuration isn't joined, also when the caller with that configuration has gone and the first one
// comes back.
func TestNobodyJoinsASupersededCreation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		release := make(chan struct{})
		service := retriesBefore(t, &stock{run: func(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
			if calls.Add(1) > 1 {
				return &runtime.RunPodSandboxResponse{PodSandboxId: "s2"}, nil
			}
			<-ctx.Done()
			<-release
			return nil, context.Cause(ctx)
		}}, &controller{})
		first := runPod(service, t.Context(), asks())
		synctest.Wait()
		impatient, leave := context.WithCancel(t.Context())
		second := runPod(service, impatient, asks(renamed))
		synctest.Wait()
		leave()
		require.Error(t, (<-second).err)
		third := runPod(service, t.Context(), asks())
		synctest.Wait()
		close(release)
		require.ErrorContains(t, (<-first).err, "superseded")
		got := <-third
		require.NoError(t, got.err)
		require.Equal(t, "s2", got.id)
	})
}

// Many callers come, go and change their minds; there is never more than one creation of one attempt.
func TestOneCreationAtATime(t *testing.T) {
	var running, most atomic.Int32
	service := retriesBefore(t, &stock{run: func(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
			return &runtime.RunPodSandboxResponse{PodSandboxId: "s"}, nil
		}
	}}, &controller{})
	var callers sync.WaitGroup
	for i := range 100 {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%7)*time.Millisecond)
			defer cancel()
			request := asks()
			if i%5 == 0 {
				request = asks(renamed)
			}
			_, _ = service.RunPodSandbox(ctx, request)
		})
	}
	callers.Wait()
	_, err := service.RunPodSandbox(t.Context(), asks())
	require.NoError(t, err)
	require.EqualValues(t, 1, most.Load())
}
