package plugin

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"go.opentelemetry.io/otel/trace"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// startPause makes the sandbox's files, pause's container and its process, which gets new user and network namespaces.
type startPause struct {
	*node
	facts lifecycle.Facts
}

func (s *startPause) Facts() lifecycle.Facts { return s.facts }

func (s *startPause) Plan(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *startPause) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if err := s.settings.Files.Setup(r.Key.ID, spec.Config); err != nil {
		return nil, err
	}
	result, request, err := s.describe(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := s.run(ctx, r, request, result); err != nil {
		selinux.ReleaseLabel(result.ProcessLabel)
		return nil, err
	}
	return result, nil
}

// startGrace is how long the start of pause goes on when the creation has failed meanwhile. It takes some dozen milliseconds, and a half
// of it is no easier to undo.
const startGrace = 2 * time.Second

// offeredPause is what start_pause offers, the namespaces of a process, or of a pause that the runtime is still making.
type offeredPause struct {
	pause Pause
	netns *netns.Handle // nil when there is a pid
}

// run makes the container and its process, and completes result. Its namespaces are there long before containerd hears of the process, so
// the network is attached meanwhile.
func (s *startPause) run(ctx context.Context, r *lifecycle.Run, request pause.CreateRequest, result *Pause) (err error) {
	if _, err = s.containers.Create(ctx, request); err != nil {
		return err
	}
	asked := time.Now()
	done := s.containers.Turn(ctx)
	defer done()
	if waited := time.Since(asked); waited > time.Millisecond {
		trace.SpanFromContext(ctx).SetAttributes(tracing.PauseWaited.Float64(waited.Seconds()))
	}
	if ctx.Err() != nil { // nothing is half made yet
		return context.Cause(ctx)
	}
	ctx, cancel := outlast(ctx, startGrace)
	defer cancel()
	making, made := context.WithCancel(ctx)
	lent := s.lend(making, r, *result, request.Spec.OCI)
	defer func() {
		made()
		if early := lent(); early != nil {
			early.Close()
		}
	}()
	result.Pid, err = s.containers.CreateTask(ctx, request.ID, r.Spec.(*Spec).RuntimePath)
	done()
	made()
	early := lent()
	if err != nil {
		return err
	}
	if early == nil {
		captured := r.Offer(&offeredPause{pause: *result})
		err = captured()
	} else {
		err = s.proveLent(ctx, r, *result, early)
	}
	if err != nil {
		return err
	}
	return s.containers.Start(ctx, request.ID)
}

// lend offers the network namespace of a pause that its runtime is still making. lent waits until that is captured, or making has ended
// without one, and returns it. It is no error when the creation has failed by then: pause comes to its end.
func (s *startPause) lend(making context.Context, r *lifecycle.Run, p Pause, oci *specs.Spec) (lent func() *netns.Handle) {
	var handle *netns.Handle
	captured, done := func() error { return nil }, make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				log.G(making).WithField("panic", p).Error("podfsm: the namespaces of a pause in the making can't be found")
			}
		}()
		if !s.lendsNamespaces(r.Spec.(*Spec), oci) {
			return
		}
		found, err := netns.Await(making, expect(r, p), func() ([]int, error) { return pause.Processes(p.CgroupPath) })
		if err == nil {
			handle, captured = found, r.Offer(&offeredPause{p, found})
		} else if making.Err() == nil {
			log.G(making).WithError(err).Debug("podfsm: the network waits until pause is created")
		}
	}()
	return sync.OnceValue(func() *netns.Handle {
		<-done
		_ = captured()
		return handle
	})
}

