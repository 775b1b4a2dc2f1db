package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

func failing(context.Context, string) error { return errNoLuck }

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t)
	ctx := inCRI(t)
	info := sandbox.Sandbox{ID: "s1"}
	for name, tc := range map[string]struct {
		ctx  context.Context
		info sandbox.Sandbox
		opts []sandbox.CreateOpt
		is   func(error) bool
	}{
		"no options":         {ctx, info, nil, errdefs.IsInvalidArgument},
		"other options":      {ctx, info, []sandbox.CreateOpt{sandbox.WithOptions(&runtime.NamespaceOption{})}, errdefs.IsInvalidArgument},
		"an empty config":    {ctx, info, []sandbox.CreateOpt{sandbox.WithOptions(&runtime.PodSandboxConfig{})}, errdefs.IsInvalidArgument},
		"no containerd name": {t.Context(), info, []sandbox.CreateOpt{sandbox.WithOptions(podConfig())}, errdefs.IsFailedPrecondition},
		"a bad option":       {ctx, info, []sandbox.CreateOpt{func(*sandbox.CreateOptions) error { return errNoLuck }}, errdefs.IsUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			err := w.Create(tc.ctx, tc.info, tc.opts...)
			require.True(t, tc.is(err), "%v", err)
			require.Empty(t, w.engine.List())
		})
	}
	require.NoError(t, w.create(t, "s1"))
	require.True(t, errdefs.IsAlreadyExists(w.create(t, "s1", named("another"))))
	require.True(t, errdefs.IsAlreadyExists(w.create(t, "s2")), "one pod, one attempt, one sandbox")
	w.refuse(errors.New("broken"))
	require.True(t, errdefs.IsUnavailable(w.create(t, "s3", named("third"))))
}

// onNode has nothing to be checked of CNI.
func onNode(config *runtime.PodSandboxConfig) {
	options(config).Network = runtime.NamespaceMode_NODE
	config.Labels = map[string]string{"true": "config"}
}

func TestCreateThroughTheFront(t *testing.T) {
	w := newWorld(t)
	err := through(t, w.Controller, podConfig(onNode), func(ctx context.Context) error {
		// What containerd's service passes on isn't the true configuration.
		if err := w.Create(ctx, sandbox.Sandbox{ID: "s1"}, sandbox.WithOptions(podConfig(named("passed-on")))); err != nil {
			return err
		}
		require.Equal(t, "s1", cri.FromContext(ctx).SandboxID)
		_, err := w.Start(ctx, "s1")
		return err
	})
	require.NoError(t, err)
	spec := w.view(t, "s1").Spec.(*Spec)
	require.Equal(t, "podfsm", spec.Handler)
	require.Equal(t, map[string]string{"true": "config"}, spec.Config.GetLabels())
	require.Equal(t, states.Ready, w.view(t, "s1").State)
}

func TestFailuresThroughTheFrontLeaveNothing(t *testing.T) {
	for name, do := range map[string]func(ctx context.Context, w *world) error{
		"the pull of the pause image": func(context.Context, *world) error { return errNoLuck },
		"the start": func(ctx context.Context, w *world) error {
			w.host.do[AttachNetwork] = failing
			_, err := w.Start(ctx, "s1")
			return fmt.Errorf("failed to start sandbox %q: %w", "s1", err)
		},
		"the look at the container record": func(ctx context.Context, w *world) error {
			w.records.err = errNoLuck
			_, err := w.Start(ctx, "s1")
			return err
		},
		"NRI, after the start": func(ctx context.Context, w *world) error {
			if _, err := w.Start(ctx, "s1"); err != nil {
				return err
			}
			// containerd's own cleanup, without the request's context.
			if err := w.Shutdown(namespaces.WithNamespace(context.Background(), cri.Namespace), "s1"); err != nil {
				return err
			}
			return errNoLuck
		},
		"NRI, and containerd's cleanup": func(ctx context.Context, w *world) error {
			if _, err := w.Start(ctx, "s1"); err != nil {
				return err
			}
			return errNoLuck
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			err := through(t, w.Controller, podConfig(onNode), func(ctx context.Context) error {
				if err := w.Create(ctx, sandbox.Sandbox{ID: "s1"}); err != nil {
					return err
				}
				return do(ctx, w)
			})
			require.ErrorContains(t, err, "no luck")
			require.NotContains(t, err.Error(), "failed to start sandbox", "the step's own error, which doesn't change from try to try")
			require.Empty(t, w.engine.List())
			require.Empty(t, w.host.left("s1"))
		})
	}
}

