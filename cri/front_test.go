package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/tracing"
)

var errUnknownHandler = fmt.Errorf("unknown handler: %w", errdefs.ErrInvalidArgument)

type valueKey struct{}

// requireEqual compares messages.
func requireEqual(t *testing.T, want, got proto.Message, about ...any) {
	t.Helper()
	if !proto.Equal(want, got) {
		require.Equal(t, fmt.Sprint(want), fmt.Sprint(got), about...)
		require.Fail(t, "messages differ where their texts don't", about...)
	}
}

func podConfig(change ...func(*runtime.NamespaceOption)) *runtime.PodSandboxConfig {
	options := &runtime.NamespaceOption{
		Pid: runtime.NamespaceMode_CONTAINER,
		UsernsOptions: &runtime.UserNamespace{
			Mode: runtime.NamespaceMode_POD,
			Uids: []*runtime.IDMapping{{HostId: 100000, Length: 65536}},
			Gids: []*runtime.IDMapping{{HostId: 100000, Length: 65536}},
		},
	}
	for _, c := range change {
		c(options)
	}
	return &runtime.PodSandboxConfig{
		Metadata:    &runtime.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u-1", Attempt: 2},
		Hostname:    "web",
		Labels:      map[string]string{"app": "web"},
		Annotations: map[string]string{"note": "x"},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent:    "/pods/web",
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: options},
		},
	}
}

func onNode(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_NODE }

func TestRunPassesOtherPodsThrough(t *testing.T) {
	for _, handler := range []string{"", "runc"} {
		t.Run("handler "+handler, func(t *testing.T) {
			request := &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: handler}
			response := &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}
			ctx := context.WithValue(t.Context(), valueKey{}, "caller")
			s := &stock{run: func(got context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
				require.Equal(t, ctx, got)
				require.Same(t, request, r)
				require.Nil(t, FromContext(got))
				return response, nil
			}}
			got, err := newCRI(t, s, &controller{admitErr: errors.New("not asked")}).RunPodSandbox(ctx, request)
			require.NoError(t, err)
			require.Same(t, response, got)
		})
	}

	t.Run("failure", func(t *testing.T) {
		failed := errors.New("no network")
		s := &stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
			return nil, failed
		}}
		c := &controller{}
		_, err := newCRI(t, s, c).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{RuntimeHandler: "runc"})
		require.Equal(t, failed, err)
		require.Empty(t, c.calls)
	})
}

// What can't work is refused before containerd's service hears of it: its run is nil here.
func TestRunRefusesFirst(t *testing.T) {
	c := &controller{admitErr: fmt.Errorf("no metadata: %w", errdefs.ErrInvalidArgument)}
	_, err := newCRI(t, &stock{}, c).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{RuntimeHandler: "podfsm"})
	require.Equal(t, c.admitErr, err)

	_, err = newCRI(t, &stock{}, c).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{RuntimeHandler: "nobody's"})
	require.Equal(t, errUnknownHandler, err)
	require.Empty(t, c.calls)
}

// The pause image is had before anything is made; containerd's service hears of the pod only then.
func TestRunHasThePauseImageFirst(t *testing.T) {
	request := &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "podfsm"}
	s := &stock{noPause: true}
	for class, err := range map[string]error{"Unavailable": errors.New("no route"), "NotFound": fmt.Errorf("no such tag: %w", errdefs.ErrNotFound)} {
		s.pull = func(context.Context, *runtime.PullImageRequest) (*runtime.PullImageResponse, error) { return nil, err }
		_, got := newFront(t, s, &controller{}).RunPodSandbox(t.Context(), request)
		require.ErrorIs(t, got, err)
		require.ErrorContains(t, got, pauseImage)
		require.Equal(t, class, status.Code(errgrpc.ToGRPC(got)).String())
	}
	pulled := false
	s.pull = func(_ context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
		require.Equal(t, pauseImage, r.GetImage().GetImage())
		require.Equal(t, "podfsm", r.GetImage().GetRuntimeHandler())
		pulled = true
		return &runtime.PullImageResponse{}, nil
	}
	s.run = func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		require.True(t, pulled)
		return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
	}
	_, err := newFront(t, s, &controller{}).RunPodSandbox(t.Context(), request)
	require.NoError(t, err)
}

