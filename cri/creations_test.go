package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
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

// runs lets containerd's service run pods: the first only once release is closed, unless its creation is ended before.
type runs struct {
	on      *controller // knows what was run
	count   atomic.Int32
	reached chan struct{} // closed by the first
	release chan struct{}
}

func newRuns(on *controller) *runs {
	return &runs{on: on, reached: make(chan struct{}), release: make(chan struct{})}
}

func (r *runs) run(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	n := r.count.Add(1)
	id := fmt.Sprintf("s%d", n)
	FromContext(ctx).SandboxID = id
	if n == 1 {
		close(r.reached)
		select {
		case <-r.release:
		case <-FromContext(ctx).Caller.Done():
			FromContext(ctx).Err = fmt.Errorf("step start_pause of sandbox %s failed: %w", id, context.Canceled)
			return nil, FromContext(ctx).Err
		}
	}
	r.on.mu.Lock()
	defer r.on.mu.Unlock()
	r.on.named = map[attempt]Pod{attemptOf(FromContext(ctx).Config): {ID: id, Config: FromContext(ctx).Config, Handler: "podfsm", State: states.Ready}}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// outcome is what RunPodSandbox has returned.
type outcome struct {
	id  string
	err error
}

func runPod(s *service, ctx context.Context, r *runtime.RunPodSandboxRequest) <-chan outcome {
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
	front := newFront(t, &stock{run: r.run}, c)
	ctx, cancel := context.WithCancel(t.Context())
	first := runPod(front, ctx, asks())
	<-r.reached
	cancel()
	got := <-first
	require.ErrorIs(t, got.err, context.Canceled)
	require.ErrorContains(t, got.err, `pod "default/web"`)

	var joined []<-chan outcome
	for range 20 {
		joined = append(joined, runPod(front, t.Context(), asks(func(config *runtime.PodSandboxConfig) {
			config.Labels, config.Annotations = nil, map[string]string{"changed": "meanwhile"}
		})))
	}
	close(r.release)
	for _, answers := range joined {
		require.Equal(t, outcome{id: "s1"}, <-answers)
	}
	require.EqualValues(t, 1, r.count.Load())
	require.Equal(t, lifecycle.Taken, c.claims["s1"])
	told := c.told()
	require.Len(t, told, 21)
	for _, what := range told { // a retry may come so late that the creation has ended
		require.Contains(t, []Happening{"created", RetryJoined, RetryTook}, what)
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
	front := newFront(t, &stock{run: r.run}, c)
	first := runPod(front, t.Context(), asks())
	<-r.reached
	require.Equal(t, outcome{id: "s2"}, <-runPod(front, t.Context(), asks(renamed)))
	got := <-first
	require.True(t, errdefs.IsAborted(got.err), "%v", got.err)
	require.ErrorContains(t, got.err, "superseded")
	require.Equal(t, []Happening{RetrySuperseded, "failed", "created"}, c.told())
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
	c := &controller{pods: map[string]Pod{"s1": {Config: podConfig()}}}
	r := newRuns(c)
	close(r.release)
	c.claims = map[string]lifecycle.Claim{"s1": lifecycle.Discarded}
	c.remove = func(context.Context, string) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		clear(c.named)
		return nil
	}
	front := newFront(t, endable(&stock{run: func(ctx context.Context, request *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		response, err := r.run(ctx, request)
		c.mu.Lock()
		defer c.mu.Unlock()
		pod := c.named[attemptOf(podConfig())]
		pod.Claim = c.claims[pod.ID]
		c.named[attemptOf(podConfig())] = pod
		return response, err
	}}), c)
	require.Equal(t, outcome{id: "s2"}, <-runPod(front, t.Context(), asks()))
	require.Equal(t, []string{"stop s1", "remove s1"}, c.calls)
}

// Attempts and pods don't stand in each other's way.
func TestOtherAttemptsDoNotJoin(t *testing.T) {
	c := &controller{}
	r := newRuns(c)
	front := newFront(t, &stock{run: r.run}, c)
	first := runPod(front, t.Context(), asks())
	<-r.reached
	for i, change := range []func(*runtime.PodSandboxMetadata){
		func(m *runtime.PodSandboxMetadata) { m.Attempt++ },
		func(m *runtime.PodSandboxMetadata) { m.Uid = "u-2" },
		func(m *runtime.PodSandboxMetadata) { m.Name = "db" },
		func(m *runtime.PodSandboxMetadata) { m.Namespace = "other" },
	} {
		other := asks(func(config *runtime.PodSandboxConfig) { change(config.Metadata) })
		require.Equal(t, outcome{id: fmt.Sprintf("s%d", i+2)}, <-runPod(front, t.Context(), other))
	}
	close(r.release)
	require.Equal(t, outcome{id: "s1"}, <-first)
}

// What there is of the attempt already, after a restart or because it was finished without its caller.
func TestWhatIsThereAlready(t *testing.T) {
	owed := errors.New("undo of attach_network of s0 failed")
	for name, tc := range map[string]struct {
		state   states.State
		claim   lifecycle.Claim
		request *runtime.RunPodSandboxRequest
		removal error
		want    string // the id; "" for an error
		err     func(error) bool
		calls   []string
	}{
		"ready, unclaimed":             {state: states.Ready, want: "s0"},
		"ready, shown":                 {state: states.Ready, claim: lifecycle.Shown, want: "s0"},
		"ready, taken":                 {state: states.Ready, claim: lifecycle.Taken, err: errdefs.IsAlreadyExists},
		"ready, of another shape":      {state: states.Ready, claim: lifecycle.Shown, request: asks(renamed), want: "new", calls: []string{"stop s0", "remove s0"}},
		"taken, of another shape":      {state: states.Ready, claim: lifecycle.Taken, request: asks(renamed), err: errdefs.IsAlreadyExists},
		"lost pause":                   {state: states.NotReady, want: "new", calls: []string{"stop s0", "remove s0"}},
		"discarded":                    {state: states.Stopping, claim: lifecycle.Discarded, want: "new", calls: []string{"stop s0", "remove s0"}},
		"discarded, its end is owed":   {state: states.Ready, claim: lifecycle.Discarded, removal: owed, err: func(err error) bool { return errors.Is(err, owed) }, calls: []string{"stop s0", "remove s0"}},
		"rolling back":                 {state: states.RollingBack, want: "new", calls: []string{"settle s0"}},
		"stopped by somebody":          {state: states.Stopped, claim: lifecycle.Shown, err: errdefs.IsAlreadyExists, calls: []string{"settle s0"}},
		"made by another caller's API": {state: "PauseStarted", err: errdefs.IsAlreadyExists, calls: []string{"settle s0"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := &controller{
				named:  map[attempt]Pod{attemptOf(podConfig()): {ID: "s0", Config: podConfig(), Handler: "podfsm", State: tc.state, Claim: tc.claim}},
				pods:   map[string]Pod{"s0": {Config: podConfig()}},
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
			got := <-runPod(newFront(t, endable(&stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
				return &runtime.RunPodSandboxResponse{PodSandboxId: "new"}, nil
			}}), c), t.Context(), request)
			require.Equal(t, tc.want, got.id)
			require.Equal(t, tc.calls, c.calls)
			if tc.want == "" {
				require.True(t, tc.err(got.err), "%v", got.err)
				require.Equal(t, tc.removal == nil, strings.Contains(got.err.Error(), `"s0"`), "who is in the way is named: %v", got.err)
				return
			}
			require.NoError(t, got.err)
			require.Equal(t, lifecycle.Taken, c.claims[tc.want])
		})
	}
}