func TestStartReturnsTheInstance(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.create(t, "s1"))
	instance, err := w.Start(inCRI(t), "s1")
	require.NoError(t, err)
	require.Equal(t, "s1", instance.SandboxID)
	require.EqualValues(t, 42, instance.Pid)
	require.Equal(t, w.view(t, "s1").Created, instance.CreatedAt)
	require.Empty(t, instance.Address)
	require.Equal(t, "io.containerd.runc.v2", instance.Labels["oci_runtime_type"])

	view := w.view(t, "s1")
	record, err := w.records.Get(t.Context(), "s1")
	require.NoError(t, err)
	spec, err := specWithNetNS(view, record)
	require.NoError(t, err)
	require.Equal(t, []specs.LinuxNamespace{
		{Type: specs.NetworkNamespace, Path: "/run/netns/podfsm-s1"}, {Type: specs.UserNamespace},
	}, spec.Linux.Namespaces)
}

// A caller without the front is told of a failure like any other, and has nothing to clean up after it either.
func TestStartThatFailsLateIsUndone(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.create(t, "s1"))
	w.records.err = errNoLuck
	_, err := w.Start(inCRI(t), "s1")
	require.ErrorIs(t, err, errNoLuck)
	require.Empty(t, w.host.left("s1"))
}

func TestStopAndShutdown(t *testing.T) {
	kept := []states.Event{AllocateIDs, RemapSnapshot, StartPause, DeclareReady}
	w := newWorld(t)
	w.run(t, "s1")
	exited := make(chan sandbox.ExitStatus, 1)
	go func() {
		status, err := w.Wait(namespaces.WithNamespace(context.Background(), cri.Namespace), "s1")
		if err == nil {
			exited <- status
		}
		close(exited)
	}()
	require.NoError(t, w.Stop(inCRI(t), "s1"))
	require.NoError(t, w.Stop(inCRI(t), "s1"))
	require.EqualValues(t, 137, (<-exited).ExitStatus)
	require.Equal(t, states.Stopped, w.view(t, "s1").State)
	require.Equal(t, kept, w.host.left("s1"))
	require.NoError(t, w.Shutdown(inCRI(t), "s1"))
	require.NoError(t, w.Shutdown(inCRI(t), "s1"))
	require.Empty(t, w.host.left("s1"))
	require.True(t, errdefs.IsNotFound(w.Stop(inCRI(t), "s1")), "containerd's service takes that for success")
	require.NoError(t, w.StopSandbox(t.Context(), "s1"))
	require.NoError(t, w.RemoveSandbox(t.Context(), "s1"))
	_, err := w.Wait(inCRI(t), "s1")
	require.True(t, errdefs.IsNotFound(err))
	_, err = w.Status(inCRI(t), "s1", true)
	require.True(t, errdefs.IsNotFound(err))
	require.NoError(t, w.Shutdown(inCRI(t), "unknown"))
	require.Error(t, w.Shutdown(t.Context(), "s1"), "no containerd namespace")
}

func TestSandboxesOfOtherNamespacesAreNotTheCRIs(t *testing.T) {
	w := newWorld(t)
	ctx := namespaces.WithNamespace(t.Context(), "another")
	require.NoError(t, w.Create(ctx, sandbox.Sandbox{ID: "s1"}, sandbox.WithOptions(podConfig())))
	_, ok := w.Sandbox("s1")
	require.False(t, ok)
	require.NoError(t, w.StopSandbox(t.Context(), "s1"))
	require.NoError(t, w.RemoveSandbox(t.Context(), "s1"))
	require.Len(t, w.engine.List(), 1)
}

func TestPod(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.create(t, "s1"))
	pod, ok := w.Sandbox("s1")
	require.True(t, ok)
	require.Empty(t, pod.IP)
	_, err := w.Start(inCRI(t), "s1")
	require.NoError(t, err)
	pod, ok = w.Sandbox("s1")
	require.True(t, ok)
	require.Equal(t, "web", pod.Config.GetMetadata().GetName())
	require.Equal(t, "10.0.0.2", pod.IP)
	require.Equal(t, []string{"fd00::2"}, pod.AdditionalIPs)
	require.NoError(t, w.StopSandbox(t.Context(), "s1"))
	pod, ok = w.Sandbox("s1")
	require.True(t, ok)
	require.Empty(t, pod.IP, "it is off its network")
	require.NoError(t, w.RemoveSandbox(t.Context(), "s1"))
	_, ok = w.Sandbox("s1")
	require.True(t, ok, "events of its end are restored, too")
	_, ok = w.Sandbox("unknown")
	require.False(t, ok)
}