// Callers only join a creation, so none of them ends a pull that hangs; the one after it tries again.
func TestPullOfThePauseImageIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stock{noPause: true}
		s.pull = func(ctx context.Context, _ *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		begun := time.Now()
		_, err := newFront(t, s, &controller{}).RunPodSandbox(context.Background(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "podfsm"})
		require.ErrorContains(t, err, "no image within 10m0s")
		require.Equal(t, "DeadlineExceeded", status.Code(errgrpc.ToGRPC(err)).String())
		require.Equal(t, pullTimeout, time.Since(begun))
	})
}

func TestRunIsPassedOnForTheNodesNetwork(t *testing.T) {
	for name, config := range map[string]*runtime.PodSandboxConfig{
		"own network":    podConfig(),
		"node's network": podConfig(onNode),
		"no options":     {Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{}}},
		"no context":     {Linux: &runtime.LinuxPodSandboxConfig{}},
		"no Linux":       {Metadata: &runtime.PodSandboxMetadata{Name: "web"}},
		"nothing":        nil,
	} {
		t.Run(name, func(t *testing.T) {
			request := &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: "podfsm"}
			before := proto.CloneOf(request)
			caller := context.WithValue(t.Context(), valueKey{}, "caller")
			s := &stock{run: func(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
				require.Equal(t, "podfsm", r.GetRuntimeHandler())
				require.True(t, records.OnNodeNetwork(r.GetConfig()))
				want := proto.CloneOf(before)
				ensure(&ensure(&ensure(&ensure(&want.Config).Linux).SecurityContext).NamespaceOptions).Network = runtime.NamespaceMode_NODE
				requireEqual(t, want, r, "only the network mode differs")

				call := FromContext(ctx)
				require.NotNil(t, call)
				require.Equal(t, "podfsm", call.Handler)
				requireEqual(t, before.GetConfig(), call.Config, "the true configuration is beside it")
				if config != nil {
					require.NotSame(t, config, call.Config)
				}
				require.Equal(t, "caller", ctx.Value(valueKey{}))
				return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
			}}
			c := &controller{}
			response, err := newCRI(t, s, c).RunPodSandbox(caller, request)
			require.NoError(t, err)
			require.Equal(t, "s1", response.GetPodSandboxId())
			requireEqual(t, before, request, "the caller's request is not changed")
			require.Empty(t, c.calls)
		})
	}
}

func TestRunThatFails(t *testing.T) {
	pull := fmt.Errorf("failed to pull pause: %w", errdefs.ErrUnavailable)
	step := fmt.Errorf("step attach_network failed: %w", errdefs.ErrResourceExhausted)
	failed := errors.New("undo of attach_network failed")
	for name, tc := range map[string]struct {
		create, start error // what the controller does; nil create is success
		stock         error
		removal       error
		want          []error
		text          string
		calls         []string
	}{
		"before the controller": {
			create: errors.New("never came to it"), stock: pull, want: []error{pull}, text: pull.Error(),
		},
		"after Create": {
			stock: pull, want: []error{pull}, text: pull.Error(), calls: []string{"remove s1"},
		},
		"after Create, and the cleanup too": {
			stock: pull, removal: failed, want: []error{pull, failed}, calls: []string{"remove s1"},
		},
		"in the controller": {
			start: step, stock: fmt.Errorf("failed to start sandbox %q: %w", "s1", step), want: []error{step}, text: step.Error(),
		},
		"with the sandbox's id in the text": {
			start: errors.New("failed to mount /run/s1/rootfs"), stock: step, text: "failed to mount /run/ID/rootfs",
		},
	} {
		t.Run(name, func(t *testing.T) {
			spans := recordSpans(t)
			s := &stock{run: func(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
				if call := FromContext(ctx); tc.create == nil {
					call.SandboxID, call.Err = "s1", tc.start
				}
				return nil, tc.stock
			}}
			c := &controller{remove: func(ctx context.Context, _ string) error {
				require.NoError(t, ctx.Err())
				require.True(t, trace.SpanFromContext(ctx).IsRecording(), "the cleanup is part of the request's trace")
				return tc.removal
			}}
			response, err := newCRI(t, s, c).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "podfsm"})
			require.Nil(t, response)
			for _, want := range tc.want {
				require.ErrorIs(t, err, want)
			}
			if tc.text != "" {
				require.EqualError(t, err, tc.text)
			}
			require.Equal(t, tc.calls, c.calls)
			require.NotErrorAs(t, err, new(*sandboxError), "callers and spans get the error itself")

			ended := spans.Ended()
			require.Len(t, ended, 1)
			require.NotContains(t, fmt.Sprint(ended[0].Events()[0].Attributes), "sandboxError")
			require.Equal(t, codes.Error, ended[0].Status().Code)
		})
	}
}

