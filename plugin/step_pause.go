package plugin

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/states"
)

// startPause makes the sandbox's files, pause's container and its process, which gets new user and network namespaces.
type startPause struct {
	*node
	facts lifecycle.Facts
}

// Pause is the result of startPause.
type Pause struct {
	Pid          uint32
	CreatedAt    time.Time
	CgroupPath   string // the OCI spec's linux.cgroupsPath
	ProcessLabel string // SELinux
	Labels       map[string]string
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
	container, err := s.containers.Create(ctx, request)
	if err != nil {
		return nil, err
	}
	result.CreatedAt = container.CreatedAt
	if result.Pid, err = s.containers.CreateTask(ctx, r.Key.ID, spec.RuntimePath); err != nil {
		return nil, err
	}
	if err := s.containers.Start(ctx, r.Key.ID); err != nil {
		return nil, err
	}
	return result, nil
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
	uids, gids := spec.mapping()
	oci, err := s.settings.Spec(ctx, pause.Pod{
		ID:             r.Key.ID,
		Config:         spec.Config,
		UIDs:           uids,
		GIDs:           gids,
		NetNSPath:      spec.NetNSPath,
		PodAnnotations: spec.PodAnnotations,
		ImageConfig:    imageSpec.Config,
		ImageRef:       spec.Image,
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
		RuntimeOptions: spec.options(),
	}, nil
}

// Stop kills pause. Its record stays: the CRI shows it until the sandbox is removed.
func (s *startPause) Stop(ctx context.Context, r *lifecycle.Run) (lifecycle.Exit, error) {
	exit, err := s.containers.Kill(ctx, r.Key.ID)
	if err != nil {
		return lifecycle.Exit{}, err
	}
	return lifecycle.Exit{Code: exit.Status, At: exit.At}, s.settings.Files.UnmountShm(r.Key.ID)
}

// Reap deletes the task of a pause that has exited, and with it the shim.
func (s *startPause) Reap(ctx context.Context, r *lifecycle.Run) error {
	_, err := s.containers.Kill(ctx, r.Key.ID)
	return err
}

func (s *startPause) Undo(ctx context.Context, r *lifecycle.Run) error {
	if err := s.containers.Delete(ctx, r.Key.ID); err != nil {
		return err
	}
	if err := s.settings.Files.Remove(ctx, r.Key.ID); err != nil {
		return err
	}
	if started, ok := r.Result(states.StartPause).(*Pause); ok {
		selinux.ReleaseLabel(started.ProcessLabel)
	}
	return nil
}

func (s *startPause) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	_, err := s.containers.Get(ctx, r.Key.ID)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