func TestOurs(t *testing.T) {
	c := &Controller{stock: stockWith()}
	for handler, want := range map[string]bool{"": false, "runc": false, "kata": false, "podfsm": true} {
		ours, err := c.Ours(handler)
		require.NoError(t, err)
		require.Equal(t, want, ours, "%q", handler)
	}
	_, err := c.Ours("unknown")
	require.True(t, errdefs.IsInvalidArgument(err))

	c.stock.Containerd.DefaultRuntimeName = "podfsm"
	ours, err := c.Ours("")
	require.NoError(t, err)
	require.True(t, ours)

	c.stock = &stockConfig{}
	ours, err = c.Ours("unknown")
	require.NoError(t, err, "containerd's own service decides")
	require.False(t, ours)
}

func TestAdmit(t *testing.T) {
	c := &Controller{stock: stockWith(func(s *stockConfig) { s.CNI.ConfDir = t.TempDir() }), node: &node{ids: userns.New(nil, nil)}}
	err := c.Admit(t.Context(), "podfsm", podConfig())
	require.True(t, errdefs.IsFailedPrecondition(err), "no network is configured: %v", err)
	require.ErrorContains(t, err, `"default/web"`)
	err = c.Admit(t.Context(), "podfsm", podConfig(func(config *runtime.PodSandboxConfig) {
		config.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "wide"}
	}))
	require.True(t, errdefs.IsInvalidArgument(err), "no plugin can have this: %v", err)
	require.NoError(t, c.Admit(t.Context(), "podfsm", podConfig(onNode)))
	require.True(t, errdefs.IsInvalidArgument(c.Admit(t.Context(), "podfsm", nil)))
	c.refuse(errors.New("first"))
	c.refuse(fmt.Errorf("second: %w", errdefs.ErrInvalidArgument))
	err = c.Admit(t.Context(), "podfsm", nil)
	require.Equal(t, codes.Unavailable, grpcstatus.Code(errgrpc.ToGRPC(err)), "whatever the reason's class")
	require.ErrorContains(t, err, "first")
	require.ErrorContains(t, err, "second")
}

func TestStatus(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.create(t, "s1"))
	got, err := w.Status(inCRI(t), "s1", false)
	require.NoError(t, err)
	require.Equal(t, "SANDBOX_NOTREADY", got.State)
	require.False(t, got.CreatedAt.IsZero(), "the CRI allows no zero time")
	created := got.CreatedAt

	_, err = w.Start(inCRI(t), "s1")
	require.NoError(t, err)
	got, err = w.Status(inCRI(t), "s1", false)
	require.NoError(t, err)
	require.Equal(t, sandbox.ControllerStatus{SandboxID: "s1", Pid: 42, State: "SANDBOX_READY", CreatedAt: created}, got)

	at := time.Unix(8, 0).UTC()
	w.engine.PauseExited(ledger.Key{Namespace: cri.Namespace, ID: "s1"}, lifecycle.Exit{Code: 9, At: at})
	w.waitFor(t, "s1", states.NotReady)
	got, err = w.Status(inCRI(t), "s1", false)
	require.NoError(t, err)
	require.Equal(t, sandbox.ControllerStatus{SandboxID: "s1", State: "SANDBOX_NOTREADY", CreatedAt: created, ExitedAt: at}, got)
}

// containerd's service sends the event of the exit as soon as Wait returns, with the status that it is given then: the kubelet
// must not read there that the sandbox is ready.
func TestStatusOnceWaitHasReturned(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1")
	recording, release := w.book.waitAt(ledger.Exited)
	w.engine.PauseExited(ledger.Key{Namespace: cri.Namespace, ID: "s1"}, lifecycle.Exit{Code: 9})
	<-recording
	ctx, cancel := context.WithTimeout(inCRI(t), 100*time.Millisecond)
	defer cancel()
	_, waited := w.Wait(ctx, "s1")
	got, err := w.Status(inCRI(t), "s1", false)
	close(release)
	require.NoError(t, err)
	if waited == nil {
		require.Equal(t, "SANDBOX_NOTREADY", got.State)
	}
}