// The meter of creations counts each creation of a podfsm pod, also one that panics.
func TestRunIsCounted(t *testing.T) {
	run := func(t *testing.T, handler string, do func() (*runtime.RunPodSandboxResponse, error)) []RetryEvent {
		c := &controller{}
		s := &stock{run: func(context.Context, *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
			return do()
		}}
		front := newFront(t, s, c)
		func() {
			defer func() { _ = recover() }()
			_, _ = front.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: handler})
		}()
		return c.events()
	}
	succeeds := func() (*runtime.RunPodSandboxResponse, error) {
		return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
	}
	require.Equal(t, []RetryEvent{"created"}, run(t, "podfsm", succeeds))
	require.Equal(t, []RetryEvent{"failed"}, run(t, "podfsm", func() (*runtime.RunPodSandboxResponse, error) { return nil, errors.New("no luck") }))
	require.Equal(t, []RetryEvent{"failed"}, run(t, "podfsm", func() (*runtime.RunPodSandboxResponse, error) { panic("a bug") }))
	require.Empty(t, run(t, "runc", succeeds))
}

func TestRunSpan(t *testing.T) {
	spans := recordSpans(t)
	s := &stock{run: func(ctx context.Context, _ *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
		FromContext(ctx).SandboxID = "s1"
		return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
	}}
	_, err := newCRI(t, s, &controller{}).RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "podfsm"})
	require.NoError(t, err)

	ended := spans.Ended()
	require.Len(t, ended, 1)
	require.Equal(t, tracing.SpanRun, ended[0].Name())
	require.Equal(t, codes.Unset, ended[0].Status().Code)
	for _, attribute := range append(Attributes(podConfig(), "podfsm"), tracing.SandboxID.String("s1")) {
		require.Contains(t, ended[0].Attributes(), attribute)
	}
}

// stopAndRemove are the two methods that end a pod, which the front treats alike.
var stopAndRemove = map[string]struct {
	// serve has containerd's service answer with do.
	serve func(s *stock, do func(ctx context.Context, id string) error)
	call  func(s runtime.RuntimeServiceServer, ctx context.Context, id string) error
	span  string
}{
	"stop": {
		serve: func(s *stock, do func(context.Context, string) error) {
			s.stop = func(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
				return &runtime.StopPodSandboxResponse{}, do(ctx, r.GetPodSandboxId())
			}
		},
		call: func(s runtime.RuntimeServiceServer, ctx context.Context, id string) error {
			_, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id})
			return err
		},
		span: tracing.SpanStop,
	},
	"remove": {
		serve: func(s *stock, do func(context.Context, string) error) {
			s.remove = func(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
				return &runtime.RemovePodSandboxResponse{}, do(ctx, r.GetPodSandboxId())
			}
		},
		call: func(s runtime.RuntimeServiceServer, ctx context.Context, id string) error {
			_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		},
		span: tracing.SpanRemove,
	},
}

func nothing(context.Context, string) error { return nil }