// endable is s with pods that can be stopped and removed.
func endable(s *stock) *stock {
	s.stop = func(context.Context, *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
		return &runtime.StopPodSandboxResponse{}, nil
	}
	s.remove = func(context.Context, *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
		return &runtime.RemovePodSandboxResponse{}, nil
	}
	return s
}

func TestUnclaimedExpires(t *testing.T) {
	spans := recordSpans(t)
	removed := make(chan string, 10)
	tries := 0
	c := &controller{
		pods:      map[string]Pod{"s0": {Config: podConfig()}, "s1": {Config: podConfig()}},
		claims:    map[string]lifecycle.Claim{"s1": lifecycle.Shown},
		unclaimed: []string{"s0", "s1", "forgotten"},
		remove: func(_ context.Context, id string) error {
			switch tries++; tries {
			case 1:
				return errors.New("owed")
			case 2:
				panic("a bug")
			}
			removed <- id
			return nil
		},
	}
	s := endable(&stock{})
	in := &instance{s, s, s, s}
	require.NoError(t, Install(in, c, time.Millisecond, Streaming{}))
	front := in.RuntimeServiceServer.(*service)
	select {
	case id := <-removed:
		require.Equal(t, "s0", id, "at the third try")
	case <-time.After(soon):
		t.Fatal("nothing expires")
	}
	require.NoError(t, front.Close())
	require.Empty(t, removed)
	require.False(t, front.show(t.Context(), "s0"))
	require.True(t, front.show(t.Context(), "s1"))
	var names []string
	for _, span := range spans.Ended() {
		names = append(names, span.Name())
	}
	try := []string{"sandbox.stop", "sandbox.remove", "sandbox.discard"}
	require.Equal(t, slices.Repeat(try, 3), names)
	require.Equal(t, []Happening{PodUnclaimed}, c.told(), "once, when it is gone")
}