// An operator can remove or stop a hanging creation by the id that the CLI shows.
func TestEndingASandboxWhileItIsCreated(t *testing.T) {
	for name, end := range map[string]func(w *world, ctx context.Context) error{
		"remove": func(w *world, ctx context.Context) error { return w.RemoveSandbox(ctx, "s1") },
		"stop":   func(w *world, ctx context.Context) error { return w.StopSandbox(ctx, "s1") },
	} {
		for _, during := range creationPath() {
			t.Run(name+" during "+string(during), func(t *testing.T) {
				w := newWorld(t)
				reached, release := make(chan struct{}), make(chan struct{})
				w.host.do[during] = func(ctx context.Context, _ string) error {
					close(reached)
					select {
					case <-release:
					case <-ctx.Done():
						return ctx.Err()
					}
					return nil
				}
				require.NoError(t, w.create(t, "s1"))
				started := make(chan error, 1)
				go func() {
					started <- w.engine.Start(context.Background(), ledger.Key{Namespace: cri.Namespace, ID: "s1"})
				}()
				<-reached

				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				require.NoError(t, end(w, ctx))
				close(release)
				assert.Error(t, <-started, "its caller must not think that it runs")
				assert.Empty(t, w.host.left("s1"), "it would never be undone")
				assert.Empty(t, w.engine.List())
			})
		}
	}
}

// After a failed creation the kubelet retries with the same attempt, because it has seen no
// sandbox. Pending cleanups of the failed one must not block the retry.
func TestPendingCleanupOfAFailedCreationDoesNotBlockTheNext(t *testing.T) {
	w := newWorld(t)
	w.host.do[AttachNetwork] = failing
	w.host.fail(AttachNetwork, errors.New("a plugin is missing"))
	require.NoError(t, w.create(t, "s1"))
	_, err := w.Start(inCRI(t), "s1")
	require.ErrorIs(t, err, errNoLuck)
	require.Equal(t, states.CleanupOwed, w.view(t, "s1").State)

	w.host.mu.Lock()
	delete(w.host.do, AttachNetwork)
	w.host.mu.Unlock()
	require.NoError(t, w.create(t, "s2"))
	_, err = w.Start(inCRI(t), "s2")
	require.NoError(t, err)
	w.host.heal(AttachNetwork)
	require.NoError(t, w.RemoveSandbox(t.Context(), "s1"))
	require.Empty(t, w.host.left("s1"))
	require.Equal(t, states.Ready, w.view(t, "s2").State)
}

func TestManyCallersAtOnce(t *testing.T) {
	w := newWorld(t)
	service := &api{controller: w.Controller}
	var group sync.WaitGroup
	for i := range 20 {
		id := fmt.Sprint("s", i)
		ctx := namespaces.WithNamespace(context.Background(), cri.Namespace)
		group.Go(func() {
			require.NoError(t, w.create(t, id, named(id)))
			_, err := w.Start(ctx, id)
			require.NoError(t, err)
			var ends sync.WaitGroup
			for range 3 {
				ends.Go(func() { require.NoError(t, w.StopSandbox(ctx, id)) })
				ends.Go(func() { require.NoError(t, w.RemoveSandbox(ctx, id)) })
			}
			ends.Wait()
		})
		group.Go(func() {
			_, _ = w.Status(ctx, id, false)
			_, _ = w.Sandbox(id)
			_, err := service.List(ctx, nil)
			require.NoError(t, err)
		})
	}
	group.Wait()
	require.Empty(t, w.engine.List())
	for i := range 20 {
		require.Empty(t, w.host.left(fmt.Sprint("s", i)))
	}
}

// A controller that can't see its sandboxes must not say that they are gone: containerd's service takes NotFound for success and
// forgets them, and the kubelet gives their ids to other pods.
func TestDegradedDoesNotForget(t *testing.T) {
	c := &Controller{stock: stockWith()}
	c.refuse(errors.New("the ledger can't be opened"))
	err := c.Stop(inCRI(t), "s1")
	assert.True(t, errdefs.IsUnavailable(err), "stop: %v", err)
	err = c.Shutdown(inCRI(t), "s1")
	assert.True(t, errdefs.IsUnavailable(err), "shutdown: %v", err)
}