// proveLent proves that a namespace that was lent is that of the process which containerd says is pause.
func (s *startPause) proveLent(ctx context.Context, r *lifecycle.Run, p Pause, early *netns.Handle) error {
	handle, err := s.capture(ctx, r, p)
	if err != nil {
		return err
	}
	defer handle.Close()
	if !handle.Same(early) {
		return fmt.Errorf("pause is in network namespace %d, and what its runtime had started before was in %d: %w",
			handle.Inode(), early.Inode(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// lendsNamespaces says whether the namespaces of a pause may be used while it is still being created. Only runc's shim is known to make them
// in processes of pause's cgroup. And what changes the network namespace by the OCI specification has to come before CNI, as ever: an
// interface takes on the settings that are there when it is made. The node's own defaults (unprivileged ports and pings) matter only to a
// plugin that sets the same.
func (s *startPause) lendsNamespaces(spec *Spec, oci *specs.Spec) bool {
	switch {
	case spec.OnNodeNetwork() || spec.NetNSPath != "": // there is none to capture
		return false
	case spec.RuntimeType != plugins.RuntimeRuncV2 || oci.Hooks != nil || len(oci.Linux.NetDevices) > 0:
		return false
	}
	for name := range spec.Config.GetLinux().GetSysctls() {
		if strings.HasPrefix(name, "net.") || strings.HasPrefix(name, "net/") {
			return false
		}
	}
	networks, err := cni.Load(networkConfig(s.stock, spec))
	return err == nil && !slices.ContainsFunc(networks, cni.Network.SetsSysctls)
}

// outlast is ctx, a step's, but ends a while after it when that is cancelled, though not after its deadline.
func outlast(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	deadline, _ := ctx.Deadline() // every step has one
	timely, end := context.WithDeadline(longer, deadline)
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(grace, func() { cancel(context.Cause(ctx)) })
		context.AfterFunc(longer, func() { timer.Stop() })
	})
	return timely, func() { stop(); end(); cancel(context.Canceled) }
}

// describe builds pause's container, and makes nothing.
func (s *startPause) describe(ctx context.Context, r *lifecycle.Run) (*Pause, pause.CreateRequest, error) {
	spec := r.Spec.(*Spec)
	image, err := s.client.GetImage(ctx, spec.Image)
	if err != nil {
		return nil, pause.CreateRequest{}, fmt.Errorf("failed to get the pause image %q: %w", spec.Image, err)
	}
	imageSpec, err := image.Spec(ctx)
	if err != nil {
		return nil, pause.CreateRequest{}, fmt.Errorf("failed to read the configuration of the pause image %q: %w", spec.Image, err)
	}
	uids, gids := mapping(r)
	oci, err := s.settings.Spec(ctx, pause.Pod{
		ID:             r.Key.ID,
		Config:         spec.Config,
		UIDs:           uids,
		GIDs:           gids,
		NetNSPath:      spec.NetNSPath,
		PodAnnotations: spec.PodAnnotations,
		ImageConfig:    imageSpec.Config,
		ImageRef:       s.stock.pauseImage(),
	})
	if err != nil {
		return nil, pause.CreateRequest{}, err
	}
	labels := pause.Labels(spec.Config.GetLabels(), imageSpec.Config.Labels)
	result := &Pause{
		CgroupPath:   pause.CgroupPath(spec.Config, r.Key.Namespace, r.Key.ID),
		ProcessLabel: oci.ProcessLabel,
		Labels:       pause.InstanceLabels(labels, spec.RuntimeType, oci.ProcessLabel),
	}
	return result, pause.CreateRequest{
		ID:             r.Key.ID,
		Spec:           oci,
		Labels:         labels,
		ImageName:      image.Name(),
		Snapshotter:    spec.Snapshotter,
		SnapshotKey:    r.Key.ID,
		Runtime:        spec.RuntimeType,
		RuntimeOptions: spec.Options(),
	}, nil
}

// Stop kills pause.
func (s *startPause) Stop(ctx context.Context, r *lifecycle.Run) (lifecycle.Exit, error) {
	exit, err := s.containers.End(ctx, r.Key.ID)
	if err != nil {
		return lifecycle.Exit{}, err
	}
	return lifecycle.Exit{Code: exit.Status, At: exit.At}, nil
}

// Reap deletes the task of a pause that has exited, and with it the shim. The container's record stays: the CRI shows it until the
// sandbox is removed.
func (s *startPause) Reap(ctx context.Context, r *lifecycle.Run) error {
	if err := s.containers.DeleteTask(ctx, r.Key.ID); err != nil {
		return err
	}
	return s.settings.Files.UnmountShm(r.Key.ID)
}

func (s *startPause) Undo(ctx context.Context, r *lifecycle.Run) error {
	if err := s.containers.Delete(ctx, r.Key.ID); err != nil {
		return err
	}
	if err := pause.RemoveCgroup(ctx, pause.CgroupPath(r.Spec.(*Spec).Config, r.Key.Namespace, r.Key.ID)); err != nil {
		return err
	}
	if err := s.settings.Files.Remove(ctx, r.Key.ID); err != nil {
		return err
	}
	// The label of a sandbox that was ready is containerd's service's to release.
	if started, ok := r.Result(states.StartPause).(*Pause); ok && r.Result(states.DeclareReady) == nil {
		selinux.ReleaseLabel(started.ProcessLabel)
	}
	return nil
}

// Exited asks containerd, which has found the shims of its predecessor again.
func (s *startPause) Exited(ctx context.Context, r *lifecycle.Run) (*lifecycle.Exit, error) {
	status, err := s.containers.Status(ctx, r.Key.ID)
	switch {
	case errdefs.IsNotFound(err):
		return &lifecycle.Exit{Code: pause.UnknownStatus, At: time.Now()}, nil
	case err != nil:
		return nil, err
	case status.State != containerd.Stopped:
		return nil, nil
	}
	exit, err := s.containers.Wait(ctx, r.Key.ID)
	if err != nil {
		return nil, err
	}
	return &lifecycle.Exit{Code: exit.Status, At: exit.At}, nil
}

func (s *startPause) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	_, err := s.containers.Get(ctx, r.Key.ID)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