func TestStopAndRemove(t *testing.T) {
	failed := fmt.Errorf("no luck: %w", errdefs.ErrFailedPrecondition)
	for method, m := range stopAndRemove {
		for name, tc := range map[string]struct {
			id         string
			stock, own error
			want       error
			calls      []string
		}{
			"ours":                {id: "s1-long", calls: []string{"stock s1-long", method + " s1-long"}},
			"ours, id shortened":  {id: "s1", calls: []string{"stock s1", method + " s1-long"}},
			"containerd's fails":  {id: "s1-long", stock: failed, want: failed, calls: []string{"stock s1-long"}},
			"ours fails":          {id: "s1-long", own: failed, want: failed, calls: []string{"stock s1-long", method + " s1-long"}},
			"another's":           {id: "s2-long", calls: []string{"stock s2-long"}},
			"another's, it fails": {id: "s2-long", stock: failed, want: failed, calls: []string{"stock s2-long"}},
			"another's, id short": {id: "s2", calls: []string{"stock s2"}},
			"ambiguous":           {id: "s", calls: []string{"stock s"}},
			"unknown":             {id: "x", calls: []string{"stock x"}},
			"no id":               {id: "", calls: []string{"stock "}},
		} {
			t.Run(method+"/"+name, func(t *testing.T) {
				spans := recordSpans(t)
				c := &controller{pods: map[string]Sandbox{"s1-long": {Config: podConfig()}}}
				own := func(context.Context, string) error { return tc.own }
				c.stop, c.remove = own, own
				s := &stock{listed: []string{"s1-long", "s2-long"}}
				ours := false
				m.serve(s, func(ctx context.Context, id string) error {
					c.calls = append(c.calls, "stock "+id)
					if call := FromContext(ctx); call != nil {
						ours = true
						require.Nil(t, call.Config)
						require.NotNil(t, call.Caller)
					}
					return tc.stock
				})
				err := m.call(newCRI(t, s, c), t.Context(), tc.id)
				require.Equal(t, tc.want, err)
				isOurs := tc.id == "s1" || tc.id == "s1-long"
				require.Equal(t, tc.calls, c.calls)
				require.Equal(t, isOurs, ours, "the controller knows by the call that the front does the rest")
				if !isOurs {
					require.Empty(t, spans.Ended())
					return
				}
				require.Len(t, spans.Ended(), 1)
				require.Equal(t, m.span, spans.Ended()[0].Name())
				require.Contains(t, spans.Ended()[0].Attributes(), tracing.SandboxID.String("s1-long"))
			})
		}
	}
}

// A runtime, a shim or a plugin that gives wrong answers for a while doesn't fail a stop. What lasts, or outlasts the caller's time, does.
func TestPassingFaultsOfAStop(t *testing.T) {
	passing := errors.New("no luck")
	lasting := fmt.Errorf("the plugin is not installed: %w", errdefs.ErrFailedPrecondition)
	for name, tc := range map[string]struct {
		stock, own []error       // of the first calls
		timeout    time.Duration // 0 for none
		want       error
		calls      []string
		took       time.Duration
	}{
		"containerd's fails":              {stock: []error{passing}, calls: []string{"stock s1", "stock s1", "stop s1"}, took: stopAgain},
		"ours fails":                      {own: []error{passing}, calls: []string{"stock s1", "stop s1", "stock s1", "stop s1"}, took: stopAgain},
		"both fail":                       {stock: []error{passing}, own: []error{passing}, timeout: soon, calls: []string{"stock s1", "stock s1", "stop s1", "stock s1", "stop s1"}, took: 3 * stopAgain},
		"something is missing":            {own: []error{lasting}, want: lasting, calls: []string{"stock s1", "stop s1"}},
		"something is missing later":      {own: []error{passing, lasting}, want: lasting, calls: []string{"stock s1", "stop s1", "stock s1", "stop s1"}, took: stopAgain},
		"no luck, and no deadline":        {stock: slices.Repeat([]error{passing}, 99), want: passing, calls: slices.Repeat([]string{"stock s1"}, 3), took: 3 * stopAgain},
		"no luck with time left":          {stock: slices.Repeat([]error{passing}, 99), timeout: time.Minute, want: passing, calls: slices.Repeat([]string{"stock s1"}, 3), took: 3 * stopAgain},
		"no luck in the caller's time":    {stock: slices.Repeat([]error{passing}, 99), timeout: 2 * stopAgain, want: passing, calls: slices.Repeat([]string{"stock s1"}, 2), took: stopAgain},
		"the caller has very little time": {own: []error{passing}, timeout: stopAgain - 1, want: passing, calls: []string{"stock s1", "stop s1"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				next := func(errs *[]error) (err error) {
					if len(*errs) > 0 {
						err, *errs = (*errs)[0], (*errs)[1:]
					}
					return err
				}
				c := &controller{pods: map[string]Sandbox{"s1": {Config: podConfig()}}}
				c.stop = func(context.Context, string) error { return next(&tc.own) }
				s := &stock{}
				stopAndRemove["stop"].serve(s, func(_ context.Context, id string) error {
					c.note("stock " + id)
					return next(&tc.stock)
				})
				ctx := t.Context()
				if tc.timeout > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tc.timeout)
					defer cancel()
				}
				begun := time.Now()
				require.Equal(t, tc.want, stopAndRemove["stop"].call(newCRI(t, s, c), ctx, "s1"))
				require.Equal(t, tc.calls, c.calls)
				require.Equal(t, tc.took, time.Since(begun))
			})
		})
	}
}