func TestDegradedDoesNotPanic(t *testing.T) {
	c := &Controller{stock: stockWith()}
	c.refuse(errors.New("the ledger can't be opened"))
	_, err := c.Start(inCRI(t), "s1")
	require.Error(t, err)
	ctx, cancel := context.WithCancel(inCRI(t))
	cancel()
	_, err = c.Wait(ctx, "s1")
	require.ErrorIs(t, err, context.Canceled, "it says nothing of the sandbox")
	_, err = c.Status(inCRI(t), "s1", true)
	require.Error(t, err)
	_, err = c.Metrics(inCRI(t), "s1")
	require.Error(t, err)
	_, err = c.Platform(inCRI(t), "s1")
	require.NoError(t, err)
	require.NoError(t, c.Update(inCRI(t), "s1", sandbox.Sandbox{}))
	require.Error(t, c.AdmitContainer(t.Context(), "s1", nil))
	_, err = c.StatusInfo()
	require.NoError(t, err)
	require.NoError(t, c.Close())
}

// containerd's service undoes a run that failed after Start with a context of its own, and the sandbox API's callers have none of
// the front's: the undo belongs into one trace all the same.
func TestShutdownIsOneTrace(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)))
	t.Cleanup(func() { otel.SetTracerProvider(before) })

	w := newWorld(t)
	w.run(t, "s1")
	known := len(recorder.Ended())
	require.NoError(t, w.Shutdown(namespaces.WithNamespace(context.Background(), cri.Namespace), "s1"))
	traces := map[string][]string{}
	for _, span := range recorder.Ended()[known:] {
		id := span.SpanContext().TraceID().String()
		traces[id] = append(traces[id], span.Name())
	}
	require.Len(t, traces, 1)
}

// A controller that could not be opened has no engine: one that doesn't know all sandboxes would let containerd's service forget them.
func TestControllerThatCantBeOpened(t *testing.T) {
	for name, open := range map[string]func() error{
		"an error": func() error { return errors.New("no luck") },
		"a panic":  func() error { panic("a bug") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.run(t, "s1")
			w.opened(open)
			ctx := namespaces.WithNamespace(t.Context(), cri.Namespace)
			_, err := w.Status(ctx, "s1", false)
			require.True(t, errdefs.IsUnavailable(err), "%v", err)
			require.True(t, errdefs.IsUnavailable(w.Shutdown(ctx, "s1")))
			waiting, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
			defer cancel()
			_, err = w.Wait(waiting, "s1")
			require.ErrorIs(t, err, context.DeadlineExceeded, "an answer would say that the sandbox has ended")
			require.NoError(t, w.Close())
		})
	}
}

func TestQuarantinedSandboxCanBeStoppedAndRemoved(t *testing.T) {
	w := newWorld(t)
	key := ledger.Key{Namespace: cri.Namespace, ID: "s1"}
	w.engine.Restore(t.Context(), []ledger.Sandbox{{Key: key, Records: []ledger.Record{{Key: key, Kind: ledger.Begun}}}},
		func(ledger.Key, any) lifecycle.Request { return lifecycle.Request{Spec: &Spec{Config: podConfig()}} },
		func(ledger.Sandbox) lifecycle.Outside { return lifecycle.Outside{Listed: true, Started: true} })
	require.Equal(t, states.Quarantined, w.view(t, "s1").State)
	// The kubelet removes no sandbox that it couldn't stop.
	require.NoError(t, w.StopSandbox(t.Context(), "s1"))
	require.NoError(t, w.RemoveSandbox(t.Context(), "s1"))
	require.Empty(t, w.engine.List())
}

// Recovery has 20 seconds in all before containerd serves.
func TestResumeEndsWithItsContext(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1")
	key := ledger.Key{Namespace: cri.Namespace, ID: "s1"}
	busy, release := w.book.waitAt(ledger.Exited)
	w.engine.PauseExited(key, lifecycle.Exit{})
	<-busy
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	resumed := make(chan error, 1)
	go func() { resumed <- w.engine.Resume(ctx, key) }()
	select {
	case err := <-resumed:
		close(release)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	case <-time.After(2 * time.Second):
		close(release)
		<-resumed
		require.Fail(t, "a sandbox that is busy holds containerd's start up")
	}
}