// What is discarded isn't shown any more, by whatever method.
func TestDiscardedIsNotShown(t *testing.T) {
	s := &stock{listed: []string{"s0", "s1"}}
	s.status = func(_ context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
		return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Id: r.GetPodSandboxId()}}, nil
	}
	s.events = func(_ *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
		for _, id := range s.listed {
			if err := stream.Send(&runtime.ContainerEventResponse{PodSandboxStatus: &runtime.PodSandboxStatus{Id: id}}); err != nil {
				return err
			}
		}
		return nil
	}
	c := &controller{claims: map[string]lifecycle.Claim{"s0": lifecycle.Discarded}}
	front := newFront(t, s, c)

	list, err := front.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetItems(), 1)
	streamed := &pieces{}
	require.NoError(t, front.StreamPodSandboxes(&runtime.StreamPodSandboxesRequest{}, streamed))
	require.Len(t, streamed.items, 1)
	_, err = front.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: "s0"})
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	events := &sink{}
	require.NoError(t, front.GetContainerEvents(&runtime.GetEventsRequest{}, events))
	require.Len(t, events.sent, 1)
	require.Equal(t, "s1", events.sent[0].GetPodSandboxStatus().GetId())
	require.Equal(t, lifecycle.Shown, c.claims["s1"])
}

func TestCloseEndsCreations(t *testing.T) {
	r := newRuns(&controller{})
	s := &stock{run: r.run}
	in := &instance{s, s, s, s}
	require.NoError(t, Install(in, &controller{}, time.Hour, Streaming{}))
	front := in.RuntimeServiceServer.(*service)
	first := runPod(front, t.Context(), asks())
	<-r.reached
	require.NoError(t, in.Close())
	require.Equal(t, 1, s.closed)
	got := <-first
	require.True(t, errdefs.IsUnavailable(got.err), "%v", got.err)
	require.ErrorContains(t, got.err, "containerd is stopping")
	got = <-runPod(front, t.Context(), asks())
	require.True(t, errdefs.IsUnavailable(got.err), "%v", got.err)
}

func TestCreationThatPanics(t *testing.T) {
	front := newFront(t, &stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		panic("a bug")
	}}, &controller{})
	got := <-runPod(front, t.Context(), asks())
	require.True(t, errdefs.IsInternal(got.err), "%v", got.err)
}

// A creation that ends for another configuration isn't joined, also when the caller with that configuration has gone and the first one
// comes back.
func TestNobodyJoinsASupersededCreation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		release := make(chan struct{})
		front := newFront(t, &stock{run: func(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
			if calls.Add(1) > 1 {
				return &runtime.RunPodSandboxResponse{PodSandboxId: "s2"}, nil
			}
			<-FromContext(ctx).Caller.Done()
			<-release
			return nil, context.Cause(FromContext(ctx).Caller)
		}}, &controller{})
		first := runPod(front, t.Context(), asks())
		synctest.Wait()
		impatient, leave := context.WithCancel(t.Context())
		second := runPod(front, impatient, asks(renamed))
		synctest.Wait()
		leave()
		require.Error(t, (<-second).err)
		third := runPod(front, t.Context(), asks())
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
	front := newFront(t, &stock{run: func(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		select {
		case <-FromContext(ctx).Caller.Done():
			return nil, FromContext(ctx).Caller.Err()
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
			_, _ = front.RunPodSandbox(ctx, request)
		})
	}
	callers.Wait()
	_, err := front.RunPodSandbox(t.Context(), asks())
	require.NoError(t, err)
	require.EqualValues(t, 1, most.Load())
}

// A sandbox can't be ended before containerd's service serves, which is after the front was made.
func TestExpiryWaitsForContainerdsService(t *testing.T) {
	c := &controller{pods: map[string]Pod{"s0": {Config: podConfig()}}}
	front := newFront(t, endable(&stock{uninitialized: true}), c)
	front.expire("s0")
	require.Empty(t, c.calls)
	require.Contains(t, front.creations.timers, "s0")
}