// containerd's service waits for containers as long as its context lasts, while it keeps NRI plugins from registering: a
// request must not outlive its caller, or each try of the kubelet leaves one more that hangs.
func TestStopAndRemoveEndWithTheirCaller(t *testing.T) {
	for method, m := range stopAndRemove {
		t.Run(method, func(t *testing.T) {
			c := &controller{pods: map[string]Sandbox{"s1": {Config: podConfig()}}}
			s := &stock{}
			hanging, release := make(chan struct{}), make(chan struct{})
			m.serve(s, func(ctx context.Context, _ string) error {
				close(hanging)
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-release:
					return nil
				}
			})
			ctx, cancel := context.WithCancel(t.Context())
			result := make(chan error, 1)
			go func() { result <- m.call(newCRI(t, s, c), ctx, "s1") }()
			<-hanging
			cancel()
			select {
			case err := <-result:
				require.ErrorIs(t, err, context.Canceled)
			case <-time.After(soon):
				close(release)
				<-result
				require.Fail(t, "containerd's service doesn't learn that the caller has gone")
			}
		})
	}
}

func TestFrontForwardsPorts(t *testing.T) {
	for name, tc := range map[string]struct {
		id       string
		ours     bool
		notReady bool
	}{
		"own network":               {id: "own-1", ours: true},
		"own network, id shortened": {id: "own", ours: true},
		"own network, not ready":    {id: "dead-1", ours: true, notReady: true},
		"node's network":            {id: "node-1"},
		"another's":                 {id: "other-1"},
		"unknown":                   {id: "x"},
	} {
		t.Run(name, func(t *testing.T) {
			forwarded := &runtime.PortForwardResponse{Url: "http://here"}
			s := &stock{
				listed: []string{"own-1", "dead-1", "node-1", "other-1"},
				forward: func(_ context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
					require.Equal(t, tc.id, r.GetPodSandboxId())
					return forwarded, nil
				},
			}
			c := &controller{pods: map[string]Sandbox{
				"own-1":  {Config: podConfig(), Ready: true, NetNSPath: "/run/netns/own-1"},
				"dead-1": {Config: podConfig(), NetNSPath: "/run/netns/dead-1"},
				"node-1": {Config: podConfig(onNode), Ready: true},
			}}
			response, err := newCRI(t, s, c).PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: tc.id, Port: []int32{80}})
			switch {
			case tc.notReady:
				require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
				require.ErrorContains(t, err, `"default/web"`)
				require.Nil(t, response)
			case tc.ours:
				require.NoError(t, err)
				require.Regexp(t, `^http://127\.0\.0\.1:\d+/portforward/[A-Z2-7]+$`, response.GetUrl())
			default:
				require.NoError(t, err)
				require.Same(t, forwarded, response)
			}
		})
	}
}

func TestAttributes(t *testing.T) {
	require.NotPanics(t, func() { Attributes(nil, "") })
	require.Len(t, Attributes(podConfig(), "podfsm"), len(Attributes(podConfig(), ""))+1, "an empty handler is left out")
	require.Equal(t, "default/web", records.PodName(podConfig()))
	require.False(t, records.OnNodeNetwork(nil))
}
